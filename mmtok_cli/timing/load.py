"""Load on a serving engine: a closed loop of requests, and what is known of it afterwards."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

import numpy as np

from mmtok_cli.results.engine import ENGINE_STAGES, REQUEST_STAGES, Latency, LoadResult, LoadRun, Rate
from mmtok_cli.results.schema import CaseId, Speedup
from mmtok_cli.timing.statistics import paired_speedup

Item = TypeVar("Item")
Answer = TypeVar("Answer")


async def closed_loop(
    serve: Callable[[Item], Awaitable[Answer]], items: Sequence[Item], concurrency: int
) -> list[Answer]:
    """The answers to all items, in their order, with `concurrency` of them in flight.

    Whenever one is answered, the next one is sent. The first error ends the loop; requests in flight are cancelled.
    """
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(items))

    async def client() -> None:
        for place, item in waiting:
            answers[place] = await serve(item)

    clients = [asyncio.ensure_future(client()) for _ in range(min(concurrency, len(items)))]
    try:
        await asyncio.gather(*clients)
    finally:
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return [answers[place] for place in range(len(items))]


@dataclass(frozen=True)
class Step:
    """One step of an engine: its seconds, tokens of prompts and of answers that it computed, and the share of the KV
    cache that was in use after it."""

    seconds: float
    prefilled: int
    decoded: int
    kv_cache: float


@dataclass(frozen=True)
class Encoding:
    """One batch of images: seconds of the encoder and of the selection, within a step of the engine."""

    encode: float
    select: float
    images: int


def busy_seconds(duration: float, steps: Sequence[Step], encodings: Sequence[Encoding]) -> dict[str, float]:
    """Seconds of ENGINE_STAGES in a load run that took `duration` seconds.

    Images are encoded in steps that prefill. What remains of these steps is the language model's time; where a step
    prefills and decodes, it is divided by the numbers of tokens.
    """
    encode, select = sum(each.encode for each in encodings), sum(each.select for each in encodings)
    prefilling = [step for step in steps if step.prefilled]
    working = sum(step.seconds for step in steps)
    language = max(sum(step.seconds for step in prefilling) - encode - select, 0.0)
    prefilled, decoded = (sum(getattr(step, name) for step in prefilling) for name in ("prefilled", "decoded"))
    prefill = language * prefilled / (prefilled + decoded) if prefilled else 0.0
    decode = language - prefill + sum(step.seconds for step in steps if not step.prefilled)
    idle = max(duration - max(working, encode + select), 0.0)
    return dict(zip(ENGINE_STAGES, (encode, select, prefill, decode, idle), strict=True))


def whole_rounds(runs: Sequence[LoadRun], turns: int) -> list[LoadRun]:
    """The runs of rounds in which all turns were measured, without the warm-up. turns: cases x concurrencies."""
    by_round: dict[int, list[LoadRun]] = defaultdict(list)
    for run in runs:
        if run.round is not None:
            by_round[run.round].append(run)
    return [run for _, found in sorted(by_round.items()) if len(found) == turns for run in found]


def summarise_load(cases: Sequence[CaseId], runs: Sequence[LoadRun]) -> list[LoadResult]:
    """The result of each case at each concurrency, the first case being the baseline. runs: of whole rounds."""
    table: dict[tuple[int, int], list[LoadRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.round or 0):
        table[run.concurrency, run.case].append(run)
    return [
        _result(cases[case], mine, None if case == 0 else table[concurrency, 0])
        for (concurrency, case), mine in sorted(table.items())
    ]


def _result(case: CaseId, runs: Sequence[LoadRun], baseline: Sequence[LoadRun] | None) -> LoadResult:
    requests = [request for run in runs for request in run.requests]
    count, duration = len(requests), sum(run.seconds for run in runs)
    busy = {stage: sum(run.busy[stage] for run in runs) for stage in ENGINE_STAGES}
    seconds = {
        stage: latency for stage in (*REQUEST_STAGES, "ttft", "tpot", "total") if (latency := _latency(runs, stage))
    }
    rates = [len(run.requests) / run.seconds for run in runs]
    tokens = [sum(request.new for request in run.requests) / run.seconds for run in runs]
    encodings = sum(run.encodings for run in runs)
    return LoadResult(
        case=case,
        concurrency=runs[0].concurrency,
        requests=count,
        vision=fmean(request.vision for request in requests),
        kept=fmean(request.kept for request in requests),
        prompt=fmean(request.prompt for request in requests),
        new=fmean(request.new for request in requests),
        seconds=seconds,
        requests_per_second=Rate(median=median(rates), by_round=rates),
        output_tokens_per_second=Rate(median=median(tokens), by_round=tokens),
        busy={stage: value / duration for stage, value in busy.items()},
        busy_seconds={stage: value / count for stage, value in busy.items()},
        images=sum(run.images for run in runs) / count,
        batch=sum(run.images for run in runs) / encodings if encodings else 0.0,
        kv_cache=max(run.kv_cache for run in runs),
        preempted=sum(request.preempted for request in requests),
        speedup={} if baseline is None else _speedups(runs, baseline),
    )


def _values(run: LoadRun, stage: str) -> list[float]:
    """Seconds of a stage of each request that has it."""
    if stage == "tpot":
        return [request.tpot for request in run.requests if request.tpot is not None]
    return [request.seconds[stage] for request in run.requests]


def _latency(runs: Sequence[LoadRun], stage: str) -> Latency | None:
    by_round = [values for run in runs if (values := _values(run, stage))]
    if not by_round:
        return None
    everything = [value for values in by_round for value in values]
    middle, p99 = np.percentile(everything, [50, 99]).tolist()
    return Latency(median=middle, p99=p99, by_round=[median(values) for values in by_round])


def _speedups(runs: Sequence[LoadRun], baseline: Sequence[LoadRun]) -> dict[str, Speedup]:
    """Against the runs of the baseline in the same rounds, which have as many requests."""
    pairs = list(zip(baseline, runs, strict=True))
    found = {"throughput": paired_speedup(*zip(*((base.seconds, mine.seconds) for base, mine in pairs), strict=True))}
    for stage in ("ttft", "tpot"):
        medians = [
            (median(before), median(after))
            for base, mine in pairs
            if (before := _values(base, stage)) and (after := _values(mine, stage))
        ]
        if medians and min(map(min, medians)) > 0:
            found[stage] = paired_speedup(*zip(*medians, strict=True))
    return found
