"""A comparison as a file: JSON to compute with, CSV for a spreadsheet, Markdown to paste, an HTML page to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from mmtok_cli.errors import MMTokError
from mmtok_cli.files import write_whole
from mmtok_cli.report.cells import rows
from mmtok_cli.report.checks import draft_notes, failure_notes, interruption_notes, unable_notes
from mmtok_cli.report.columns import markdown_columns
from mmtok_cli.report.csv_export import csv_text
from mmtok_cli.report.tables import environment_line, lengths_text, rules_text
from mmtok_cli.report.tasks import tables_of
from mmtok_cli.report.text import printable_json, printable_record
from mmtok_cli.report.turns import shown_columns, turn_notes
from mmtok_cli.report.units import picture_size, plural
from mmtok_cli.results.schema import json_text

if TYPE_CHECKING:
    from mmtok_cli.report.page import OverlayGroup
    from mmtok_cli.results.profile import ProfileResult
    from mmtok_cli.results.schema import Comparison, Record, SamplePrediction

EXPORTS = (".json", ".csv", ".md", ".html")
PREDICTIONS = ".jsonl"  # not of the comparison, but of each sample

READING = (
    "Times are medians; speedups are baseline / method within a round, with a 95 % interval, and a question mark where "
    "it contains 1 or is missing. kept: vision tokens of an image that reach the end of the language model. "
    "TTFT: time to the first token. TPOT: seconds of decoding per token after the first."
)


def write_export(comparison: Comparison, path: Path, *, overlays: Sequence[OverlayGroup] = ()) -> None:
    """Write a comparison in the format of the file's suffix, whole or not at all; only a page shows overlays.

    Raises MMTokError for a suffix that is none of EXPORTS, and if the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        text = _json(comparison)
    elif kind == ".csv":
        text = csv_text(comparison)
    elif kind == ".md":
        text = markdown_text(comparison)
    elif kind == ".html":
        from mmtok_cli.report.page import page_text

        text = page_text(comparison, overlays)
    else:
        raise MMTokError(f"{path} does not end in {', '.join(EXPORTS[:-1])} or {EXPORTS[-1]}", "choose one of these")
    _write(path, text)


def write_predictions(predictions: Iterable[SamplePrediction], path: Path) -> None:
    """Write predictions as JSON lines. Raises MMTokError if the file cannot be written."""
    _write(path, "".join(printable_json(json_text(prediction)) + "\n" for prediction in predictions))


def write_profile(profile: ProfileResult, path: Path, notes: Sequence[str] = (), top: int = 5) -> None:
    """Write a profile as JSON or as a page, or its cases as CSV or Markdown. notes, top: of the page.

    Raises MMTokError if the file cannot be written.
    """
    from mmtok_cli.report.page.profile import profile_page_text

    kind = path.suffix.lower()
    if kind == ".json":
        _write(path, _json(profile))
    elif kind == ".html":
        _write(path, profile_page_text(profile, notes, top))
    else:
        write_export(profile.comparison, path)


def _json(result: Record) -> str:
    return printable_json(json_text(result, indent=2)) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_bytes(text.encode()))


def markdown_text(comparison: Comparison) -> str:
    """A table for a pull request or a paper's notes, with a line on what it was measured on and one on reading it.

    Where something else than the model as it is was measured, the first line says so.
    """
    comparison = printable_record(comparison)
    columns = markdown_columns(comparison)
    table = [["method", *(column.heading for column in columns)]]
    for row in rows(comparison, columns):
        name = escaped(row.title) + (f" ({escaped(row.missing)})" if row.missing else "")
        table.append([name, *(escaped(str(cell)) for cell in row.cells)])
    lines = markdown_table(table)
    for task in tables_of(comparison):
        shown_of = task.metrics | task.statistics
        cells = [[str(result), *(cell(result) for cell in shown_of.values())] for result in task.results]
        table = [list(map(escaped, row)) for row in (["method", *shown_of], *cells)]
        lines += ["", f"{escaped(task.title)}:", "", *markdown_table(table)]
    if comparison.turns:
        shown = shown_columns(comparison)
        turns = [["method", *(column.heading for column in shown)]]
        for result in comparison.turns:
            turns.append([escaped(str(result)), *(escaped(str(column.cell_of(result))) for column in shown)])
        lines += ["", "Turns of conversations:", "", *markdown_table(turns)]
    notes = [
        *draft_notes(comparison.results),
        *unable_notes(comparison.results),
        *interruption_notes(comparison),
        *failure_notes(comparison),
        *turn_notes(comparison),
        *comparison.left_out,
        *comparison.remarks,
    ]
    said = [_conditions(comparison), READING, *notes]
    fallback = comparison.environment.fallback
    head = [paragraph(f"{comparison.model}: {fallback}"), ""] if fallback else []
    return "\n".join([*head, *lines, "", "\n\n".join(map(paragraph, said)), ""])


def write_text(found: Record, path: Path, texts: Mapping[str, Callable[[], str]]) -> None:
    """Write a result as JSON, or as the text of the file's suffix. Raises MMTokError for another suffix.

    texts: what gives the text of each further format, by suffix.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        text = printable_json(json_text(found, indent=2)) + "\n"
    elif kind in texts:
        text = texts[kind]()
    else:
        raise MMTokError(f"{path} does not end in {', '.join(('.json', *texts))}", "choose one of these")
    write_whole(path, lambda part: part.write_bytes(text.encode()))


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, its columns aligned. table: rows, the headings first."""
    widths = [max(4, *map(cell_len, column)) for column in zip(*table, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return ["| " + " | ".join(map(_padded, row, widths, rule)) + " |" for row in (table[0], rule, *table[1:])]


def _conditions(comparison: Comparison) -> str:
    schedule = comparison.schedule
    sizes = schedule.batch_size if isinstance(schedule.batch_size, int) else ", ".join(map(str, schedule.batch_size))
    rules = rules_text(comparison.rules)
    return (
        f"{environment_line(comparison.model, comparison.environment).plain}; "
        f"{plural(schedule.samples, 'sample')}, {plural(schedule.rounds, 'round')}, "
        f"batch size {sizes}, seed {schedule.seed}"
        + (f"; {schedule.sampling}" if schedule.sampling else "")
        + (f"; image of {picture_size(schedule.image_size)} pixels" if schedule.image_size else "")
        + (f"; score: {schedule.metric_title}" if schedule.metric_title else "")
        + "".join(f"; {text}" for text in (lengths_text(schedule), rules) if text)
    )


def _padded(text: str, width: int, rule: str) -> str:
    space = " " * (width - cell_len(text))
    return text + space if rule.startswith(":") else space + text


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", " ".join(text.split()))


def paragraph(text: str) -> str:
    """Text that is neither an item of a list nor a heading, however it begins."""
    return re.sub(r"^(\d{0,9})([-+=.)])", r"\1\\\2", escaped(text))
