"""Results as tables that fit 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmtok_cli.report.units import count, number, ratio, seconds, share, size, spread

if TYPE_CHECKING:
    from mmtok_cli.results.records import TimedRun
    from mmtok_cli.results.schema import CaseResult, Comparison, Environment, Operator, Profile, Speedup, Times
    from mmtok_cli.rules import Rules

STAGE_NAMES = ("prepare", "encode", "select", "prefill", "ttft", "decode", "total")
COMPARED = tuple(stage for stage in STAGE_NAMES if stage != "select")  # the baseline has nothing to select
SUMS = {"ttft": "first token", "total": "total"}
ESTIMATED = ("prefill", "ttft", "decode", "total")  # where not all layers are run
Column = tuple[str, Callable[["CaseResult"], "str | Text"]]


def plain_table(title: str = "") -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )


def speedup_text(speedup: Speedup | None) -> Text:
    """ "1.87x 1.80–1.93", dimmed with a question mark where the interval contains 1 or there is none."""
    if speedup is None:
        return Text("–", style="dim")
    interval = "" if speedup.low is None else f" {ratio(speedup.low)}–{ratio(speedup.high or 0)}"
    if speedup.conclusive:
        return Text(f"{ratio(speedup.median)}x{interval}")
    return Text(f"{ratio(speedup.median)}x{interval}?", style="dim")


def is_baseline(result: CaseResult) -> bool:
    """Whether a case is the unreduced one that the others are measured against."""
    return result.case.is_baseline


def by_batch_size(comparison: Comparison) -> list[Comparison]:
    """The comparison itself where there is one batch size, else the part of each."""
    sizes = comparison.schedule.batch_size
    if isinstance(sizes, int):
        return [comparison]
    return [
        comparison.model_copy(
            update={
                "schedule": comparison.schedule.model_copy(update={"batch_size": size}),
                "results": [result for result in comparison.results if result.case.batch_size == size],
                "failures": [failed for failed in comparison.failures if failed.case.batch_size == size],
            }
        )
        for size in sizes
    ]


def speed_table(comparison: Comparison) -> Table:
    """Methods x budgets: tokens, seconds and speedups; and what failed."""
    table = case_table(
        "Speed",
        comparison.results,
        [
            ("select", lambda r: seconds(r.seconds["select"].median)),
            ("prefill", lambda r: seconds(r.seconds["prefill"].median)),
            ("speedup (prefill)", lambda r: speedup_text(r.speedup.get("prefill"))),
            ("TTFT", lambda r: seconds(r.seconds["ttft"].median)),
            ("speedup (TTFT)", lambda r: speedup_text(r.speedup.get("ttft"))),
        ],
    )
    for failed in comparison.failures:
        kept = "–" if failed.case.budget is None else failed.case.budget
        table.add_row(failed.case.title, kept, "–", "–", Text(failed.reason, style="red"), "–", "–")
    return table


def layer_notes(results: Sequence[CaseResult]) -> list[str]:
    """What the layer average is, where it is shown."""
    if not layers_differ((r.tokens.kept, r.tokens.layer_average) for r in results):
        return []
    return [
        "layer average (avg): vision tokens per decoder layer; methods inside the language model make the first layers "
        "see all"
    ]


def rules_text(rules: Rules, settings: Sequence[str] | None = None) -> str:
    """The rules in words, as far as they are not the usual ones, and what was set of the methods' parameters."""
    said = [] if rules.track == "released" else [f"{rules.track} track"]
    if rules.positions:
        said.append("positions kept" if rules.positions == "keep" else "positions counted anew")
    if rules.budget_means == "layer-average":
        said.append("budgets are layer averages")
    return ", ".join([*said, *(settings or ())])


def weights_text(weights: str) -> str:
    """A warning about answers that mean nothing; empty for a model that has learnt something."""
    return "random weights: answers and scores mean nothing, time and memory do" if weights == "random" else ""


def part_text(layers: tuple[int, int] | None) -> str:
    """A warning about estimates; empty where all decoder layers were run."""
    if layers is None:
        return ""
    run, of = layers
    return (
        f"{run} of {of} decoder layers were run, so answers mean nothing, and prefill, decode, their sums, KV cache "
        "and FLOPs are estimates (~): each missing layer is taken for as costly as the last one that was run. Peaks "
        "are those of the layers that were run"
    )


def inconclusive_notes(results: Sequence[CaseResult], stages: Sequence[str]) -> list[str]:
    """What a question mark behind a speedup means, if there is one."""
    found = [(str(r), stage, r.speedup[stage]) for r in results for stage in stages if stage in r.speedup]
    doubtful = [(name, stage, speedup) for name, stage, speedup in found if not speedup.conclusive]
    if not doubtful:
        return []
    if any(speedup.low is None for _, _, speedup in doubtful):
        return ["? marks an inconclusive speedup: fewer than six rounds say nothing. Measure more of them"]
    by_case: dict[str, list[str]] = defaultdict(list)
    for name, stage, _ in doubtful:
        by_case[name].append(SUMS.get(stage, stage))
    which = "; ".join(f"{name} ({', '.join(stages)})" for name, stages in by_case.items())
    return [
        f"? marks an inconclusive speedup, one whose interval contains 1: {which}. Measure more rounds, or quieten the "
        "machine"
    ]


def ceiling(baseline: CaseResult) -> str:
    """The most that a method behind the encoder could gain on the time to the first token: prefill for nothing."""
    median = {stage: times.median for stage, times in baseline.seconds.items()}
    before, prefill = median["prepare"] + median["encode"], median["prefill"]
    return (
        f"prepare and encode take {seconds(before)} of {seconds(before + prefill)} to the first token: "
        f"no method behind the encoder can gain more than {(before + prefill) / before:.2f}x there"
    )


def environment_line(model: str, environment: Environment) -> Text:
    """What the figures were measured on."""
    e = environment
    commit = f", git {e.git_commit[:9]}{' (changed)' if e.git_dirty else ''}" if e.git_commit else ""
    driver = f", driver {e.driver}" if e.driver else ""
    threads = "1 thread" if e.threads == 1 else f"{e.threads} threads"
    remarks = "".join(f"; {text}" for text in (weights_text(e.weights), part_text(e.layers)) if text)
    return Text(
        f"{model} on {e.processor} ({e.device}, {e.dtype}, {e.attention} attention, {threads}), "
        f"torch {e.torch}, transformers {e.transformers}, mmtok {e.mmtok}{commit}{driver}{remarks}",
        style="dim",
    )


def stage_name(stage: str, environment: Environment) -> str:
    """What a stage is called; "~" marks an estimate."""
    return ("~ " if environment.layers and stage in ESTIMATED else "") + SUMS.get(stage, stage)


def stage_table(profile: Profile) -> Table:
    """Stages x cases: median seconds, their spread, and speedup over the baseline."""
    table = plain_table("Seconds per stage: median (p10–p90)")
    baseline, *others = profile.cases
    table.add_column("stage", no_wrap=True)
    table.add_column(str(baseline), justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for case in others:
        table.add_column(str(case), justify="right", no_wrap=True)
        table.add_column("speedup of stage", justify="right")
    for stage in STAGE_NAMES:
        times = baseline.seconds[stage]
        row: list[str | Text] = [
            stage_name(stage, profile.environment),
            _spread(times),
            share(times.median / baseline.seconds["total"].median),
        ]
        for case in others:
            gain = case.speedup.get(stage) if stage in COMPARED else None
            row += [_spread(case.seconds[stage]), speedup_text(gain)]
        table.add_row(*row, style="bold" if stage in SUMS else "")
    return table


def cost_table(profile: Profile) -> Table:
    """Tokens, memory and operations of each case."""
    cases = profile.cases
    table = plain_table("Tokens, memory, operations")
    table.add_column("", no_wrap=True)
    for case in cases:
        table.add_column(str(case), justify="right")
    table.add_row("vision tokens kept", *(_tokens(case) for case in cases))
    if layers_differ((case.tokens.kept, case.tokens.layer_average) for case in cases):
        table.add_row("layer average", *(number(round(case.tokens.layer_average, 1)) for case in cases))
    table.add_row("text tokens", *(number(case.tokens.text) for case in cases))
    table.add_row("new tokens", *(number(case.tokens.new) for case in cases))
    table.add_row("KV cache", *(size(case.memory.kv_cache) for case in cases))
    if any(case.memory.peak is not None for case in cases):
        table.add_row("peak above weights", *(size(case.memory.peak) for case in cases))
    for stage in STAGE_NAMES:
        if any(stage in peaks for peaks in profile.stage_peaks.values()):
            peaks = (profile.stage_peaks[str(case)].get(stage) for case in cases)
            table.add_row(f"peak in {stage} (trace)", *(size(peak) for peak in peaks))
    for stage in ("encode", "select", "prefill"):
        table.add_row(f"FLOPs in {stage}", *(count(case.flops[stage]) for case in cases))
    return table


def operator_table(operators: Sequence[Operator], top: int) -> Table:
    """The operators of one case that take longest themselves, by stage."""
    table = plain_table(f"Top operators of {operators[0].case} (from the trace)")
    table.add_column("stage", no_wrap=True)
    table.add_column("operator")
    for heading in ("calls", "CPU", "device"):
        table.add_column(heading, justify="right")
    for stage in STAGE_NAMES:
        for rank, operator in enumerate([o for o in operators if o.stage == stage][:top]):
            device = seconds(operator.device_seconds) if operator.device_seconds else "–"
            first = stage if rank == 0 else ""
            table.add_row(first, operator.name, str(operator.calls), seconds(operator.cpu_seconds), device)
    return table


def answer_table(names: Sequence[str], runs: Sequence[TimedRun]) -> Table:
    """Tokens and seconds of each stage, a column for each case."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("vision tokens kept", *(f"{r.tokens[0].kept}/{r.tokens[0].total}" for r in runs))
    if layers_differ((run.tokens[0].kept, run.tokens[0].layer_average) for run in runs):
        table.add_row("layer average", *(number(round(run.tokens[0].layer_average, 1)) for run in runs))
    table.add_row("text tokens", *(str(run.tokens[0].text) for run in runs))
    table.add_row("new tokens", *(str(run.steps) for run in runs))
    for stage in STAGE_NAMES:
        style = "bold" if stage in SUMS else ""
        table.add_row(SUMS.get(stage, stage), *(seconds(run.seconds[stage]) for run in runs), style=style)
    if any(run.peak is not None for run in runs):
        table.add_row("peak above weights", *(size(run.peak) for run in runs))
    table.add_row("KV cache", *(size(run.kv_cache) for run in runs))
    return table


def case_table(title: str, results: Sequence[CaseResult], columns: Sequence[Column], *, tight: bool = False) -> Table:
    """A row for each case; `tight` saves a space between columns."""
    table = plain_table(title)
    table.padding = (0, 0 if tight else 1, 0, 0)
    table.add_column("method", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=not heading.startswith("speedup"))
    for result in results:
        style = "bold" if is_baseline(result) else ""
        table.add_row(result.case.title, _tokens(result), *(cell(result) for _, cell in columns), style=style)
    return table


def layers_differ(tokens: Iterable[tuple[float, float]]) -> bool:
    """Whether the tokens kept and their layer average differ anywhere, so that the average says something."""
    return any(abs(average - kept) > 0.05 for kept, average in tokens)


def _tokens(result: CaseResult) -> str:
    return f"{number(result.tokens.kept)}/{number(result.tokens.total)}"


def _spread(times: Times) -> str:
    return spread(times.median, times.p10, times.p90)
