"""Who runs when, and on which samples."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from mmtok_cli.results.schedule import Turn, interleaved, permutations, rotation


def test_every_round_holds_every_case_in_an_order_of_its_own() -> None:
    order = interleaved(6, 50, seed=1)
    assert all(sorted(round_) == list(range(6)) for round_ in order)
    assert order == interleaved(6, 50, seed=1) != interleaved(6, 50, seed=2)
    assert len({tuple(round_) for round_ in order}) > 40
    assert {round_[0] for round_ in order} == set(range(6))
    assert order[:20] == interleaved(6, 20, seed=1) == list(islice(permutations(6, 1), 20))  # going on changes nothing


def turns(size: int, rounds: list[list[Turn]], sizes: list[int]) -> list[list[int]]:
    """For each round, the batches of the turns of all cases of one size."""
    return [[turn.batch for turn in round_ if sizes[turn.case] == size] for round_ in rounds]


@pytest.mark.parametrize("samples", [80, 81, 49])
def test_every_sample_is_asked_once_at_every_batch_size(samples: int) -> None:
    sizes = [1, 1, 8, 8, 3]
    plan = rotation(sizes, samples, None, seed=0)
    rounds = list(islice(plan.turns(), plan.rounds))
    assert plan.rounds == samples
    for size in (1, 3, 8):
        batches = [batch for batch in turns(size, rounds, sizes) if batch]
        assert all(len(batch) == sizes.count(size) and len(set(batch)) == 1 for batch in batches)
        assert [batch[0] for batch in batches] == list(range(samples // size))
        having = [number for number, batch in enumerate(turns(size, rounds, sizes)) if batch]
        gaps = {after - before for before, after in pairwise(having)}
        assert max(gaps) - min(gaps) <= 1  # evenly spread
    assert plan.first(3) == [[turn.case for turn in round_] for round_ in rounds[:3]]
    assert [plan.turns_of(case) for case in range(5)] == [samples // size for size in sizes]


def test_rounds_that_were_asked_for_hold_every_case_and_begin_again_with_the_samples() -> None:
    sizes = [1, 8]
    plan = rotation(sizes, 24, 30, seed=3)
    rounds = list(islice(plan.turns(), 40))  # more than were planned, as with --min-time
    assert all(sorted(turn.case for turn in round_) == [0, 1] for round_ in rounds)
    assert turns(1, rounds, sizes) == [[number % 24] for number in range(40)]
    assert turns(8, rounds, sizes) == [[number % 3] for number in range(40)]
    assert plan.turns_of(0) == plan.turns_of(1) == 30


def test_large_batches_have_the_turns_that_an_interval_takes() -> None:
    sizes = [1, 8]
    for samples, wanted in ((24, [0, 1, 2, 0, 1, 2]), (9, [0] * 6), (8, [0] * 6)):
        plan = rotation(sizes, samples, None, seed=0)
        rounds = list(islice(plan.turns(), plan.rounds))
        assert [batch[0] for batch in turns(8, rounds, sizes) if batch] == wanted
    assert rotation([8], 24, None, seed=0).rounds == 3


def test_rounds_beyond_the_plan_go_on_in_the_same_rhythm() -> None:
    sizes = [1, 4]
    plan = rotation(sizes, 32, None, seed=3)
    beyond = list(islice(plan.turns(), 64))[32:]
    assert [batch[0] for batch in turns(4, beyond, sizes) if batch] == list(range(8))
