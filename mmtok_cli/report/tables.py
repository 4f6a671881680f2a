"""Results as tables that fit 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmtok_cli.report.cells import Cell, Column, speedup_cell
from mmtok_cli.report.columns import (
    COMPARED,
    KEPT,
    OPTIONAL,
    STAGES,
    kind_columns,
    layers_differ,
    stages_of,
    terminal_columns,
)
from mmtok_cli.report.text import printable
from mmtok_cli.report.units import number, plural, seconds, size
from mmtok_cli.rules import FIXED
from mmtok_cli.stages import DECODE_VIDEO, PREVIEW

if TYPE_CHECKING:
    from mmtok_cli.budget import TokenCounts
    from mmtok_cli.planning import Estimate
    from mmtok_cli.results.profile import Operator
    from mmtok_cli.results.records import TimedRun
    from mmtok_cli.results.schema import CaseResult, Comparison, Environment, Schedule, Speedup
    from mmtok_cli.rules import Rules

SUMS = {"ttft": "first token", "total": "total"}
STAGE_TITLES = SUMS | {"tpot": "TPOT"}  # of stages that the tables call by another name
LONGEST_NAME = 20  # of a case, that is never wrapped


def plain_table(title: str = "") -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )


def add_names(table: Table, names: Sequence[str]) -> None:
    """The column of the cases' names. Long ones are wrapped in a narrow terminal, so that no figure is cut off."""
    short = max(map(len, names), default=0) <= LONGEST_NAME
    table.add_column("method", no_wrap=short, overflow="ellipsis" if short else "fold")


def speedup_text(speedup: Speedup | None) -> Text:
    """A speedup as the terminal shows it."""
    return narrow_text(speedup_cell(speedup))


def narrow_text(cell: Cell) -> Text:
    """ "1.87x 1.80–1.93"; dimmed where it is doubtful, which a question mark says, or missing."""
    interval = f" {cell.interval}" if cell.interval else ""
    text = f"{cell.text}{interval}{'?' if cell.doubtful else ''}"
    return Text(text, style="dim" if cell.doubtful or cell.value is None else "")


def by_batch_size(comparison: Comparison) -> list[Comparison]:
    """The comparison itself if it has one batch size, else one comparison for each."""
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


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Everything that is shown of one batch size: speed with what failed, quality, fidelity and costs, kinds."""
    tables = [speed_table(comparison)]
    if not comparison.results:
        return tables
    if scale := terminal_columns(comparison, "scale"):
        tables.append(case_table("Smaller images", comparison, scale))
    if terminal_columns(comparison, "throughput"):
        tables.append(throughput_table(comparison))
    if quality := terminal_columns(comparison, "quality"):
        metric = comparison.schedule.metric
        tables.append(case_table(f"Quality (metric: {metric})" if metric else "Quality", comparison, quality))
    if yes_no := terminal_columns(comparison, "yes-no"):
        tables.append(case_table("Yes or no", comparison, yes_no))
    if groups := terminal_columns(comparison, "groups"):
        tables.append(
            case_table("Correct answers where resize fails (A) and where it does not (B)", comparison, groups)
        )
    tables.append(cost_and_fidelity_table(comparison))
    if (kinds := kind_columns(comparison)) and not comparison.tasks:
        counts = next(result.score_counts for result in comparison.results if result.score_counts)
        asked = ", ".join(f"{total} {kind}" for kind, (_, total) in counts.by_kind.items())
        tables.append(case_table(f"Score by kind of question ({asked})", comparison, kinds))
    return tables


def speed_table(comparison: Comparison) -> Table:
    """Methods x budgets: tokens, seconds and speedups; and what failed."""
    columns = terminal_columns(comparison, "speed")
    table = case_table("Speed", comparison, columns)
    widest = next(i for i, column in enumerate(columns) if column.narrow)  # wide enough for the reason of a failure
    for failed in comparison.failures:
        cells = [Text(failed.reason, style="red") if i == widest else "–" for i in range(len(columns))]
        table.add_row(failed.case.title, failed.case.budget or "–", *cells)
    return table


def throughput_table(comparison: Comparison) -> Table:
    """Methods x budgets: time per output token, tokens and samples per second."""
    columns = terminal_columns(comparison, "throughput")
    return case_table("Throughput", comparison, columns, tight=len(columns) > 4)


def cost_and_fidelity_table(comparison: Comparison) -> Table:
    """Methods x budgets: closeness to the unreduced model, memory and operations."""
    columns = terminal_columns(comparison, "cost")
    close = any(result.fidelity for result in comparison.results)
    title = "Fidelity, memory, operations" if close else "Memory, operations"
    return case_table(title, comparison, columns, tight=len(columns) > 5)


def case_table(title: str, comparison: Comparison, columns: Sequence[Column], *, tight: bool = False) -> Table:
    """A row for each case that was measured; `tight` saves a space between columns."""
    table = plain_table(title)
    table.padding = (0, 0 if tight else 1, 0, 0)
    add_names(table, [result.case.title for result in comparison.results])
    table.add_column("kept", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=not column.narrow)
    for result in comparison.results:
        cells = [(column, column.cell_of(result)) for column in columns]
        texts = [narrow_text(cell) if column.narrow else str(cell) for column, cell in cells]
        style = "bold" if result.case.is_baseline else ""
        table.add_row(result.case.title, str(KEPT.cell_of(result)), *texts, style=style)
    return table


def layer_notes(results: Sequence[CaseResult]) -> list[str]:
    """Explains the layer average, if it is shown."""
    if not layers_differ(result.tokens for result in results):
        return []
    return [
        "layer average (avg): vision tokens per decoder layer; methods inside the language model process all tokens "
        "in its first layers"
    ]


def largest_batch_notes(results: Sequence[CaseResult]) -> list[str]:
    """How the largest batches were found, if they were."""
    found = [result.largest_batch for result in results if result.largest_batch]
    if not found:
        return []
    free = size(min(each.free for each in found))
    if all(each.measured for each in found):
        return [f"largest batch: run on this device, with {free} free beside the weights; 3 % more may fit"]
    return [
        f"largest batch: computed (~) from the peak memory of batches of 1 and 2, with {free} free beside the weights"
    ]


def rules_text(rules: Rules, settings: Sequence[str] | None = None) -> str:
    """The rules in words where they differ from the defaults, and the parameters given by --set."""
    said = [] if rules.track == "released" else [f"{rules.track} track"]
    if rules.positions:
        said.append("positions kept" if rules.positions == "keep" else "positions renumbered")
    if rules.budget_means == "layer-average":
        said.append("budgets are layer averages")
    if rules.budget_per == "frame":
        said.append("budgets spread over frames")
    return ", ".join([*said, *map(printable, settings or ())])


def encoded_text(tokens: TokenCounts) -> str:
    """Vision tokens of each image as it was encoded, of those at their own size: "144/576", "100+144/1152"."""
    return f"{'+'.join(map(str, tokens.encoded)) or tokens.total}/{tokens.total}"


SHORT = "the budget is not met: the other tokens are padding, there are no more, or a video cannot be made smaller"


def short_text(tokens: TokenCounts) -> str:
    """Why fewer or more tokens are kept than the budget says, if so."""
    return SHORT if tokens.short else ""


def equivalent_notes(equivalents: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Budgets that are shares, as settings of engines that say how much is removed."""
    return [
        f"a budget of {budget} corresponds to video_pruning_rate {settings['vllm.video_pruning_rate']:g} of vLLM and "
        f"pruning_ratio {settings['openvino.pruning_ratio']:g} of OpenVINO"
        for budget, settings in equivalents.items()
    ]


def lengths_text(schedule: Schedule | Estimate) -> str:
    """The lengths of prompts and answers in timed runs, if they were fixed."""
    said = [] if schedule.prompt_tokens is None else [f"prompts of {schedule.prompt_tokens} text tokens"]
    if schedule.new_tokens is not None:
        said.append(f"exactly {plural(schedule.new_tokens, 'new token')}")
    return "timed with " + ", ".join(said) if said else ""


def weights_text(weights: str) -> str:
    """A warning for a model with random weights; empty for a trained one."""
    return "random weights: only time and memory are meaningful" if weights == "random" else ""


def part_text(layers: tuple[int, int] | None) -> str:
    """A warning about estimates; empty if all decoder layers were run."""
    if layers is None:
        return ""
    run, of = layers
    return (
        f"only {run} of {of} decoder layers were run: answers are not meaningful; prefill, decode, TTFT, TPOT, total, "
        "throughput, KV cache and FLOPs are estimates (~), assuming that skipped layers cost as much as the last ones "
        "that were run. Peak memory is that of the layers that were run"
    )


def linear_text(layers: int) -> str:
    """What linear attention means for the KV cache; empty for models without it."""
    if not layers:
        return ""
    return f"{layers} decoder layers have linear attention and a state of fixed size: only the others cache fewer rows"


def measured_text(environment: Environment) -> str:
    """What was measured in place of a whole, trained model, in short; empty if it was one."""
    e = environment
    part = f"{e.layers[0]} of {e.layers[1]} decoder layers measured, the rest estimated" if e.layers else ""
    return e.fallback or "; ".join(filter(None, (weights_text(e.weights), part)))


def inconclusive_notes(results: Sequence[CaseResult], stages: Sequence[str] = COMPARED) -> list[str]:
    """Explains the question mark after a speedup, if there is one."""
    found = [(str(r), stage, r.speedup[stage]) for r in results for stage in stages if stage in r.speedup]
    doubtful = [(name, stage, speedup) for name, stage, speedup in found if not speedup.conclusive]
    if not doubtful:
        return []
    if any(speedup.low is None for _, _, speedup in doubtful):
        return ["? marks an inconclusive speedup: fewer than six rounds give no interval. Raise --rounds to 6 or more"]
    by_case: dict[str, list[str]] = defaultdict(list)
    for name, stage, _ in doubtful:
        by_case[name].append(STAGE_TITLES.get(stage, stage))
    which = "; ".join(f"{name} ({', '.join(stages)})" for name, stages in by_case.items())
    return [
        f"? marks an inconclusive speedup, one whose interval contains 1: {which}. Raise --rounds, or close "
        "other programs and run again"
    ]


def ceiling(baseline: CaseResult) -> str:
    """The upper bound of the TTFT speedup of methods after the encoder, reached if prefill took no time."""
    before, prefill = _before_and_prefill(baseline)
    return (
        f"{_named(_before(baseline))} take {seconds(before)} of {seconds(before + prefill)} to the first token: "
        f"methods after the encoder can reach a speedup (TTFT) of {speedup_bound(baseline):.2f}x at most"
    )


def ceilings(results: Sequence[CaseResult]) -> list[str]:
    """The ceiling of each baseline, and the same at each scale of the images."""
    lines = []
    for baseline in results:
        if not baseline.case.is_baseline or not baseline.seconds:
            continue
        lines.append(ceiling(baseline))
        scaled = [r for r in results if r.case.run == baseline.case.run and r.case.image_scale is not None]
        first = {r.case.image_scale: r for r in reversed(scaled) if r.seconds and r.case.draft is None}
        lines += [_ceiling_at(result, baseline) for result in reversed(first.values())]
    return lines


def _ceiling_at(result: CaseResult, baseline: CaseResult) -> str:
    """The upper bound of the TTFT speedup of methods after the encoder that sees smaller images."""
    stages = _before(result)
    before = sum(stages.values())
    return (
        f"at scale {result.case.image_scale}, {_named(stages)} take {seconds(before)}: methods after the encoder can "
        f"reach a speedup (TTFT) of {sum(_before_and_prefill(baseline)) / before:.2f}x at most"
    )


def speedup_bound(baseline: CaseResult) -> float:
    """The speedup (TTFT) of a method after the encoder if neither selection nor prefill took any time."""
    before, prefill = _before_and_prefill(baseline)
    return (before + prefill) / before


def _before_and_prefill(baseline: CaseResult) -> tuple[float, float]:
    return sum(_before(baseline).values()), baseline.seconds["prefill"].median


def _before(result: CaseResult) -> dict[str, float]:
    """Median seconds of the stages up to the encoder's."""
    stages = (DECODE_VIDEO, PREVIEW, "prepare", "encode")
    return {stage: result.seconds[stage].median for stage in stages if stage in result.seconds}


def _named(stages: Collection[str]) -> str:
    *first, last = stages
    return f"{', '.join(first)} and {last}"


def settings_text(environment: Environment) -> str:
    """Data type, quantization, attention kernel and whether the language model was compiled."""
    e = environment
    quantized = f" quantized to {e.quantization}" if e.quantization else ""
    compiled = ", compiled" if e.compiled else ""
    pixels = pixels_text(e.pixels)
    return f"{e.dtype}{quantized}, {attention_text(e)}{compiled}" + (f", {pixels}" if pixels else "")


def attention_text(environment: Environment) -> str:
    """The attention kernels."""
    encoder = environment.encoder_attention
    return f"{environment.attention} attention" + (f" ({encoder} in the encoder)" if encoder else "")


def pixels_text(pixels: str | None) -> str:
    """The resolution of images in words; empty for models of fixed resolution."""
    if not pixels:
        return ""
    if pixels.startswith(FIXED):
        return f"images scaled to about {pixels.removeprefix(FIXED)} vision tokens each ({pixels})"
    return f"images at {pixels} resolution"


def environment_line(model: str, environment: Environment) -> Text:
    """What the results were measured on: hardware, versions and settings."""
    e = environment
    commit = f", git {e.git_commit[:9]}{' (changed)' if e.git_dirty else ''}" if e.git_commit else ""
    driver = f", driver {e.driver}" if e.driver else ""
    said = (linear_text(e.linear_layers), weights_text(e.weights), part_text(e.layers))
    remarks = "".join(f"; {text}" for text in said if text)
    return Text(
        f"{model} on {e.processor} ({e.device}, {settings_text(e)}, {plural(e.threads, 'thread')}), "
        f"torch {e.torch}, transformers {e.transformers}, mmtok {e.mmtok}{commit}{driver}{remarks}",
        style="dim",
    )


def operator_table(operators: Sequence[Operator], top: int) -> Table:
    """The operators of one case with the longest times of their own, by stage."""
    table = plain_table(f"Top operators of {operators[0].case} (from the trace)")
    table.add_column("stage", no_wrap=True)
    table.add_column("operator")
    for heading in ("calls", "CPU", "device"):
        table.add_column(heading, justify="right")
    for stage in (*OPTIONAL, *STAGES):
        for rank, operator in enumerate([o for o in operators if o.stage == stage][:top]):
            device = seconds(operator.device_seconds) if operator.device_seconds else "–"
            first = stage if rank == 0 else ""
            table.add_row(first, operator.name, str(operator.calls), seconds(operator.cpu_seconds), device)
    return table


def answer_table(names: Sequence[str], runs: Sequence[TimedRun]) -> Table:
    """Tokens, and seconds of each stage; one column for each case."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("vision tokens kept", *(f"{r.tokens[0].kept}/{r.tokens[0].total}" for r in runs))
    if any(run.tokens[0].encoded for run in runs):
        table.add_row("vision tokens encoded", *map(encoded_text, (run.tokens[0] for run in runs)))
    if layers_differ(run.tokens[0] for run in runs):
        table.add_row("layer average", *(number(round(run.tokens[0].layer_average, 1)) for run in runs))
    table.add_row("text tokens", *(str(run.tokens[0].text) for run in runs))
    table.add_row("new tokens", *(str(run.steps) for run in runs))
    for stage in stages_of(run.seconds for run in runs):
        style = "bold" if stage in SUMS else ""
        shown = (seconds(run.seconds[stage]) if stage in run.seconds else "–" for run in runs)
        table.add_row(SUMS.get(stage, stage), *shown, style=style)
    if any(run.peak is not None for run in runs):
        table.add_row("peak above weights", *(size(run.peak) for run in runs))
    table.add_row("KV cache", *(size(run.kv_cache) for run in runs))
    return table
