"""`mmtok compare --retain`: runs the search and shows what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError

if TYPE_CHECKING:
    from mmtok_cli.evaluation.processes import Processes
    from mmtok_cli.results.retention import Retention
    from mmtok_cli.retention import RetentionRun


def search(
    run: RetentionRun, processes: Processes, files: Sequence[Path], plot: Path | None, as_json: bool, quiet: bool
) -> tuple[Retention, int]:
    """Search, write the files, then show. The result, and the exit status: 1 if a part failed or
    nothing can be found, 130 if the run was interrupted."""
    from mmtok_cli.cli.showing import save
    from mmtok_cli.report.console import attempt_all, print_error
    from mmtok_cli.report.retention import save_curve

    found, stopped = run.measure(processes)
    parts = exports(found, files, quiet)
    if plot:
        parts.append(partial(save, partial(save_curve, found, plot), plot, quiet))
    done = attempt_all([*parts, partial(show, found, as_json, quiet)])
    if isinstance(stopped, MMTokError):
        print_error(stopped)
        return found, 1
    if stopped or found.interrupted:
        return found, 130
    hopeless = bool(found.metric) and not found.baseline_score
    return found, 1 if hopeless or not done or all(one.failure for one in found.decisions) else 0


def exports(found: Retention, files: Sequence[Path], quiet: bool) -> list[Callable[[], object]]:
    """A part of the output for each file."""
    from mmtok_cli.cli.showing import save
    from mmtok_cli.report.retention import write_retention

    return [partial(save, partial(write_retention, found, path), path, quiet) for path in files]


def show(found: Retention, as_json: bool, quiet: bool) -> None:
    """Print JSON, or the answers, the tables behind them and notes."""
    from mmtok_cli.report import checks, console, tables
    from mmtok_cli.report.retention import answer_lines, note_lines, retention_table
    from mmtok_cli.report.text import printable_record

    if as_json:
        console.print_json(found)
        return
    found = printable_record(found)
    out, notes = console.results_console(), console.notes_console(quiet)
    for line in answer_lines(found):
        out.print(line, soft_wrap=True, highlight=False)
    out.print()
    out.print(retention_table(found))
    if found.timing:
        for part in tables.by_batch_size(found.timing):
            out.print(tables.speed_table(part))
    out.print(tables.environment_line(found.model, found.environment))
    for note in note_lines(found):
        notes.print(f"• {note}", soft_wrap=True)
    for note in checks.notes(found.timing) if found.timing else []:
        notes.print(f"• {note}")
