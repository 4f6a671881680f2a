"""Simulates `compare --retain`: how often its answer is wrong, and how many samples it takes.

Run with `python tests/simulate_retain.py`. A wrong answer is a budget whose true retention is below the target.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from mmtok_cli.evaluation.sequential import BudgetSearch

BASELINE = 0.8  # accuracy of the unreduced model
BATCH = 8  # images between two looks
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
    images: int = 400,
    questions: int = 1,
    alike: float = 0.0,
    gains: float = 0.02,
    shared: bool = True,
) -> Outcome:
    """One search over budgets with these true retentions.

    Answers are right or wrong. A reduced model answers a share `gains` of the questions right that the unreduced one
    gets wrong. questions: about each image; alike: the share of images whose questions are lost all together or not at
    all. shared: a question that a budget loses is lost at all smaller ones; otherwise budgets are independent.
    """
    base = rng.random((images, questions)) < BASELINE
    draws = rng.random((images, questions, 1 if shared else len(retentions)))
    together = rng.random(images) < alike
    draws[together] = draws[together, :1]
    gained = rng.random((images, questions, 1)) < gains
    stay = np.clip(
        np.asarray(retentions) - gains * (1 - BASELINE) / BASELINE, 0, 1
    )  # so that the mean is the retention
    right = np.where(base[..., None], draws < stay, gained).sum(1)
    scores, known = right.astype(float).tolist(), base.sum(1).astype(float).tolist()
    search = BudgetSearch(COARSE, -(-images // BATCH), target)
    runs = 0
    while step := search.wanted():
        number, places = step
        rows = range(number * BATCH, min((number + 1) * BATCH, images))
        for place in places:
            search.add(place, [(questions, scores[row][place], known[row]) for row in rows])
            runs += len(rows) * questions
    return Outcome(search.answer, min(max(search.done) * BATCH, images) * questions, runs)


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


DATA: dict[str, dict[str, Any]] = {
    "1 question": {},
    "1 question, independent budgets": {"shared": False},
    "4 questions": {"questions": 4, "alike": 0.3},
    "4 questions lost together": {"questions": 4, "alike": 1.0},
    "no gains": {"gains": 0.0},
}


def main(count: int = 1000) -> None:
    sys.stdout.write(f"{count} searches each, at most 400 images\n")
    for target, (data, settings), (name, make) in product((0.98, 0.95, 0.9), DATA.items(), SCENARIOS.items()):
        retentions = make(target)
        rng = np.random.default_rng(0)
        found = [simulate(retentions, target, rng, **settings) for _ in range(count)]
        share = fmean(wrong(outcome, retentions, target) for outcome in found)
        answers = [outcome.answer for outcome in found]
        exact = fmean(answer is not None and answer == _edge(retentions, target) for answer in answers)
        sys.stdout.write(
            f"{target:.0%}, {data:32s}{name:42s} wrong {share:6.1%}  smallest found {exact:6.1%}  "
            f"none {answers.count(None) / count:6.1%}  questions {fmean(o.samples for o in found):5.0f}  "
            f"runs {fmean(o.runs for o in found):6.0f}\n"
        )


def _edge(retentions: Sequence[float], target: float) -> int | None:
    """The place of the smallest budget that truly keeps the target."""
    return max((place for place, value in enumerate(retentions) if value >= target), default=None)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
