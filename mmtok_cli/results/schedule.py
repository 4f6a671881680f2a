"""The order of runs: every round passes over the cases in an order of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

FEWEST_TURNS = 6  # fewer have no interval


def permutations(cases: int, seed: int) -> Iterator[list[int]]:
    """Seeded random permutations of range(cases), without end.

    Whatever drifts while the benchmark runs (clocks, temperature, other people's jobs) then meets all cases alike.
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
    """Which cases have their turn in which round, and on which batch of samples.

    sizes: the batch size of each case. batches: by batch size, into how many batches the samples fall. rounds: how
    many rounds there are at least. every_round: all cases have a turn in each round. Otherwise a case has as many
    turns as there are batches of its size, and six if the rounds allow, for the sake of intervals; they are spread
    evenly over the rounds. So every sample is asked whatever the size, and larger batches do not take longer than that.
    All cases of one size have their turns in the same rounds and on the same samples.
    """

    sizes: tuple[int, ...]
    batches: dict[int, int]
    rounds: int
    seed: int
    every_round: bool

    def turns(self) -> Iterator[list[Turn]]:
        """The turns of each round, in the order in which they are taken, without end."""
        for number, permutation in enumerate(permutations(len(self.sizes), self.seed)):
            places = {size: self._place(size, number) for size in self.batches}
            yield [
                Turn(case, place % self.batches[self.sizes[case]])
                for case in permutation
                if (place := places[self.sizes[case]]) is not None
            ]

    def turns_of(self, case: int) -> int:
        """How many turns a case has in `rounds` rounds."""
        return self._turns(self.sizes[case])

    def first(self, rounds: int) -> list[list[int]]:
        """The cases of the first rounds, in the order in which they run."""
        return [[turn.case for turn in turns] for turns in islice(self.turns(), rounds)]

    def _turns(self, size: int) -> int:
        return self.rounds if self.every_round else min(self.rounds, max(self.batches[size], FEWEST_TURNS))

    def _place(self, size: int, number: int) -> int | None:
        """How many turns a size has had before a round; None if it sits this one out."""
        turns = self._turns(size)
        place, remainder = divmod(number * turns, self.rounds)
        return place if remainder < turns else None


def rotation(sizes: Sequence[int], samples: int, rounds: int | None, seed: int, most: int | None = None) -> Rotation:
    """The rotation of cases of these batch sizes over so many samples; without `rounds`, until every sample was asked,
    or as many as `most`.

    Samples that do not fill a batch of some size are left out at that size.
    """
    batches = {size: samples // size for size in sizes}
    whole = max(batches.values())
    return Rotation(tuple(sizes), batches, rounds or min(whole, most or whole), seed, rounds is not None)
