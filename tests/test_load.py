"""The load generator and the statistics of load runs, without an engine."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from mmtok_cli.results.engine import ENGINE_STAGES, LoadRun, ServedRequest
from mmtok_cli.results.schema import CaseId
from mmtok_cli.timing.load import Encoding, Step, busy_seconds, closed_loop, summarise_load, whole_rounds

FULL = CaseId(method="full", parameters={}, budget=None)
MMTOK = CaseId(method="mmtok", parameters={}, budget="64")


class Server:
    """Answers after a random time; counts the requests in flight whenever one arrives."""

    def __init__(self, seed: int = 0) -> None:
        self.now = self.most = 0
        self.seen: list[int] = []
        self.random = random.Random(seed)

    async def serve(self, item: int) -> int:
        self.now += 1
        self.most = max(self.most, self.now)
        self.seen.append(self.now)
        await asyncio.sleep(self.random.uniform(0, 0.002))
        self.now -= 1
        return 10 * item


@pytest.mark.parametrize(("count", "concurrency"), [(20, 1), (20, 4), (3, 16), (16, 16)])
def test_closed_loop_keeps_as_many_in_flight_as_it_is_told(count: int, concurrency: int) -> None:
    server = Server()
    answers = asyncio.run(closed_loop(server.serve, list(range(count)), concurrency))
    assert answers == [10 * item for item in range(count)]
    full = min(concurrency, count)
    assert server.most == full
    # Once as many are in flight, every further request is sent when one is answered: none is missing, none too many.
    assert server.seen == [*range(1, full + 1), *[full] * (count - full)]


def test_an_error_ends_the_loop_and_cancels_what_is_in_flight() -> None:
    ended: list[str] = []

    async def serve(item: int) -> int:
        if item == 2:
            raise ValueError("item 2")
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return item

    with pytest.raises(ValueError, match="item 2"):
        asyncio.run(closed_loop(serve, [0, 1, 2, 3], 3))
    assert ended == ["cancelled"] * 2


def test_the_time_of_the_engine_is_divided_into_its_stages() -> None:
    steps = [
        Step(1.0, prefilled=90, decoded=0, kv_cache=0.1),
        Step(0.5, prefilled=10, decoded=100, kv_cache=0.2),
        Step(0.2, prefilled=0, decoded=2, kv_cache=0.2),
    ]
    encodings = [Encoding(0.3, 0.1, 2), Encoding(0.2, 0.0, 1)]
    found = busy_seconds(2.0, steps, encodings)
    # The steps that prefill leave 1.5 - 0.6 seconds to the language model, half of its tokens decoded.
    assert found == pytest.approx({"encode": 0.5, "select": 0.1, "prefill": 0.45, "decode": 0.65, "idle": 0.3})
    assert sum(found.values()) == pytest.approx(2.0)


def test_an_encoder_that_takes_longer_than_the_steps_leaves_nothing_below_zero() -> None:
    found = busy_seconds(1.0, [Step(0.2, 10, 0, 0.0)], [Encoding(0.3, 0.1, 1)])
    assert found == pytest.approx({"encode": 0.3, "select": 0.1, "prefill": 0.0, "decode": 0.0, "idle": 0.6})
    assert busy_seconds(1.0, [], []) == dict.fromkeys(ENGINE_STAGES, 0.0) | {"idle": 1.0}


def served(ttft: float, decode: float = 0.1, new: int = 3, kept: int = 64) -> ServedRequest:
    seconds = {"preprocess": ttft / 4, "queue": ttft / 4, "first_step": ttft / 2, "decode": decode}
    seconds |= {"ttft": ttft, "total": ttft + decode}
    return ServedRequest(sample=0, seconds=seconds, vision=576, kept=kept, prompt=kept + 12, new=new)


def load_run(
    case: int, number: int | None, seconds: float, requests: list[ServedRequest], concurrency: int = 4
) -> LoadRun:
    busy = dict.fromkeys(ENGINE_STAGES, seconds / 5)
    return LoadRun(
        case=case,
        concurrency=concurrency,
        round=number,
        seconds=seconds,
        requests=requests,
        busy=busy,
        images=len(requests),
        encodings=2,
        steps=9,
        kv_cache=0.1 * (case + 1),
    )


def test_speedups_are_paired_within_rounds() -> None:
    """The machine becomes slower and slower, and the ratio stays the same."""
    runs = []
    for number in range(8):
        slowdown = 1.5**number
        runs.append(load_run(0, number, 4 * slowdown, [served(0.4 * slowdown)] * 4))
        runs.append(load_run(1, number, 2 * slowdown, [served(0.1 * slowdown, decode=0.2 * slowdown)] * 4))
    full, mmtok = summarise_load([FULL, MMTOK], list(reversed(runs)))
    assert full.speedup == {}
    assert mmtok.speedup["throughput"].median == pytest.approx(2.0)
    assert mmtok.speedup["throughput"].low == pytest.approx(2.0) and mmtok.speedup["throughput"].conclusive
    assert mmtok.speedup["ttft"].median == pytest.approx(4.0)
    assert mmtok.requests_per_second.by_round == pytest.approx([4 / (2 * 1.5**number) for number in range(8)])
    assert mmtok.output_tokens_per_second.median == pytest.approx(3 * mmtok.requests_per_second.median)
    assert mmtok.busy == pytest.approx(dict.fromkeys(ENGINE_STAGES, 0.2))
    assert sum(mmtok.busy_seconds.values()) == pytest.approx(sum(run.seconds for run in runs if run.case) / 32)
    assert (mmtok.kv_cache, mmtok.images, mmtok.batch) == (pytest.approx(0.2), 1.0, 2.0)


def test_fewer_than_six_rounds_have_no_interval() -> None:
    runs = [load_run(case, number, 1.0, [served(0.1)]) for number in range(5) for case in (0, 1)]
    gain = summarise_load([FULL, MMTOK], runs)[1].speedup["throughput"]
    assert gain.low is None and not gain.conclusive


def test_latencies_are_those_of_all_requests() -> None:
    generator = np.random.default_rng(0)
    values = generator.exponential(0.1, 400)
    runs = [load_run(0, number, 1.0, [served(float(v)) for v in values[number::8]]) for number in range(8)]
    (found,) = summarise_load([FULL], runs)
    assert found.requests == 400
    assert found.seconds["ttft"].median == pytest.approx(np.median(values))
    assert found.seconds["ttft"].p99 == pytest.approx(np.percentile(values, 99))
    assert found.seconds["ttft"].by_round == pytest.approx([np.median(values[number::8]) for number in range(8)])


def test_requests_of_one_token_have_no_tpot() -> None:
    runs = [load_run(case, 0, 1.0, [served(0.1, new=1), served(0.1, decode=0.3, new=4)]) for case in (0, 1)]
    full, mmtok = summarise_load([FULL, MMTOK], runs)
    assert full.seconds["tpot"].median == pytest.approx(0.1)
    assert mmtok.speedup["tpot"].median == pytest.approx(1.0)
    (alone,) = summarise_load([FULL], [load_run(0, 0, 1.0, [served(0.1, new=1)])])
    assert "tpot" not in alone.seconds


def test_only_whole_rounds_count() -> None:
    runs = [load_run(case, number, 1.0, [served(0.1)]) for number in (None, 0, 1) for case in (0, 1)][:-1]
    whole = whole_rounds(runs, 2)
    assert [(run.round, run.case) for run in whole] == [(0, 0), (0, 1)]


def test_each_concurrency_has_a_baseline_of_its_own() -> None:
    runs = [
        load_run(case, number, concurrency * (2.0 if case else 3.0), [served(0.1)], concurrency)
        for number in range(6)
        for concurrency in (8, 1)
        for case in (1, 0)
    ]
    found = summarise_load([FULL, MMTOK], runs)
    assert [(each.concurrency, each.case.method) for each in found] == [
        (1, "full"),
        (1, "mmtok"),
        (8, "full"),
        (8, "mmtok"),
    ]
    assert all(each.speedup["throughput"].median == pytest.approx(1.5) for each in found if each.speedup)
