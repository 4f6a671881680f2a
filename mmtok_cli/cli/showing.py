"""How a comparison is shown: JSON, or tables and notes; and files in whatever formats were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtok_cli.cli.pictures import read_pictures
from mmtok_cli.report import checks, console, tables
from mmtok_cli.results.schema import Comparison


def show(comparison: Comparison, settings: Sequence[str], as_json: bool, quiet: bool) -> None:
    """JSON, or tables for each batch size and notes on how to read them."""
    if as_json:
        console.print_json(comparison)
        return
    out, notes = console.results_console(), console.notes_console(quiet)
    rules = tables.rules_text(comparison.rules, settings)
    for part in tables.by_batch_size(comparison):
        schedule = part.schedule
        data = "" if schedule.data == "demo" else f" of {console.printable(schedule.data)}"
        out.print(
            f"{console.printable(part.model)}: {schedule.samples} samples{data}, batches of {schedule.batch_size}, "
            f"seed {schedule.seed}" + (f"; {rules}" if rules else "")
        )
        for table in tables.comparison_tables(part):
            out.print(table)
    out.print(tables.environment_line(comparison.model, comparison.environment))
    for note in checks.notes(comparison):
        notes.print(f"• {console.printable(note)}")


def export(comparison: Comparison, files: Sequence[Path], run: Path | None, quiet: bool) -> None:
    """Write files in the formats of their suffixes. run: the directory whose pictures a page shows."""
    from mmtok_cli.report.exports import write_export

    for path in files:
        overlays = read_pictures(run) if run and path.suffix.lower() == ".html" else []
        write_export(comparison, path, overlays=overlays)
        console.notes_console(quiet).print(f"wrote {console.printable(path)}", soft_wrap=True)
