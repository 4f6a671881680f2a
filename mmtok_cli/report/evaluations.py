"""Evaluations by lmms-eval: tables of tasks x methods, and files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from mmtok_cli.report.cells import Value
from mmtok_cli.report.csv_export import without_formula
from mmtok_cli.report.tables import attention_text, plain_table, rules_text
from mmtok_cli.report.text import printable_record
from mmtok_cli.report.units import number, seconds, share, size
from mmtok_cli.results.evaluations import Evaluation, Evaluations, MeanCost, TaskScore

EXPORTS = (".json", ".csv", ".md")
COST_STAGES = ("encode", "select", "prefill", "ttft", "total")
HEADINGS = {"ttft": "TTFT"}


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task in one evaluation, as all formats show it."""

    evaluation: Evaluation
    score: TaskScore

    @property
    def cost(self) -> MeanCost | None:
        return self.evaluation.costs.get(self.score.task)

    def of_cost(self, value: Callable[[MeanCost], float]) -> float | None:
        """A mean cost; None without cost records."""
        return value(self.cost) if self.cost else None

    @property
    def metric(self) -> str:
        """The metric, with the filter if it is not the usual one."""
        usual = self.score.filter in ("none", "")
        return self.score.metric if usual else f"{self.score.metric} ({self.score.filter})"


def _seconds_of(stage: str, row: ScoreRow) -> float | None:
    return row.of_cost(lambda cost: cost.seconds[stage])


CSV_COLUMNS: tuple[tuple[str, Callable[[ScoreRow], Value]], ...] = (
    ("task", lambda row: row.score.task),
    ("metric", lambda row: row.score.metric),
    ("filter", lambda row: row.score.filter),
    ("model", lambda row: row.evaluation.model),
    ("method", lambda row: row.evaluation.label),
    ("samples", lambda row: row.score.samples),
    ("score", lambda row: row.score.value),
    ("retention", lambda row: row.score.retention),
    ("kept_tokens", lambda row: row.of_cost(lambda cost: cost.kept)),
    ("total_tokens", lambda row: row.of_cost(lambda cost: cost.total)),
    *((f"{stage}_mean_s", partial(_seconds_of, stage)) for stage in COST_STAGES),
    ("kv_cache_bytes", lambda row: row.of_cost(lambda cost: cost.kv_cache)),
    ("results", lambda row: row.evaluation.path),
)


def show(found: Evaluations, as_json: bool, quiet: bool) -> None:
    """Print JSON, or the tables and notes on how to read them."""
    from mmtok_cli.report import console

    if as_json:
        console.print_json(found)
        return
    found = printable_record(found)
    out, notes = console.results_console(), console.notes_console(quiet)
    out.print(score_table(found))
    if costs := cost_table(found):
        out.print(costs)
    for line in environment_lines(found):
        out.print(line, style="dim")
    for note in note_lines(found):
        notes.print(f"• {note}", soft_wrap=True)


def score_rows(found: Evaluations) -> list[ScoreRow]:
    """Tasks in the order of the first evaluation that has them; the evaluations of a metric follow each other."""
    rows = [ScoreRow(one, score) for one in found.evaluations for score in one.scores]
    order = list(dict.fromkeys((row.score.task, row.score.metric, row.score.filter) for row in rows))
    return sorted(rows, key=lambda row: order.index((row.score.task, row.score.metric, row.score.filter)))


def score_table(found: Evaluations) -> Table:
    """Tasks x methods."""
    table = plain_table("Scores by lmms-eval")
    for heading in ("task", "metric", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("samples", "kept", "score", "retention"):
        table.add_column(heading, justify="right", no_wrap=True)
    before: tuple[str, str] | None = None
    for row in score_rows(found):
        what = (row.score.task, row.metric)
        table.add_row(*(("", "") if what == before else what), *_score_cells(row), style=_style(row.evaluation))
        before = what
    return table


def cost_table(found: Evaluations) -> Table | None:
    """Methods: mean retention, and the mean cost of a sample of all tasks; None without cost records."""
    measured = [(one, one.cost) for one in found.evaluations if one.cost]
    if not measured:
        return None
    table = plain_table("Costs (means per sample)")
    table.add_column("method", overflow="fold")
    for heading in ("retention", *(HEADINGS.get(stage, stage) for stage in COST_STAGES), "KV cache"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one, cost in measured:
        times = (seconds(cost.seconds[stage]) for stage in COST_STAGES)
        table.add_row(one.label, share(one.retention), *times, size(cost.kv_cache), style=_style(one))
    return table


def environment_lines(found: Evaluations) -> list[str]:
    """What the costs were measured on, a line for each setting that there is."""
    lines = []
    for one in found.evaluations:
        if (e := one.environment) is None:
            continue
        rules = rules_text(one.rules) if one.rules else ""
        lines.append(
            f"{one.model} on {e.processor} ({e.device}, {e.dtype}, {attention_text(e)}), torch {e.torch}, "
            f"transformers {e.transformers}, mmtok {e.mmtok}" + (f"; {rules}" if rules else "")
        )
    return list(dict.fromkeys(lines))


def note_lines(found: Evaluations) -> list[str]:
    """How to read the tables, and what is missing."""
    notes = []
    if any(one.retention is not None for one in found.evaluations):
        notes.append(
            "retention: score / that of method=full; among the costs, the mean over tasks of that of their first metric"
        )
    if sum(one.cost is not None for one in found.evaluations) > 1:
        notes.append(
            "times are of evaluations one after another, in which the machine may have changed: `mmtok compare` runs "
            "methods in turns and gives intervals"
        )
    models = {(one.environment.weights, one.environment.layers) for one in found.evaluations if one.environment}
    if any(weights == "random" or layers for weights, layers in models):
        notes.append("some were run with random weights or a part of the layers: their scores mean nothing")
    return [*notes, *found.remarks]


def write_evaluations(found: Evaluations, path: Path) -> None:
    """Write the evaluations in the format of the file's suffix. Raises MMTokError for one that is none of EXPORTS."""
    from mmtok_cli.report.exports import write_text

    write_text(found, path, {".csv": lambda: csv_text(found), ".md": lambda: markdown_text(found)})


def csv_text(found: Evaluations) -> str:
    """One row for each metric, task and method."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([name for name, _ in CSV_COLUMNS])
    for row in score_rows(printable_record(found)):
        writer.writerow([without_formula(value(row)) for _, value in CSV_COLUMNS])
    return out.getvalue()


def markdown_text(found: Evaluations) -> str:
    """The table of scores with the costs of each task, and what it was measured on."""
    from mmtok_cli.report.exports import escaped

    found = printable_record(found)
    headings = ["task", "metric", "method", "samples", "kept", "score", "retention", "TTFT", "KV cache"]
    lines = [f"| {' | '.join(headings)} |", "| :--- | :--- | :--- |" + " ---: |" * 6]
    for row in score_rows(found):
        costs = [seconds(row.cost.seconds["ttft"]), size(row.cost.kv_cache)] if row.cost else ["–", "–"]
        cells = [row.score.task, row.metric, *_score_cells(row), *costs]
        lines.append(f"| {' | '.join(map(escaped, cells))} |")
    notes = [*environment_lines(found), *note_lines(found)]
    return "\n".join([*lines, "", "\n\n".join(map(escaped, notes)), ""])


def _score_cells(row: ScoreRow) -> Sequence[str]:
    cost, score = row.cost, row.score
    kept = f"{number(round(cost.kept, 1))}/{number(round(cost.total, 1))}" if cost else "–"
    samples = "–" if score.samples is None else str(score.samples)
    return row.evaluation.label, samples, kept, f"{score.value:.4g}", share(score.retention)


def _style(one: Evaluation) -> str:
    return "bold" if one.is_baseline else ""
