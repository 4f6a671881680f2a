"""Showing results: JSON or tables and notes on screen, files in several formats, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtok_cli.errors import MMTokError
from mmtok_cli.pictures import read_pictures
from mmtok_cli.report import checks, console, tables
from mmtok_cli.report.units import plural
from mmtok_cli.results.schema import Comparison, Profile


def show(comparison: Comparison, parameters: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Print JSON, or tables for each batch size and notes on how to read them."""
    if as_json:
        console.print_json(comparison)
        return
    out, notes = console.results_console(), console.notes_console(quiet)
    rules = tables.rules_text(comparison.rules, parameters)
    for part in tables.by_batch_size(comparison):
        schedule = part.schedule
        data = "" if schedule.data == "demo" else f" of {console.printable(schedule.data)}"
        out.print(
            f"{console.printable(part.model)}: {plural(schedule.samples, 'sample')}{data}, "
            f"batch size {schedule.batch_size}, seed {schedule.seed}" + (f"; {rules}" if rules else "")
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


def save_plot(comparison: Comparison, path: Path, quiet: bool) -> None:
    """Plot the cases of the first batch size. Raises MMTokError if there is nothing to plot."""
    from mmtok_cli.report.plots import save_tradeoff

    first, *others = tables.by_batch_size(comparison)
    if not first.results or not first.results[0].case.is_baseline or len(first.results) < 2:
        raise MMTokError("there is nothing to plot", "a plot requires the baseline and at least one other case")
    if not any(result.fidelity for result in first.results):
        raise MMTokError("there is nothing to plot", "a plot requires quality: omit --no-quality and --layers")
    save_tradeoff(first, path)
    which = f" (batch size {first.schedule.batch_size})" if others else ""
    console.notes_console(quiet).print(f"wrote {console.printable(path)}{which}", soft_wrap=True)


def export_profile(profile: Profile, files: Sequence[Path], quiet: bool) -> None:
    """Write a profile as JSON, or its cases as CSV or Markdown."""
    from mmtok_cli.report.exports import write_export, write_json

    cases = Comparison(
        **profile.model_dump(by_alias=True, include={"model", "rules", "environment", "schedule", "interrupted"}),
        results=profile.cases,
    )
    for path in files:
        if path.suffix.lower() == ".json":
            write_json(profile, path)
        else:
            write_export(cases, path)
        console.notes_console(quiet).print(f"wrote {console.printable(path)}", soft_wrap=True)
