"""Profiles of several methods in 80 columns, a row for each case, and the device's ceilings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from mmtok_cli.report import tables
from mmtok_cli.report.cells import encoded_cell
from mmtok_cli.report.checks import (
    drift_notes,
    encoder_notes,
    flop_notes,
    kernel_notes,
    machine_notes,
    outlier_notes,
)
from mmtok_cli.report.columns import COMPARED, KEPT, OPTIONAL, STAGES, layers_differ, stages_of
from mmtok_cli.report.units import count, number, picture_size, plural, seconds, share, size, spread

if TYPE_CHECKING:
    from mmtok_cli.results.profile import Ceilings, ProfileResult
    from mmtok_cli.results.schema import CaseResult, Environment, Speedup, Times
    from mmtok_cli.settings import ProfileSettings

FAR_BELOW = 0.2  # share of the expected rate; virtual CPUs that share a core reach half of it
SIDE_BY_SIDE = 2  # cases that fit beside each other with their spread
ESTIMATED = ("prefill", "ttft", "decode", "total")  # if only some layers are run
SPEEDUPS = ("prefill", "ttft", "total")
MEMORY_STAGES = ("encode", "select", "prefill", "decode")
HELD_UP = "†"  # beside a speedup of which a stage is bound by launches


def profile_tables(profile: ProfileResult) -> list[Table]:
    """Seconds, tokens, memory and operations: a column for each case, or a row where there are many."""
    throughput = tables.throughput_table(profile.comparison)
    if len(profile.cases) <= SIDE_BY_SIDE:
        return [_stage_table(profile), throughput, _cost_table(profile)]
    return [_stages(profile), _speedups(profile), throughput, _tokens_and_memory(profile), _operations(profile)]


def head_lines(profile: ProfileResult) -> list[str]:
    """What was measured, if not the model as it is, and on which image."""
    schedule, fallback = profile.schedule, profile.environment.fallback
    lines = [f"{profile.model}: {fallback}"] if fallback else []
    if schedule.image_size:
        data = "a drawn scene" if schedule.data == "demo" else schedule.data
        sizes = schedule.batch_size if isinstance(schedule.batch_size, list) else [schedule.batch_size]
        frames = f"{schedule.sampling}, " if schedule.sampling else ""
        lines.append(
            f"{profile.model}: {data}, {picture_size(schedule.image_size)} pixels, {frames}"
            f"batch size {', '.join(map(str, sizes))}, {plural(schedule.rounds, 'round')}"
        )
    return lines


def profiles_by_batch_size(profile: ProfileResult) -> list[ProfileResult]:
    """The profile with the cases of one batch size at a time."""
    sizes = dict.fromkeys(result.case.batch_size for result in profile.cases)
    return [
        profile.model_copy(update={"cases": [r for r in profile.cases if r.case.batch_size == size]}) for size in sizes
    ]


def profile_notes(
    profile: ProfileResult, settings: ProfileSettings, planned_rounds: int, sizes: Sequence[int], context_length: int
) -> list[str]:
    """How to read the tables. sizes: the numbers of vision tokens that scaling was to be measured at."""
    from mmtok_cli.report.checks import draft_notes
    from mmtok_cli.report.scaling import scaling_notes

    rules = tables.rules_text(settings.rules, settings.parameters)
    lines = list(filter(None, [rules, tables.lengths_text(profile.schedule)]))
    lines += tables.equivalent_notes(profile.equivalents)
    for part in profiles_by_batch_size(profile):
        baseline, *others = part.cases
        head = f"batch size {baseline.case.batch_size}: " if len(settings.batch_size) > 1 else ""
        notes = [
            *tables.ceilings(part.cases),
            *draft_notes(part.cases),
            *tables.layer_notes(part.cases),
            *outlier_notes(part.cases, profile.machine),
            *drift_notes(part.cases),
            *tables.inconclusive_notes(others, COMPARED if len(part.cases) <= SIDE_BY_SIDE else SPEEDUPS),
        ]
        lines += [head + note for note in notes]
    lines += tables.largest_batch_notes(profile.cases)
    lines += [*machine_notes(profile.machine, profile.environment), *kernel_notes(profile.environment)]
    lines += [*launch_notes(profile), *encoder_notes(profile.cases), *ceiling_notes(profile)]
    lines += flop_notes(profile.cases)
    if sizes:
        lines += scaling_notes(profile, context_length)
    if profile.schedule.rounds < planned_rounds:
        lines.append(f"interrupted: {profile.schedule.rounds} of {planned_rounds} rounds were timed")
    elif profile.interrupted and not sizes:
        lines.append("interrupted: not all traces and ceilings were measured")
    if sizes and profile.interrupted:
        reached = len({point.tokens for point in profile.scaling})
        lines.append(f"interrupted: {reached} of {len(sizes)} numbers of tokens were measured")
    return lines


def _stage_name(stage: str, environment: Environment) -> str:
    """What a stage is called; "~" marks an estimate."""
    return ("~ " if environment.layers and stage in ESTIMATED else "") + tables.SUMS.get(stage, stage)


def _stage_table(profile: ProfileResult) -> Table:
    """Stages x cases: median seconds, their spread, and speedup over the baseline."""
    table = tables.plain_table("Seconds per stage: median (p10–p90)")
    baseline, *others = profile.cases
    table.add_column("stage", no_wrap=True)
    table.add_column(baseline.case.label, justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for case in others:
        table.add_column(case.case.label, justify="right", no_wrap=True)
        table.add_column("speedup of stage", justify="right")
    for stage in stages_of(case.seconds for case in profile.cases):
        times = baseline.seconds.get(stage)
        row: list[str | Text] = [
            _stage_name(stage, profile.environment),
            _spread(times),
            share(times.median / baseline.seconds["total"].median) if times else "–",
        ]
        for case in others:
            gain = case.speedup.get(stage) if stage in COMPARED else None
            row += [_spread(case.seconds.get(stage)), _speedup(profile, case, stage, gain)]
        table.add_row(*row, style="bold" if stage in tables.SUMS else "")
    return table


def _cost_table(profile: ProfileResult) -> Table:
    """Tokens, memory and operations of each case."""
    cases = profile.cases
    table = tables.plain_table("Tokens, memory, operations")
    table.add_column("", no_wrap=True)
    for case in cases:
        table.add_column(case.case.label, justify="right")
    table.add_row("vision tokens kept", *(str(KEPT.cell_of(case)) for case in cases))
    if any(case.tokens.encoded for case in cases):
        table.add_row("vision tokens encoded", *(str(encoded_cell(case)) for case in cases))
    if layers_differ(case.tokens for case in cases):
        table.add_row("layer average", *(number(round(case.tokens.layer_average, 1)) for case in cases))
    table.add_row("text tokens", *(number(case.tokens.text) for case in cases))
    table.add_row("new tokens", *(number(case.tokens.new) for case in cases))
    table.add_row("KV cache", *(size(case.memory.kv_cache) for case in cases))
    if any(case.memory.peak is not None for case in cases):
        table.add_row("peak above weights", *(size(case.memory.peak) for case in cases))
    for stage in STAGES:
        if any(stage in peaks for peaks in profile.stage_peaks.values()):
            peaks = (_peak(profile, case, stage) for case in cases)
            table.add_row(f"peak in {stage} (trace)", *(size(peak) for peak in peaks))
    for stage in ("encode", "select", "prefill"):
        table.add_row(f"FLOPs in {stage}", *(_flops(case, stage) for case in cases))
    return table


def _stages(profile: ProfileResult) -> Table:
    stages = stages_of(case.seconds for case in profile.cases)
    headings = [_stage_name(stage, profile.environment) for stage in stages]
    rows = [(case.case.label, *(_median(case, stage) for stage in stages)) for case in profile.cases]
    return wrapped_table("Seconds per stage: medians", headings, rows)


def _median(case: CaseResult, stage: str) -> str:
    return seconds(case.seconds[stage].median) if stage in case.seconds else "–"


def _speedups(profile: ProfileResult) -> Table:
    baseline, *others = profile.cases
    stages = ("encode", *SPEEDUPS) if _scaled(others) else SPEEDUPS
    rows: list[tuple[str | Text, ...]] = [
        (r.case.label, *(_speedup(profile, r, stage, r.speedup.get(stage)) for stage in stages)) for r in others
    ]
    return wrapped_table(f"Speedup over {baseline}", [tables.SUMS.get(stage, stage) for stage in stages], rows)


def _speedup(profile: ProfileResult, case: CaseResult, stage: str, gain: Speedup | None) -> Text:
    """A speedup over the first case, marked where launches hold up this stage of either."""
    text, labels = tables.speedup_text(gain), (case.case.label, profile.cases[0].case.label)
    held = any(one.stage == stage and one.case in labels for one in profile.launch_bound)
    return text.append(HELD_UP) if held and gain else text


def launch_notes(profile: ProfileResult) -> list[str]:
    """Which stages are bound by launches, if any are."""
    from mmtok_cli.results.profile import LAUNCH_BOUND

    stages: dict[str, list[str]] = defaultdict(list)
    for one in profile.launch_bound:
        stages[one.stage].append(f"{one.case} {share(one.share)} ({plural(one.launches, 'launch', 'launches')})")
    return [
        f"{HELD_UP} {stage} is bound by launches, not by work: kernels take less than {LAUNCH_BOUND:.0%} of its time, "
        f"{', '.join(cases)}. Fewer tokens hardly shorten such a stage, and on a faster GPU even less"
        for stage, cases in stages.items()
    ]


def _scaled(cases: Sequence[CaseResult]) -> bool:
    """Whether any of the cases encodes smaller images."""
    return any(case.case.image_scale is not None for case in cases)


def _tokens_and_memory(profile: ProfileResult) -> Table:
    with_peaks = any(case.memory.peak is not None for case in profile.cases)
    possible = (*OPTIONAL, *MEMORY_STAGES)
    stages = [stage for stage in possible if any(stage in peaks for peaks in profile.stage_peaks.values())]
    scaled = _scaled(profile.cases)
    headings = ["kept", *(["encoded"] if scaled else []), "avg", "KV cache", *(["peak"] if with_peaks else []), *stages]
    of_stages = f"; peaks within {', '.join(stages)} (trace)" if stages else ""
    rows = []
    for case in profile.cases:
        peaks = [size(case.memory.peak)] if with_peaks else []
        within = [size(_peak(profile, case, stage)) for stage in stages]
        encoded = [str(encoded_cell(case))] if scaled else []
        average = number(round(case.tokens.layer_average, 1))
        cache = size(case.memory.kv_cache)
        rows.append((case.case.label, number(case.tokens.kept), *encoded, average, cache, *peaks, *within))
    return wrapped_table(f"Vision tokens and memory{of_stages}", headings, rows)


def _operations(profile: ProfileResult) -> Table:
    further = (stage for stage in OPTIONAL if any(stage in (case.flops or ()) for case in profile.cases))
    stages = (*further, *MEMORY_STAGES)
    rows = []
    for case in profile.cases:
        flops = (_flops(case, stage) for stage in stages)
        rows.append((case.case.label, *flops, number(case.tokens.text), number(case.tokens.new)))
    return wrapped_table("FLOPs, and tokens of the text", [*stages, "text tokens", "new tokens"], rows)


def _peak(profile: ProfileResult, case: CaseResult, stage: str) -> int | None:
    return profile.stage_peaks.get(case.case.label, {}).get(stage)


def _flops(case: CaseResult, stage: str) -> str:
    return count(case.flops[stage]) if case.flops and stage in case.flops else "–"


def ceiling_table(profile: ProfileResult, ceilings: Ceilings) -> Table:
    """FLOP/s of each stage and bytes/s of decoding, and what share of the device's ceilings that is."""
    stages = ("encode", "select", "prefill")
    rows = []
    for case in profile.achieved:
        name = case.case.label
        flops = [_of_ceiling(case.flops_per_second.get(stage), ceilings.flops_per_second) for stage in stages]
        rows.append((name, *flops, _of_ceiling(case.decode_bytes_per_second, ceilings.bytes_per_second)))
    headings = [f"{stage} FLOP/s" for stage in stages] + ["decode B/s"]
    table = wrapped_table("Against the device's ceilings", headings, rows)
    ceiling = count(ceilings.flops_per_second)
    table.add_row("the device", *[ceiling] * len(stages), count(ceilings.bytes_per_second), style="bold")
    return table


def ceiling_notes(profile: ProfileResult) -> list[str]:
    """What the ceilings are, if they were measured."""
    c = profile.ceilings
    if c is None:
        return ["the device's ceilings were not measured"]
    kind = f"{c.dtype}, as TF32" if c.tf32 else c.dtype
    each = zip(profile.cases, profile.achieved, strict=False)
    unknown = any(case.tokens.new > 1 and rates.decode_bytes_per_second is None for case, rates in each)
    return [
        f"ceilings, measured in this run: the product of two matrices of {c.rows} x {c.rows} ({kind}), and a copy of "
        f"{size(c.copied)}, read and written",
        f"decode B/s: the {size(profile.weights_read)} of the language model's weights that every decoded token reads, "
        "without the KV cache. FLOPs of select are those of matrix products alone",
        *(["decode B/s of a batch is unknown: how many experts it reads depends on its tokens"] if unknown else []),
        *_low_ceiling(c),
    ]


def _low_ceiling(ceilings: Ceilings) -> list[str]:
    """A warning if the matrix product is far slower than the processor should be."""
    expected, found = ceilings.expected_flops_per_second, ceilings.flops_per_second
    if expected is None or found >= FAR_BELOW * expected:
        return []
    return [
        f"the matrix product reached {count(found)} FLOP/s, {found / expected:.0%} of the {count(expected)} or so that "
        "cores, frequency and instruction set let expect: another process, a limit on CPU time or too few cores hold "
        "it back. Close other programs, check the limits of the container or job, and run again"
    ]


def _of_ceiling(value: float | None, ceiling: float) -> str:
    if value is None:
        return "–"
    percent = 100 * value / ceiling
    return f"{count(value)}, {percent:.{0 if percent >= 9.95 else 1}f}%"


def wrapped_table(title: str, headings: Sequence[str], rows: Sequence[tuple[str | Text, ...]]) -> Table:
    """A table that a narrow terminal shows with its labels and headings wrapped, so that no figure is cut off."""
    table = tables.plain_table(title)
    table.add_column("")
    for place, heading in enumerate(headings, 1):
        words = [*heading.split(), *(row[place] for row in rows if isinstance(row[place], str))]
        table.add_column(heading, justify="right", min_width=max(map(len, words)))
    for row in rows:
        table.add_row(*row)
    return table


def _spread(times: Times | None) -> str:
    return "–" if times is None else spread(times.median, times.p10, times.p90)
