"""A comparison as a file: JSON to compute with, CSV for a spreadsheet, Markdown to paste, an HTML page to look at."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.cells import cell_len

from mmtok_cli.errors import MMTokError
from mmtok_cli.files import write_whole
from mmtok_cli.report.checks import failure_notes, interruption_notes
from mmtok_cli.report.columns import comparison_columns, rows
from mmtok_cli.report.tables import environment_line, rules_text
from mmtok_cli.results.schema import FailedCase, json_text

if TYPE_CHECKING:
    from mmtok_cli.report.page import OverlayGroup
    from mmtok_cli.results.schema import CaseResult, Comparison

EXPORTS = (".json", ".csv", ".md", ".html")

READING = (
    "Times are medians; speedups are baseline / method within a round, with a 95 % interval, and a question mark where "
    "it contains 1 or is missing. kept: vision tokens of an image that reach the end of the language model. "
    "TTFT: time to the first token."
)

# What the columns of a part of a case are called; parts not named here carry their own name in front.
COLUMN_NAMES = {
    "tokens": "{}_tokens",
    "seconds": "{}_s",
    "memory": "{}_bytes",
    "flops": "{}_flops",
    "score_counts": "score_{}",
    "fidelity": "{}",
    "flips": "flips_{}",
    "yes_no": "yes_no_{}",
    "flop_coverage": "flop_coverage_{}",
    "gpu": "gpu_{}",
    "drift": "drift_{}",
}
UNITS = {"kl": "kl_nats", "overhead": "select_overhead"}


def write_export(comparison: Comparison, path: Path, *, overlays: Sequence[OverlayGroup] = ()) -> None:
    """Write a comparison in the format of the file's suffix, whole or not at all; only a page shows overlays.

    Raises MMTokError for a suffix that is none of EXPORTS, and if the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        text = json_text(comparison, indent=2) + "\n"
    elif kind == ".csv":
        text = csv_text(comparison)
    elif kind == ".md":
        text = markdown_text(comparison)
    elif kind == ".html":
        from mmtok_cli.report.page import page_text

        text = page_text(comparison, overlays)
    else:
        raise MMTokError(f"{path} does not end in {', '.join(EXPORTS[:-1])} or {EXPORTS[-1]}", "choose one of these")
    data = text.encode("utf-8", "backslashreplace")  # the command line may hold bytes that are no text
    write_whole(path, lambda part: part.write_bytes(data))


def csv_text(comparison: Comparison) -> str:
    """One row for each case, columns named with their units; raw values are left to JSON."""
    context = _context(comparison)
    found = []
    cases: list[CaseResult | FailedCase] = [*comparison.results, *comparison.failures]
    for case in cases:
        row = dict(_flat(case))
        found.append(row | {name: value for name, value in context.items() if name not in row})
    names = dict.fromkeys(name for row in sorted(found, key=len, reverse=True) for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def _flat(case: CaseResult | FailedCase) -> Iterator[tuple[str, Any]]:
    """Names and values of one case's columns. A part that is missing has none."""
    for field, value in [*case.case, *case]:
        if field == "case":
            continue
        if field == "parameters":
            yield field, json.dumps(value, default=str)
        elif isinstance(case, FailedCase) and field in ("round", "reason", "message"):
            yield f"failure_{field}", value
        elif field not in COLUMN_NAMES or value is not None:
            pattern = COLUMN_NAMES.get(field, f"{field}_{{}}")
            for path, leaf in _leaves(value):
                name = pattern.format("_".join(path)) if path else field
                yield UNITS.get(name, name), leaf


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What lies in records and dictionaries, raw values aside. A pair counts right answers and questions."""
    if isinstance(value, BaseModel | Mapping):
        for name, inner in value.items() if isinstance(value, Mapping) else value:
            yield from _leaves(inner, (*path, str(name)))
    elif isinstance(value, tuple):
        yield from (((*path, name), inner) for name, inner in zip(("right", "asked"), value, strict=True))
    elif not isinstance(value, list):
        yield path, value


def _context(comparison: Comparison) -> dict[str, Any]:
    """What all cases were measured on and under, so that the rows of several files can be put together."""
    environment = comparison.environment.model_dump(exclude={"command", "platform", "python"})
    schedule = comparison.schedule.model_dump(exclude={"order"})
    rules = {"track": comparison.rules.track, "budget_means": comparison.rules.budget_means}
    return {"model": comparison.model, **rules, **schedule, **environment}


def markdown_text(comparison: Comparison) -> str:
    """A table for a pull request or a paper's notes, with a line on what it was measured on and one on reading it."""
    columns = [column for column in comparison_columns(comparison) if column.brief]
    table = [["method", *(column.heading for column in columns)]]
    for row in rows(comparison, columns):
        name = _escaped(row.title) + (f" ({_escaped(row.trouble)})" if row.trouble else "")
        table.append([name, *(_escaped(str(cell)) for cell in row.cells)])
    widths = [max(4, *map(cell_len, column)) for column in zip(*table, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ["| " + " | ".join(map(_padded, row, widths, rule)) + " |" for row in (table[0], rule, *table[1:])]
    notes = [*interruption_notes(comparison), *failure_notes(comparison), *comparison.left_out, *comparison.remarks]
    said = [_conditions(comparison), READING, *notes]
    return "\n".join([*lines, "", "\n\n".join(map(_escaped, said)), ""])


def _conditions(comparison: Comparison) -> str:
    schedule = comparison.schedule
    rules = rules_text(comparison.rules)
    return (
        f"{environment_line(comparison.model, comparison.environment).plain}; {schedule.samples} samples, "
        f"{schedule.rounds} rounds, batch size {schedule.batch_size}, seed {schedule.seed}"
        + (f"; {rules}" if rules else "")
    )


def _padded(text: str, width: int, rule: str) -> str:
    space = " " * (width - cell_len(text))
    return text + space if rule.startswith(":") else space + text


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))
