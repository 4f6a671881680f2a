"""The schedule: every round runs the cases in a random order of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

FEWEST_TURNS = 6  # with fewer there is no confidence interval


def permutations(cases: int, seed: int) -> Iterator[list[int]]:
    """Endless seeded random permutations of range(cases).

    Drift during the benchmark (clocks, temperature, other jobs) then affects all cases equally.
    """
    generator = random.Random(seed)
    while True:
        yield generator.sample(range(cases), cases)


def interleaved(cases: int, rounds: int, seed: int) -> list[list[int]]:
    """The first `rounds` of the permutations."""
    return list(islice(permutations(cases, seed), rounds))


@dataclass(frozen=True)
class Turn:
    """One case in one round: it runs on batch `batch` of those of its size."""

    case: int
    batch: int


@dataclass(frozen=True)
class Rotation:
    """Which cases run in which round, and on which batch of samples.

    sizes: the batch size of each case. batches: the number of batches by batch size. rounds: the minimum number of
    rounds. every_round: whether all cases run in every round. Otherwise a case runs once for each batch of its size,
    but at least six times if the rounds allow, which a confidence interval takes; its turns are spread evenly over the
    rounds. So every sample is used at every batch size, and larger batches do not take longer than necessary. All cases
    of one batch size run in the same rounds on the same samples.
    """

    sizes: tuple[int, ...]
    batches: dict[int, int]
    rounds: int
    seed: int
    every_round: bool

    def turns(self) -> Iterator[list[Turn]]:
        """The turns of each round in the order in which they run, endlessly."""
        for number, permutation in enumerate(permutations(len(self.sizes), self.seed)):
            batches = {size: self.batch_in(size, number) for size in self.batches}
            yield [Turn(case, batch) for case in permutation if (batch := batches[self.sizes[case]]) is not None]

    def turns_of(self, case: int) -> int:
        """The number of turns of a case in `rounds` rounds."""
        return self._turns(self.sizes[case])

    def first(self, rounds: int) -> list[list[int]]:
        """The cases of the first rounds, in the order in which they run."""
        return [[turn.case for turn in turns] for turns in islice(self.turns(), rounds)]

    def _turns(self, size: int) -> int:
        return self.rounds if self.every_round else min(self.rounds, max(self.batches[size], FEWEST_TURNS))

    def batch_in(self, size: int, number: int) -> int | None:
        """The batch on which the cases of a batch size run in a round; None if they do not run in this round."""
        turns = self._turns(size)
        before, remainder = divmod(number * turns, self.rounds)  # the turns in the rounds before this one
        return before % self.batches[size] if remainder < turns else None


def rotation(sizes: Sequence[int], samples: int, rounds: int | None, seed: int, most: int | None = None) -> Rotation:
    """The rotation of cases of these batch sizes over a number of samples.

    rounds: None for as many as it takes to use every sample, but not more than `most`. Samples that do not fill a whole
    batch are left out at that batch size.
    """
    batches = {size: samples // size for size in sizes}
    whole = max(batches.values())
    return Rotation(tuple(sizes), batches, rounds or min(whole, most or whole), seed, rounds is not None)
