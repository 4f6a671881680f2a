"""From the timed runs of a case to its times, speedups and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median

from mmtok_cli.results.records import GpuState, TimedRun
from mmtok_cli.results.schema import CaseId, CaseResult, DraftEffect, FlopCoverage, GpuUse, Memory, Tokens
from mmtok_cli.timing.statistics import drift, outliers, paired_speedup, summarise


def summarise_case(
    case: CaseId,
    runs: Sequence[TimedRun],
    baseline: Sequence[TimedRun] | None,
    flops: Mapping[str, float],
    coverage: FlopCoverage | None = None,
) -> CaseResult:
    """The result of one case, without the quality of its answers.

    baseline: the baseline's runs in the same rounds; None for the baseline itself, and where it could not be run.
    flops: per sample, by stage.
    """
    once = _first_of_each_batch(runs)
    seconds = {stage: [run.seconds[stage] for run in runs] for stage in runs[0].seconds}
    repeated = any(len(run.repetitions["total"]) > 1 for run in runs)
    return CaseResult(
        case=case,
        positions=runs[0].positions,
        tokens=_tokens(once),
        short=sum(tokens.short for run in once for tokens in run.tokens),
        seconds={
            stage: summarise(values, [run.repetitions[stage] for run in runs] if repeated else ())
            for stage, values in seconds.items()
        },
        speedup={
            stage: paired_speedup(before, values)
            for stage, values in seconds.items()
            if (before := [run.seconds.get(stage, 0.0) for run in baseline or ()]) and min(*before, *values) > 0
        },
        overhead=median(map(_overhead, runs)),
        decode_tokens_per_second=_decode_speed(runs),
        memory=Memory(
            peak=_largest(run.peak for run in runs),
            kv_cache=int(fmean(run.kv_cache / len(run.samples) for run in once)),
            host=max(run.host for run in runs),
            reserved=_largest(run.reserved for run in runs),
        ),
        flops=dict(flops),
        flop_coverage=coverage,
        gpu=summarise_states([run.gpu for run in runs if run.gpu], case.batch_size),
        outliers=outliers(seconds["ttft"]),
        drift=drift(seconds["ttft"]),
    )


def with_slowdown(result: CaseResult, drafted: Sequence[TimedRun], plain: Sequence[TimedRun]) -> CaseResult:
    """The result of a case with a draft, compared with the runs of the same one without, in the same rounds."""
    by_round = {run.round: run.seconds["ttft"] for run in plain}
    pairs = [(run.seconds["ttft"], by_round[run.round]) for run in drafted if run.round in by_round]
    if not pairs:
        return result
    slowdown = paired_speedup(*zip(*pairs, strict=True))
    return result.model_copy(
        update={"draft": (result.draft or DraftEffect()).model_copy(update={"slowdown": slowdown})}
    )


def summarise_states(states: Sequence[GpuState], samples: int) -> GpuUse | None:
    """The state of the card over all rounds of a case with `samples` per batch; None where it was never read."""
    if not states:
        return None

    def known(name: str) -> list[float]:
        return [value for state in states if (value := getattr(state, name)) is not None]

    others, joules = known("other_processes"), known("joules")
    return GpuUse(
        clock=median(clocks) if (clocks := known("clock")) else None,
        memory_clock=median(clocks) if (clocks := known("memory_clock")) else None,
        full_clock=max(known("full_clock"), default=None),
        power_limit=min(known("power_limit"), default=None),
        throttled=dict(sorted(Counter(name for state in states for name in state.throttled).items())),
        other_processes=int(max(others)) if others else None,
        # The counter is too coarse for one short run, and right on average over many.
        joules=sum(joules) / len(joules) / samples if joules else None,
    )


def _tokens(once: Sequence[TimedRun]) -> Tokens:
    counts = [tokens for run in once for tokens in run.tokens]
    return Tokens(
        total=fmean(c.total for c in counts),
        kept=fmean(c.kept for c in counts),
        text=fmean(c.text for c in counts),
        layer_average=fmean(c.layer_average for c in counts),
        new=fmean(run.steps for run in once),
    )


def _first_of_each_batch(runs: Sequence[TimedRun]) -> list[TimedRun]:
    """One run per batch: token counts do not change from round to round, and each sample is to count once."""
    return list({run.batch: run for run in reversed(runs)}.values())[::-1]


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _overhead(run: TimedRun) -> float:
    """Seconds of the selection, as a share of the stages that it is meant to shorten."""
    return run.seconds["select"] / (run.seconds["encode"] + run.seconds["prefill"])


def _decode_speed(runs: Sequence[TimedRun]) -> float | None:
    """Tokens per second of a sequence while decoding; the first token comes from prefill."""
    speeds = [(run.steps - 1) / run.seconds["decode"] for run in runs if run.steps > 1 and run.seconds["decode"] > 0]
    return median(speeds) if speeds else None
