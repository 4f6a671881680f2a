"""Finding the smallest budget that keeps a share of the unreduced model's score, with as few samples as possible.

A budget keeps the target if E[score] >= target x E[baseline score]. Both scores of each image are known, so the mean of
score - target x baseline score over images is compared with 0. Images may be added until the decision is sure, since
the bounds hold at all numbers of images at once: they are those of an asymptotic confidence sequence (Waudby-Smith,
Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", Annals of
Statistics 2024). Questions about one image are summed, since their errors go together. A normal distribution is a poor
description of a few rare losses: 50 images without any do not show that fewer than 5 % are lost. So one more image is
assumed that speaks against the decision, with all of its questions. `tests/simulate_retain.py` measures how often
decisions are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

LEVEL = 0.025  # of each bound: that of a 95 % interval
TUNED = 15  # images at which the bounds are the narrowest that they can be; it matters little
FEWEST = 8  # images before a decision
LARGEST_RETENTION = 1000.0
MOST_IMAGES = 10**7

Verdict = Literal["kept", "lost", "open"]


@dataclass(frozen=True)
class Sums:
    """What the test needs to know of images: their number, questions, scores, and products of scores.

    mine, base: of the reduced and the unreduced model.
    """

    images: float = 0
    questions: float = 0
    mine: float = 0
    base: float = 0
    mine_mine: float = 0
    base_base: float = 0
    mine_base: float = 0

    def plus(self, questions: int, mine: float, base: float) -> Sums:
        """With one more image."""
        return Sums(
            self.images + 1,
            self.questions + questions,
            self.mine + mine,
            self.base + base,
            self.mine_mine + mine * mine,
            self.base_base + base * base,
            self.mine_base + mine * base,
        )

    def times(self, factor: float) -> Sums:
        """Of more images of the same kind."""
        return Sums(*(factor * getattr(self, name) for name in self.__dataclass_fields__))

    def keeps(self, target: float) -> bool:
        """Whether it is sure that the target is kept."""
        return self._deviation(target, -target) >= self._bound()

    def loses(self, target: float) -> bool:
        """Whether it is sure that it is not."""
        return -self._deviation(target, 1.0) >= self._bound()

    def _deviation(self, target: float, against: float) -> float:
        """The mean of score - target x baseline score in standard errors.

        against: that of each question of the image that is assumed.
        """
        extra = against * self.questions / self.images
        count = self.images + 1
        total = self.mine - target * self.base + extra
        squares = self.mine_mine - 2 * target * self.mine_base + target**2 * self.base_base + extra**2
        variance = max(squares - total**2 / count, 0.0) / (count - 1)
        return total / math.sqrt(count * variance) if variance else math.copysign(math.inf, total)

    def _bound(self) -> float:
        """How many standard errors make a decision sure at any time: Robbins' mixture boundary."""
        count = self.images + 1
        return math.sqrt((1 + TUNED / count) * math.log((1 + count / TUNED) / (2 * LEVEL) ** 2))


class PairedTest:
    """The test of one budget."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.sums = Sums()
        self.verdict: Verdict = "open"

    def add(self, images: Sequence[tuple[int, float, float]]) -> None:
        """Add images, all at once, and decide if that is possible now. A decision stands.

        images: the number of questions of each, the sum of their scores, 0 to 1 each, and that of the unreduced model.
        """
        for image in images:
            self.sums = self.sums.plus(*image)
        if self.verdict == "open" and self.sums.images >= FEWEST:
            if self.sums.keeps(self.target):
                self.verdict = "kept"
            elif self.sums.loses(self.target):
                self.verdict = "lost"

    def retention(self) -> float | None:
        """Score / baseline score of the images so far; None where the baseline scores 0."""
        return self.sums.mine / self.sums.base if self.sums.base else None

    def interval(self) -> tuple[float, float | None]:
        """Bounds of the retention, each of which holds at all numbers of images with a confidence of 97.5 %.

        A budget is kept if the lower bound reaches the target. None for an upper bound that is beyond measure.
        """
        sums = self.sums
        if sums.images < FEWEST:
            return 0.0, None
        low = _first(lambda share: not sums.keeps(share), 1e-6, LARGEST_RETENTION)
        return low or 0.0, _first(sums.loses, 1e-6, LARGEST_RETENTION)

    def images_needed(self) -> int | None:
        """About how many more images a decision takes, if they are like those so far; None if it may never come."""
        if not self.sums.images:
            return None

        def decides(images: float) -> bool:
            sums = self.sums.times(images / self.sums.images)
            return sums.keeps(self.target) or sums.loses(self.target)

        needed = _first(decides, max(self.sums.images, FEWEST), MOST_IMAGES)
        return None if needed is None else max(1, math.ceil(needed - self.sums.images))


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

    def add(self, place: int, images: Sequence[tuple[int, float, float]]) -> None:
        """The scores of a budget on its next batch, as `PairedTest.add` takes them."""
        self.tests[place].add(images)
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


def _first(condition: Callable[[float], bool], low: float, high: float) -> float | None:
    """The number from which on a condition is true; None where it is false up to `high`."""
    if not condition(high):
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if condition(middle) else (middle, high)
    return high
