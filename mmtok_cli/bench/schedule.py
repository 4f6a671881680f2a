"""The order of runs: every round passes once over all cases, in an order of its own."""

import random


def interleaved(cases: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round a seeded random permutation of range(cases).

    Whatever drifts while the benchmark runs (clocks, temperature, other people's jobs) then meets all cases alike.
    """
    generator = random.Random(seed)
    return [generator.sample(range(cases), cases) for _ in range(rounds)]
