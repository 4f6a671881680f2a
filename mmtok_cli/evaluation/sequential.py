"""Finding the smallest budget that keeps a share of the unreduced model's score, with as few samples as possible.

A budget keeps the target if E[score] >= target x E[baseline score]. Both scores of each image are known, so the mean of
score - target x baseline score is tested, once for "above 0" and once for "below 0", by betting (Waudby-Smith and
Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024): a player whose capital stays 1 on
average, if the hypothesis to be refuted is true, reaches 40 with a probability of at most 1/40. That holds whenever the
player stops, so samples may be added until the decision is sure, and for scores of any distribution from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

LEVEL = 0.025  # of each test: that of one bound of a 95 % interval
BETS = 32  # the capital is spread evenly over as many players, who always bet the same share of theirs
LARGEST_RETENTION = 1000.0

Verdict = Literal["kept", "lost", "open"]


class PairedTest:
    """The test of one budget. Each image contributes a pair: its scores, reduced and unreduced, each from 0 to 1."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.pairs: list[tuple[float, float]] = []
        self._keeps = np.zeros(BETS)  # logarithm of the capital of each player
        self._loses = np.zeros(BETS)
        self.verdict: Verdict = "open"

    def add(self, pairs: Sequence[tuple[float, float]]) -> None:
        """Add images, all at once, and decide if that is possible now. A decision stands."""
        self.pairs += pairs
        mine, base = _columns(pairs)
        self._keeps += _keeping(mine, base, self.target)
        self._loses += _losing(mine, base, self.target)
        if self.verdict == "open":
            if _capital(self._keeps) >= 1 / LEVEL:
                self.verdict = "kept"
            elif _capital(self._loses) >= 1 / LEVEL:
                self.verdict = "lost"

    def retention(self) -> float | None:
        """Score / baseline score of the images so far; None where the baseline scores 0."""
        mine, base = (sum(column) for column in zip(*self.pairs, strict=True)) if self.pairs else (0.0, 0.0)
        return mine / base if base else None

    def interval(self) -> tuple[float, float | None]:
        """Bounds of the retention, each of which holds at every number of images with a confidence of 97.5 %.

        A budget is kept exactly if the lower bound reaches the target. None for an upper bound that is beyond measure.
        """
        mine, base = _columns(self.pairs)
        low = _root(lambda share: _capital(_keeping(mine, base, share)) < 1 / LEVEL, 1e-6, LARGEST_RETENTION)
        high = _root(lambda share: _capital(_losing(mine, base, share)) >= 1 / LEVEL, 1e-6, LARGEST_RETENTION)
        return low or 0.0, high

    def images_needed(self) -> int | None:
        """About how many more images a decision takes, if they are like those so far; None if it may never come."""
        if not self.pairs:
            return None
        growth = max(float(self._keeps.max()), float(self._loses.max())) / len(self.pairs)
        if growth < 1e-6:
            return None
        # The capital of the best player has to make up for that of the others.
        return max(1, math.ceil((math.log(1 / LEVEL) + math.log(BETS) / 2) / growth) - len(self.pairs))


@dataclass
class BudgetSearch:
    """The search for the smallest budget of one method that keeps the target, on images in batches.

    coarse: for each budget, from the largest to the smallest, whether it is tried at once; the others are only tried
    between the smallest coarse budget that keeps the target and the next smaller one. batches: how many there are.

    A budget is the answer only if every larger coarse one, and every larger one of its gap, keeps the target as well.
    So a wrong answer takes a wrong verdict on one of two budgets: the largest coarse one that loses too much, or the
    largest in the gap. Each is wrong with a probability of 2.5 %, and the answer with 5 % at most, however many budgets
    are tried, provided that larger budgets keep more.
    """

    coarse: Sequence[bool]
    batches: int
    target: float
    tests: list[PairedTest] = field(init=False)
    done: list[int] = field(init=False)
    given_up: bool = False

    def __post_init__(self) -> None:
        self.tests = [PairedTest(self.target) for _ in self.coarse]
        self.done = [0] * len(self.coarse)

    def wanted(self) -> tuple[int, list[int]] | None:
        """The next batch and the budgets to be tried on it; None when the search has ended."""
        if self.given_up:
            return None
        left = self._undecided(self._coarse()) or self._undecided(self._gap())
        if not left:
            return None
        batch = min(self.done[place] for place in left)
        return batch, [place for place in left if self.done[place] == batch]

    def add(self, place: int, pairs: Sequence[tuple[float, float]]) -> None:
        """The scores of a budget on its next batch."""
        self.tests[place].add(pairs)
        self.done[place] += 1

    def give_up(self) -> None:
        """End the search, since the method cannot be run."""
        self.given_up = True

    @property
    def settled(self) -> int:
        """How many of the budgets that are tried at once need no more samples."""
        return sum(self.coarse) - len(self._undecided(self._coarse()))

    @property
    def answer(self) -> int | None:
        """The place of the smallest budget so far that keeps the target; None if that is shown of none."""
        chain = [*self._kept(self._coarse()), *self._kept(self._gap())]
        return chain[-1] if chain else None

    def _coarse(self) -> list[int]:
        return [place for place, is_coarse in enumerate(self.coarse) if is_coarse]

    def _gap(self) -> list[int]:
        """The budgets between the smallest coarse one that keeps the target and the next smaller coarse one."""
        kept = self._kept(self._coarse())
        below = next((place for place in self._coarse() if not kept or place > kept[-1]), len(self.coarse))
        return list(range(kept[-1] + 1 if kept else 0, below))

    def _kept(self, places: Sequence[int]) -> list[int]:
        """The budgets from the first one on that keep the target, up to one that does not."""
        found = []
        for place in places:
            if self.tests[place].verdict != "kept":
                break
            found.append(place)
        return found

    def _undecided(self, places: Sequence[int]) -> list[int]:
        """Those that more samples may decide, and whose decision matters: a smaller one's does not if one is lost."""
        found = []
        for place in places:
            verdict = self.tests[place].verdict
            if verdict == "lost" or (verdict == "open" and self.done[place] == self.batches):
                break
            if verdict == "open":
                found.append(place)
        return found


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    columns = np.asarray(pairs, dtype=float).reshape(-1, 2)
    return columns[:, :1], columns[:, 1:]


# The shares of its capital, of what it can lose at most in a round, that each player bets.
SHARES = (np.arange(BETS) + 0.5) / BETS


def _keeping(mine: np.ndarray, base: np.ndarray, target: float) -> np.ndarray:
    """What images add to the logarithm of each player's capital, [BETS], who bets that the target is kept.

    mine, base: [images, 1]."""
    return np.log1p(SHARES * (mine / target - base)).sum(0)


def _losing(mine: np.ndarray, base: np.ndarray, target: float) -> np.ndarray:
    """The same for players who bet that it is not."""
    return np.log1p(SHARES * (target * base - mine)).sum(0)


def _capital(logarithms: np.ndarray) -> float:
    """The mean capital of the players."""
    return float(np.exp(np.minimum(logarithms, 500)).mean())


def _root(is_above: Callable[[float], bool], low: float, high: float) -> float | None:
    """The number from which on a condition is true; None where it is false up to `high`."""
    if not is_above(high):
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return high
