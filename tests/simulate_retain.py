"""Simulates `compare --retain`: how often its answer is wrong, and how many samples it takes.

Run with `python tests/simulate_retain.py`. A wrong answer is a budget whose true retention is below the target.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from mmtok_cli.evaluation.sequential import BudgetSearch

BASELINE = 0.8  # accuracy of the unreduced model
COARSE = (True, False, False, False) * 6  # a budget halves with each four


@dataclass(frozen=True)
class Outcome:
    """A simulated search. answer: place of the budget found. samples: of the budget that took most. runs: in all."""

    answer: int | None
    samples: int
    runs: int


def simulate(
    retentions: Sequence[float],
    target: float,
    rng: np.random.Generator,
    *,
    samples: int = 800,
    batch: int = 8,
    gains: float = 0.02,
    shared: bool = True,
) -> Outcome:
    """One search over budgets with these true retentions.

    Answers are right or wrong. A reduced model answers a share `gains` of the samples right that the unreduced one gets
    wrong. shared: a sample that a budget loses is lost at all smaller ones; otherwise budgets are independent.
    """
    base = rng.random(samples) < BASELINE
    draws = rng.random((samples, 1)) if shared else rng.random((samples, len(retentions)))
    gained = rng.random((samples, 1)) < gains
    stay = np.clip(
        np.asarray(retentions) - gains * (1 - BASELINE) / BASELINE, 0, 1
    )  # so that the mean is the retention
    right = np.where(base[:, None], draws < stay, gained).astype(float)
    search = BudgetSearch(COARSE, -(-samples // batch), target)
    runs = 0
    while step := search.wanted():
        number, places = step
        rows = slice(number * batch, (number + 1) * batch)
        for place in places:
            search.add(place, list(zip(right[rows, place].tolist(), base[rows].astype(float).tolist(), strict=True)))
            runs += batch
    return Outcome(search.answer, max(search.done) * batch, runs)


def curve(edge: int, above: float, below: float) -> list[float]:
    """Retentions of which those before `edge` are `above`, and the others `below` and falling."""
    return [above if place < edge else max(0.0, below - 0.02 * (place - edge)) for place in range(len(COARSE))]


def flat(value: float) -> list[float]:
    return [value] * len(COARSE)


def wrong(outcome: Outcome, retentions: Sequence[float], target: float) -> bool:
    return outcome.answer is not None and retentions[outcome.answer] < target


SCENARIOS = {
    "all just below": lambda target: flat(target - 0.002),
    "all just above": lambda target: flat(target + 0.002),
    "all 1 point below": lambda target: flat(target - 0.01),
    "edge at a coarse budget, 0.2 points below": lambda target: curve(8, 1.0, target - 0.002),
    "edge in a gap, 0.2 points below": lambda target: curve(10, 1.0, target - 0.002),
    "edge in a gap, 1 point on either side": lambda target: curve(10, target + 0.01, target - 0.01),
    "edge in a gap, 5 points below": lambda target: curve(10, 1.0, target - 0.05),
}


def main(count: int = 1000) -> None:
    sys.stdout.write(f"{count} searches each, at most 800 samples\n")
    for target in (0.98, 0.95, 0.9):
        for shared in (True, False):
            for name, make in SCENARIOS.items():
                retentions = make(target)
                rng = np.random.default_rng(0)
                found = [simulate(retentions, target, rng, shared=shared) for _ in range(count)]
                share = fmean(wrong(outcome, retentions, target) for outcome in found)
                answers = [outcome.answer for outcome in found]
                exact = fmean(answer is not None and answer == _edge(retentions, target) for answer in answers)
                sys.stdout.write(
                    f"target {target:.0%}, budgets {'alike      ' if shared else 'independent'}, {name:43s} "
                    f"wrong {share:6.1%}  smallest found {exact:6.1%}  none {answers.count(None) / count:6.1%}  "
                    f"samples {fmean(o.samples for o in found):5.0f}  runs {fmean(o.runs for o in found):6.0f}\n"
                )


def _edge(retentions: Sequence[float], target: float) -> int | None:
    """The place of the smallest budget that truly keeps the target."""
    return max((place for place, value in enumerate(retentions) if value >= target), default=None)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
