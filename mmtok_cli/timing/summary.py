"""From the timed runs of a case to its times, speedups and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Literal

from mmtok_cli.budget import TokenCounts
from mmtok_cli.results.records import GpuState, MachineState, TimedRun
from mmtok_cli.results.schema import (
    CaseId,
    CaseResult,
    DraftEffect,
    FlopCoverage,
    GpuUse,
    MachineUse,
    Memory,
    Speedup,
    Times,
    Tokens,
)
from mmtok_cli.timing.statistics import drift, outliers, paired_speedup, summarise

SAVED = ("encode", "prefill", "ttft")


def summarise_case(
    case: CaseId,
    runs: Sequence[TimedRun],
    baseline: Sequence[TimedRun] | None,
    flops: Mapping[str, float],
    coverage: FlopCoverage | None = None,
    *,
    reserved: int | None = None,
    exact_length: bool = False,
) -> CaseResult:
    """The result of one case, without the quality of its answers.

    baseline: the baseline's runs in the same rounds; None for the baseline itself, and where it could not be run.
    flops: per sample, by stage. reserved: bytes that the allocator holds for the case alone. exact_length: all runs
    decoded the same number of tokens, so that disturbances show in their totals; otherwise they are looked for before
    the first token.
    """
    once = _first_of_each_batch(runs)
    before: Sequence[TimedRun | None] = baseline or [None] * len(runs)
    pairs = list(zip(runs, before, strict=True))
    decoded = [(run, base) for run, base in pairs if run.steps > 1]
    seconds = {stage: _times(runs, stage) for stage in runs[0].seconds}
    speedups = {stage: _speedup(pairs, stage) for stage in runs[0].seconds}
    if decoded:
        seconds["tpot"] = _times([run for run, _ in decoded], "tpot")
        speedups["tpot"] = _speedup([(run, base) for run, base in decoded if base and base.steps > 1], "tpot")
    checked: Literal["ttft", "total"] = "total" if exact_length else "ttft"
    return CaseResult(
        case=case,
        positions=runs[0].positions,
        tokens=_tokens(once),
        short=sum(tokens.short for run in once for tokens in run.tokens),
        seconds=seconds,
        speedup={stage: speedup for stage, speedup in speedups.items() if speedup},
        saved={} if baseline is None else {stage: _saved(pairs, stage) for stage in SAVED},
        overhead=median(map(_overhead, runs)),
        decode_tokens_per_second=_decode_speed(runs),
        batch_decode_tokens_per_second=_batch_decode_speed(runs),
        samples_per_second=median(len(run.samples) / run.seconds["total"] for run in runs),
        memory=Memory(
            peak=_largest(run.peak for run in runs),
            kv_cache=int(fmean(run.kv_cache / len(run.samples) for run in once)),
            host=max(run.host for run in runs),
            reserved=reserved,
        ),
        flops=dict(flops),
        flop_coverage=coverage,
        gpu=summarise_states([run.gpu for run in runs if run.gpu], case.batch_size),
        checked=checked,
        outliers=outliers(seconds[checked].values),
        drift=drift(seconds[checked].values),
    )


def _times(runs: Sequence[TimedRun], stage: str) -> Times:
    repeated = any(len(run.repetitions["total"]) > 1 for run in runs)
    values = [_seconds_of(run, stage) for run in runs]
    return summarise(values, [_repetitions_of(run, stage) for run in runs] if repeated else ())


def _speedup(pairs: Sequence[tuple[TimedRun, TimedRun | None]], stage: str) -> Speedup | None:
    """The speedup of a stage over runs of the same round; None without a baseline, or where a stage took no time."""
    before = [_seconds_of(base, stage) for _, base in pairs if base]
    after = [_seconds_of(run, stage) for run, base in pairs if base]
    return paired_speedup(before, after) if before and min(*before, *after) > 0 else None


def _saved(pairs: Sequence[tuple[TimedRun, TimedRun | None]], stage: str) -> float:
    """Seconds of a stage that a case takes less than its baseline in the same round, median."""
    return median(base.seconds[stage] - run.seconds[stage] for run, base in pairs if base)


def _seconds_of(run: TimedRun, stage: str) -> float:
    """Seconds of a stage, or of decode per token after the first (`tpot`)."""
    return run.seconds["decode"] / (run.steps - 1) if stage == "tpot" else run.seconds.get(stage, 0.0)


def _repetitions_of(run: TimedRun, stage: str) -> list[float]:
    if stage == "tpot":
        return [seconds / (run.steps - 1) for seconds in run.repetitions["decode"]]
    return run.repetitions[stage]


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


def summarise_machine(rounds: Sequence[Sequence[TimedRun]]) -> MachineUse | None:
    """The CPUs over all rounds; None where their state was never read."""
    by_round = [[run.machine for run in runs if run.machine] for runs in rounds]
    states = [state for found in by_round for state in found]
    if not states or not sum(state.seconds for state in states):
        return None
    frequencies = [state.frequency for state in states if state.frequency is not None]
    return MachineUse(
        cpus=states[-1].cpus,
        cores=states[-1].cores,
        others=_per_second(states, "others"),
        others_by_round=[_per_second(found, "others") for found in by_round],
        stolen=_per_second(states, "stolen"),
        frequency=median(frequencies) if frequencies else None,
        frequency_drift=drift(frequencies),
    )


def _per_second(states: Sequence[MachineState], name: str) -> float:
    seconds = sum(state.seconds for state in states)
    return sum(getattr(state, name) for state in states) / seconds if seconds else 0.0


def _tokens(once: Sequence[TimedRun]) -> Tokens:
    counts = [tokens for run in once for tokens in run.tokens]
    return Tokens(
        total=fmean(c.total for c in counts),
        kept=fmean(c.kept for c in counts),
        text=fmean(c.text for c in counts),
        layer_average=fmean(c.layer_average for c in counts),
        new=fmean(run.steps for run in once),
        encoded=mean_encoded(counts),
    )


def mean_encoded(counts: Sequence[TokenCounts]) -> float | None:
    """Vision tokens that the encoder made, per sample; None where all images had their own size."""
    return fmean(sum(c.encoded) or c.total for c in counts) if any(c.encoded for c in counts) else None


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


def _batch_decode_speed(runs: Sequence[TimedRun]) -> float | None:
    """Tokens per second of all samples of a batch while decoding, without padding behind shorter answers."""
    counts = [(sum(run.new_tokens) - len(run.samples), run.seconds["decode"]) for run in runs if run.new_tokens]
    speeds = [tokens / seconds for tokens, seconds in counts if tokens > 0 and seconds > 0]
    return median(speeds) if speeds else None
