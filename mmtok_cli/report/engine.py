"""Tables and notes on what was measured through a serving engine."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rich.table import Table
from rich.text import Text

from mmtok_cli.report.cells import Cell, Column, CsvColumn, Value, speedup_cell
from mmtok_cli.report.columns import COLUMNS
from mmtok_cli.report.csv_export import IDENTITY, without_formula
from mmtok_cli.report.exports import PREDICTIONS, escaped, markdown_table, paragraph, write_predictions, write_text
from mmtok_cli.report.tables import equivalent_notes, narrow_text, plain_table, weights_text
from mmtok_cli.report.text import printable_lines, printable_record
from mmtok_cli.report.units import number, picture_size, plural, rate, ratio, seconds, share
from mmtok_cli.results.engine import ENGINE_STAGES, REQUEST_STAGES, EngineComparison, EngineProfile, LoadResult

if TYPE_CHECKING:
    from mmtok_cli.results.engine import AnswerQuality, EngineInfo, LoadRun
    from mmtok_cli.results.schema import Environment

EXPORTS = (".json", ".csv", ".md")
ENOUGH = 100  # requests for a 99th percentile
LENGTHS = 0.05  # by which answers may differ in length
NOTABLE = 0.05  # a change of a latency by this share of the TTFT, or of the images that are encoded at once
SHOWN_SHARE = 0.01  # of the time that a stage must change by to be named

Title = Literal["throughput", "ttft", "tpot", "request", "engine"]
TITLES: Mapping[Title, str] = {
    "throughput": "Throughput",
    "ttft": "TTFT: time to first token",
    "tpot": "TPOT: time per output token after the first",
    "request": "Where the time of a request goes: medians",
    "engine": "What the engine does: share of the time",
}
STAGE_TITLES = {"first_step": "first token"}
PLACES = {stage: "between steps" if stage == "idle" else f"in {stage}" for stage in ENGINE_STAGES}


@dataclass(frozen=True)
class LoadColumn(CsvColumn[LoadResult]):
    """A column of the tables and of the CSV.

    heading: none for a column that only the CSV has. cell: the value as the tables show it; by default `show` of it.
    """

    heading: str = ""
    table: Title | None = None
    show: Callable[[Any], str] = str
    cell: Callable[[LoadResult], Cell] | None = None

    def cell_of(self, result: LoadResult) -> Cell:
        value = self.value(result)
        if value is None:
            return Cell()
        return self.cell(result) if self.cell else Cell(self.show(value), value)


def _latency(stage: str, value: str) -> Callable[[LoadResult], Value]:
    return lambda result: getattr(result.seconds[stage], value) if stage in result.seconds else None


def _speedup(name: Literal["throughput", "ttft", "tpot"]) -> Iterable[CsvColumn[LoadResult]]:
    """The speedup of `throughput` or of a latency, and its interval."""
    yield LoadColumn(
        f"speedup_{name}_median",
        "baseline / method, paired within rounds, 95 % interval",
        lambda result: result.speedup[name].median if name in result.speedup else None,
        heading="speedup",
        table=name,
        cell=lambda result: speedup_cell(result.speedup.get(name)),
    )
    for end in ("low", "high"):
        yield CsvColumn(
            f"speedup_{name}_{end}",
            f"95 % interval of the speedup of {name}",
            lambda result, end=end: getattr(result.speedup[name], end) if name in result.speedup else None,  # type: ignore[misc]
        )


def _stages() -> Iterable[CsvColumn[LoadResult]]:
    for stage in (*REQUEST_STAGES, "total"):
        title = STAGE_TITLES.get(stage, stage)
        meaning = f"{title} of a request, median"
        yield LoadColumn(f"{stage}_median_s", meaning, _latency(stage, "median"), False, title, "request", seconds)
        yield CsvColumn(f"{stage}_p99_s", f"{title} of a request, 99th percentile", _latency(stage, "p99"))
    for stage in ENGINE_STAGES:
        value = lambda result, stage=stage: result.busy[stage]  # noqa: E731
        per_request = lambda result, stage=stage: result.busy_seconds[stage]  # noqa: E731
        yield LoadColumn(f"engine_{stage}_share", f"share of the time: {stage}", value, False, stage, "engine", share)
        yield CsvColumn(f"engine_{stage}_s", f"seconds of the engine per request: {stage}", per_request)


LOAD_COLUMNS: tuple[CsvColumn[LoadResult], ...] = (
    CsvColumn("concurrency", "requests in flight", lambda result: result.concurrency, True),
    CsvColumn("requests", "requests that were counted", lambda result: result.requests, True),
    LoadColumn(
        "kept_tokens",
        "vision tokens in the prompt, of those of the images",
        lambda result: result.kept,
        True,
        "kept",
        "throughput",
        cell=lambda result: Cell(f"{number(round(result.kept, 1))}/{number(round(result.vision, 1))}", result.kept),
    ),
    CsvColumn("total_tokens", "vision tokens of the images", lambda result: result.vision, True),
    LoadColumn(
        "prompt_tokens",
        "all tokens of the prompt",
        lambda result: result.prompt,
        True,
        "prompt",
        "throughput",
        lambda value: number(round(value, 1)),
    ),
    CsvColumn("new_tokens", "tokens of the answer", lambda result: result.new, True),
    LoadColumn(
        "requests_per_s",
        "requests per second, median over rounds",
        lambda result: result.requests_per_second.median,
        True,
        "req/s",
        "throughput",
        rate,
    ),
    *_speedup("throughput"),
    LoadColumn(
        "output_tokens_per_s",
        "tokens of answers per second, median over rounds",
        lambda result: result.output_tokens_per_second.median,
        True,
        "tok/s",
        "throughput",
        rate,
    ),
    LoadColumn(
        "kv_cache_share",
        "largest share of the KV cache in use",
        lambda result: result.kv_cache,
        True,
        "KV",
        "throughput",
        share,
    ),
    LoadColumn(
        "ttft_median_s", "time to first token, median", _latency("ttft", "median"), True, "median", "ttft", seconds
    ),
    LoadColumn(
        "ttft_p99_s", "time to first token, 99th percentile", _latency("ttft", "p99"), True, "p99", "ttft", seconds
    ),
    *_speedup("ttft"),
    LoadColumn(
        "tpot_median_s", "time per output token, median", _latency("tpot", "median"), False, "median", "tpot", seconds
    ),
    LoadColumn(
        "tpot_p99_s",
        "time per output token, 99th percentile",
        _latency("tpot", "p99"),
        False,
        "p99",
        "tpot",
        seconds,
    ),
    *_speedup("tpot"),
    *_stages(),
    LoadColumn(
        "images_per_encoding",
        "images that the engine encodes at a time, mean",
        lambda result: result.batch or None,
        False,
        "images at once",
        "engine",
        lambda value: number(round(value, 1)),
    ),
)


def load_tables(profile: EngineProfile) -> list[Table]:
    """Throughput, latency, and where the time goes; a row for each case, grouped by requests in flight."""
    tables = []
    for name, title in TITLES.items():
        columns = _shown(profile, name)
        table = plain_table(title)
        for heading in ("in flight", "method"):
            table.add_column(heading, no_wrap=True, justify="right" if heading == "in flight" else "left")
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=column.heading != "images at once")
        for result in profile.cases:
            baseline = not result.speedup and result.case.is_baseline
            first = str(result.concurrency) if baseline else ""
            cells = [narrow_text(column.cell_of(result)) for column in columns]
            table.add_row(first, str(result), *cells, style="bold" if baseline else "")
        tables.append(table)
    return tables


def _shown(profile: EngineProfile, table: Title) -> list[LoadColumn]:
    """The columns of a table in which any case has a value."""
    columns = [column for column in LOAD_COLUMNS if isinstance(column, LoadColumn) and column.table == table]
    return [column for column in columns if any(column.value(result) is not None for result in profile.cases)]


def head_line(profile: EngineProfile) -> str:
    """What was sent."""
    schedule = profile.schedule
    data = "questions about drawn scenes" if schedule.data == "demo" else schedule.data
    size = f", {picture_size(schedule.image_size)} pixels" if schedule.image_size else ""
    length = f"exactly {schedule.max_new_tokens}" if schedule.exact else f"at most {schedule.max_new_tokens}"
    prompts = f", prompts of {schedule.prompt_tokens} text tokens" if schedule.prompt_tokens is not None else ""
    return (
        f"{profile.model} in {profile.engine.name} {profile.engine.version}: {data}{size}{prompts}, "
        f"{length} new tokens, {plural(schedule.rounds, 'round')}"
    )


def engine_line(model: str, engine: EngineInfo, environment: Environment) -> str:
    """What the results were measured on: hardware, versions and settings."""
    e = environment
    commit = f", git {e.git_commit[:9]}{' (changed)' if e.git_dirty else ''}" if e.git_commit else ""
    run = "" if e.layers is None else f"; {e.layers[0]} of {e.layers[1]} decoder layers"
    remarks = "".join(f"; {text}" for text in (weights_text(e.weights),) if text)
    return (
        f"{model} on {e.processor} ({e.device}, {e.dtype}, {plural(e.threads, 'CPU')}), "
        f"{engine.name} {engine.version}, torch {e.torch}, transformers {e.transformers}, "
        f"mmtok {e.mmtok}{commit}{run}{remarks}"
    )


def load_notes(profile: EngineProfile) -> list[str]:
    """How to read the tables, and what the measured values say."""
    schedule = profile.schedule
    sent = ", ".join(f"{requests} at {concurrency}" for concurrency, requests in schedule.requests.items())
    notes = [
        *_bottlenecks(profile),
        *_changes(profile),
        *_later_first_tokens(profile),
        f"requests of each case in a round, by requests in flight: {sent}; whenever one is answered, the next is sent. "
        "All cases run in each round, in random order, on one engine; speedups are paired within rounds",
        "preprocess: image and text in the front end. queue: until the engine begins. first token: from there, with "
        "encode, select and prefill of all requests in the same steps. TTFT is the sum of the three. idle: the engine "
        "runs no step, as while requests are in the front end or data move between processes",
        f"caches: {profile.engine.caches}",
        *equivalent_notes(profile.equivalents),
    ]
    doubtful = [gain for result in profile.cases for gain in result.speedup.values() if not gain.conclusive]
    if any(gain.low is None for gain in doubtful):
        notes.append("? marks an inconclusive speedup: fewer than six rounds give no interval. Raise --rounds")
    elif doubtful:
        notes.append("? marks an inconclusive speedup: the 95 % interval contains 1. More --rounds may narrow it")
    fewest = min(result.requests for result in profile.cases)
    if fewest < ENOUGH:
        notes.append(f"p99 of {plural(fewest, 'request')} is about the largest value: raise --requests or --rounds")
    lengths = [result.new for result in profile.cases]
    if max(lengths) > (1 + LENGTHS) * min(lengths):
        notes.append("answers differ in length: --new-tokens gives all of them the same")
    preempted = sum(result.preempted for result in profile.cases)
    if preempted:
        notes.append(f"the KV cache was too small: requests lost theirs {plural(preempted, 'time')} and began again")
    if profile.environment.layers:
        run, of = profile.environment.layers
        notes.append(
            f"only {run} of {of} decoder layers were run and nothing is estimated: with all of them, prefill and "
            "decode take a larger share, and removing vision tokens gains more"
        )
    if profile.interrupted or profile.failure:
        problem = f"the engine failed ({profile.failure})" if profile.failure else "interrupted"
        notes.append(f"{problem}: {schedule.rounds} of {schedule.planned_rounds} rounds were measured")
    return notes


def _bottlenecks(profile: EngineProfile) -> list[str]:
    """What of the unreduced model's time no selection behind the encoder can take away."""
    lines = []
    for result in profile.cases:
        if not result.case.is_baseline:
            continue
        busy = 1 - result.busy["idle"]
        encode = result.busy["encode"]
        if not encode or not busy:
            continue
        lines.append(
            f"{plural(result.concurrency, 'request')} in flight: the encoder takes {share(encode / busy)} of the time "
            "that the engine is busy with the unreduced model, and no selection behind it can shorten that: if nothing "
            f"else were left, the engine would answer {ratio(busy / encode)} times as many requests"
        )
    return lines


def _changes(profile: EngineProfile) -> list[str]:
    """Which stages of the engine a method makes shorter and longer, with the most requests in flight and wherever it
    lowers the throughput."""
    most = max(result.concurrency for result in profile.cases)
    baselines = {result.concurrency: result for result in profile.cases if result.case.is_baseline}
    lines = []
    for result in profile.cases:
        gain = result.speedup.get("throughput")
        slower = gain is not None and gain.conclusive and gain.median < 1
        if gain is None or result.case.again or not (slower or result.concurrency == most):
            continue
        base = baselines[result.concurrency]
        least = SHOWN_SHARE * sum(base.busy_seconds.values())
        differences = {stage: result.busy_seconds[stage] - base.busy_seconds[stage] for stage in ENGINE_STAGES}
        less = [f"{seconds(-d)} less {PLACES[stage]}" for stage, d in differences.items() if d <= -least]
        more = [f"{seconds(d)} more {PLACES[stage]}" for stage, d in differences.items() if d >= least]
        if less or more:
            told = "lower throughput: " if slower else ""
            lines.append(
                f"{result}, {result.concurrency} in flight: {told}per request, the engine spends "
                f"{' and '.join([', '.join(part) for part in (less, more) if part])} than with the unreduced model"
            )
    return lines


def _later_first_tokens(profile: EngineProfile) -> list[str]:
    """Why the first token comes later with fewer vision tokens, wherever it does."""
    baselines = {result.concurrency: result for result in profile.cases if result.case.is_baseline}
    lines = []
    for result in profile.cases:
        gain = result.speedup.get("ttft")
        if gain is None or not gain.conclusive or gain.median >= 1:
            continue
        base, parts = baselines[result.concurrency], []
        for stage in REQUEST_STAGES[:-1]:
            before, after = base.seconds[stage].median, result.seconds[stage].median
            if after - before >= NOTABLE * base.seconds["ttft"].median:
                parts.append(f"{STAGE_TITLES.get(stage, stage)} {seconds(after)} in place of {seconds(before)}")
        if result.batch >= (1 + NOTABLE) * base.batch:
            parts.append(
                f"{number(round(result.batch, 1))} images are encoded at once in place of "
                f"{number(round(base.batch, 1))}, since more of the shorter prompts fit into a step, and none of its "
                "requests has a first token before all are encoded"
            )
        if parts:
            lines.append(f"{result}, {result.concurrency} in flight: later first tokens: {'; '.join(parts)}")
    return lines


# One answer.


def answer_lines(names: Sequence[str], runs: Sequence[LoadRun]) -> list[Text]:
    """The answer of each case, with its name if there are several."""
    lines = []
    for name, run in zip(names, runs, strict=True):
        head = f"{name}: " if len(names) > 1 else ""
        lines.append(Text.assemble((head, "bold"), printable_lines(run.requests[0].answer)))
    return lines


def answer_table(names: Sequence[str], runs: Sequence[LoadRun]) -> Table:
    """Tokens and seconds; a column for each case."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    requests = [run.requests[0] for run in runs]
    table.add_row("vision tokens kept", *(f"{each.kept}/{each.vision}" for each in requests))
    table.add_row("text tokens", *(str(each.prompt - each.kept) for each in requests))
    table.add_row("new tokens", *(str(each.new) for each in requests))
    for stage in ("preprocess", "queue", "first_step"):
        table.add_row(STAGE_TITLES.get(stage, stage), *(seconds(each.seconds[stage]) for each in requests))
    for stage in ("encode", "select", "prefill"):
        table.add_row(f"  of it {stage}", *(seconds(run.busy[stage]) for run in runs))
    table.add_row("TTFT", *(seconds(each.seconds["ttft"]) for each in requests), style="bold")
    table.add_row("decode", *(seconds(each.seconds["decode"]) for each in requests))
    table.add_row("total", *(seconds(each.seconds["total"]) for each in requests), style="bold")
    return table


# The quality of answers. An AnswerQuality has the fields of a CaseResult that these columns read.
TABLES = ("quality", "yes-no")


def quality_head(comparison: EngineComparison) -> str:
    """What was asked."""
    data = "" if comparison.data == "demo" else f" of {comparison.data}"
    return (
        f"{comparison.model} in {comparison.engine.name} {comparison.engine.version}: "
        f"{plural(comparison.samples, 'sample')}{data}, seed {comparison.seed}"
    )


def quality_tables(comparison: EngineComparison) -> list[Table]:
    """A row for each case."""
    table = plain_table(f"Quality (metric: {comparison.metric})" if comparison.metric else "Quality")
    table.padding = (0, 0, 0, 0)
    columns = _quality_columns(comparison)
    for heading, justify in (("method", "left"), ("kept", "right")):
        table.add_column(heading, no_wrap=True, justify=cast(Any, justify))
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    table.add_column("same", justify="right", no_wrap=True)
    for case in comparison.cases:
        cells = [narrow_text(_quality_cell(column, case)) for column in columns]
        table.add_row(str(case), _kept(case), *cells, share(case.same), style="bold" if case.case.is_baseline else "")
    return [table]


def quality_notes(comparison: EngineComparison) -> list[str]:
    """How to read the table, and what it does not have."""
    counts = comparison.cases[0].score_counts
    notes = ["same: answers identical to those of the unreduced model in the same engine"]
    if counts:
        title = f"score: {comparison.metric_title}; " if comparison.metric_title else ""
        notes.append(
            f"{title}{plural(counts.asked, 'sample')} with a reference answer; retention: score / score of the "
            "unreduced model, with a 95 % interval"
        )
    short = [f"{case}: {case.short}" for case in comparison.cases if case.short]
    if short:
        notes.append(f"samples that cannot meet the budget: {', '.join(short)}")
    return [
        *notes,
        *equivalent_notes(comparison.equivalents),
        *(f"not measured: {each}" for each in comparison.absent),
        *comparison.left_out,
    ]


def _quality_columns(comparison: EngineComparison) -> list[Column]:
    columns = [column for column in COLUMNS if isinstance(column, Column) and column.table in TABLES]
    return [
        column for column in columns if any(_quality_cell(column, case).value is not None for case in comparison.cases)
    ]


def _quality_cell(column: Column, case: AnswerQuality) -> Cell:
    known = cast(Any, case)
    value = column.value(known)
    if value is None:
        return Cell()
    return column.cell(known) if column.cell else Cell(column.show(value), value)


def _kept(case: AnswerQuality) -> str:
    return f"{number(round(case.kept, 1))}/{number(round(case.vision, 1))}"


# Files.


def write_engine_result(result: EngineProfile | EngineComparison, path: Path, notes: Sequence[str]) -> None:
    """Write a result as JSON, CSV or Markdown, by the suffix of the file; or predictions
    as JSON lines. Raises MMTokError if it cannot be written."""
    if path.suffix.lower() == PREDICTIONS and isinstance(result, EngineComparison):
        write_predictions(result.predictions, path)
        return
    shown = printable_record(result)
    write_text(result, path, {".csv": lambda: _csv(shown), ".md": lambda: _markdown(shown, notes)})


def _csv(result: EngineProfile | EngineComparison) -> str:
    """A row for each case, with what it was measured on."""
    own: Sequence[CsvColumn[Any]] = LOAD_COLUMNS
    if isinstance(result, EngineComparison):
        own = (
            CsvColumn("kept_tokens", "vision tokens in the prompt, mean", lambda case: case.kept),
            CsvColumn("total_tokens", "vision tokens of the images, mean", lambda case: case.vision),
            *_quality_columns(result),
            CsvColumn("same", "share of answers identical to the unreduced model's", lambda case: case.same),
        )
    context = {"engine": f"{result.engine.name} {result.engine.version}", "model": result.model} | {
        name: getattr(result.environment, name) for name in ("processor", "device", "dtype", "weights", "mmtok")
    }
    identity = [column for column in IDENTITY if column.name in ("method", "again", "parameters", "budget")]
    rows = [
        {column.name: without_formula(column.value(case.case)) for column in identity}
        | {column.name: without_formula(column.value(case)) for column in own if column.name}
        | {name: without_formula(value) for name, value in context.items()}
        for case in cast(Sequence[Any], result.cases)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _markdown(result: EngineProfile | EngineComparison, notes: Sequence[str]) -> str:
    """The tables, what they were measured on, and how to read them."""
    lines: list[str] = []
    if isinstance(result, EngineProfile):
        for name, title in TITLES.items():
            columns = _shown(result, name)
            rows = [["in flight", "method", *(column.heading for column in columns)]]
            for each in result.cases:
                rows.append([str(each.concurrency), str(each), *(str(column.cell_of(each)) for column in columns)])
            lines += [f"{title}:", "", *_escaped_table(rows), ""]
    else:
        quality = _quality_columns(result)
        rows = [["method", "kept", *(column.heading for column in quality), "same"]]
        for case in result.cases:
            rows.append([str(case), _kept(case), *(str(_quality_cell(c, case)) for c in quality), share(case.same)])
        lines += [*_escaped_table(rows), ""]
    said = [engine_line(result.model, result.engine, result.environment), *notes]
    return "\n".join([*lines, "\n\n".join(map(paragraph, said)), ""])


def _escaped_table(rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown_table([[escaped(cell) for cell in row] for row in rows])
