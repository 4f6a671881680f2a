"""Showing results: JSON or tables and notes on screen, files in several formats, plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.per_sample import sample_predictions
from mmtok_cli.overlays import read_overlays
from mmtok_cli.report import checks, console, tables
from mmtok_cli.report.tasks import task_tables
from mmtok_cli.report.text import printable, printable_record
from mmtok_cli.report.turns import turn_tables
from mmtok_cli.report.units import plural
from mmtok_cli.results.merge import label
from mmtok_cli.results.profile import ProfileResult
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import Comparison, SamplePrediction

Part = Callable[[], object]


def show(comparison: Comparison, parameters: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Print JSON, or tables for each batch size and notes on how to read them."""
    if as_json:
        console.print_json(comparison)
        return
    comparison = printable_record(comparison)
    out, notes = console.results_console(), console.notes_console(quiet)
    rules = tables.rules_text(comparison.rules, parameters)
    for part in tables.by_batch_size(comparison):
        schedule = part.schedule
        data = "" if schedule.data == "demo" else f" of {schedule.data}"
        frames = f", {schedule.sampling}" if schedule.sampling else ""
        out.print(
            f"{part.model}: {plural(schedule.samples, 'sample')}{data}{frames}, "
            f"batch size {schedule.batch_size}, seed {schedule.seed}"
            + "".join(f"; {text}" for text in (tables.lengths_text(schedule), rules) if text)
        )
        for table in tables.comparison_tables(part):
            out.print(table)
    for table in (*task_tables(comparison), *turn_tables(comparison)):
        out.print(table)
    out.print(tables.environment_line(comparison.model, comparison.environment))
    for note in checks.notes(comparison):
        notes.print(f"• {note}")


def exports(comparison: Comparison, files: Iterable[Path], runs: Sequence[Path], quiet: bool) -> list[Part]:
    """A part of the output for each file. runs: the directories of the comparison; a page shows pictures of the first.

    Parts raise MMTokError for what cannot be written or read.
    """
    return [partial(_export, comparison, path, runs, quiet) for path in files]


def _export(comparison: Comparison, path: Path, runs: Sequence[Path], quiet: bool) -> None:
    from mmtok_cli.report.exports import PREDICTIONS, write_export, write_predictions

    if path.suffix.lower() != PREDICTIONS:
        overlays = read_overlays(runs[0]) if path.suffix.lower() == ".html" else []
        save(partial(write_export, comparison, path, overlays=overlays), path, quiet)
    elif predictions := predictions_of([RunDirectory.open(run) for run in runs]):
        save(partial(write_predictions, predictions, path), path, quiet)
    elif comparison.interrupted:
        tell_not_written(path, quiet, "no answers were evaluated before the interruption")
    else:
        raise MMTokError(f"{path} could not be written: no answers were evaluated", "see the notes on what failed")


def predictions_of(stores: Sequence[RunDirectory]) -> list[SamplePrediction]:
    """The predictions of a run, or of several, which then name their run as the merged comparison does."""
    names = [label(place) if len(stores) > 1 else None for place in range(len(stores))]
    return [each for store, name in zip(stores, names, strict=True) for each in sample_predictions(store, name)]


def save_plot(comparison: Comparison, path: Path, quiet: bool) -> None:
    """Plot the cases of the first batch size. Raises MMTokError if there is nothing to plot."""
    from mmtok_cli.report.plots import save_tradeoff

    first, *others = tables.by_batch_size(comparison)
    if not first.results or not first.results[0].case.is_baseline or len(first.results) < 2:
        raise MMTokError("there is nothing to plot", "a plot requires the baseline and at least one other case")
    if not any(result.fidelity for result in first.results):
        if comparison.interrupted:
            tell_not_written(path, quiet, "no answers were evaluated before the interruption")
            return
        raise MMTokError("there is nothing to plot: no answers were evaluated", "omit --no-quality and --layers")
    which = f" (batch size {first.schedule.batch_size})" if others else ""
    save(partial(save_tradeoff, first, path), path, quiet, which)


def save_scaling_plot(profile: ProfileResult, path: Path, quiet: bool) -> None:
    """Plot the times at each number of tokens. Raises MMTokError if there is nothing to plot."""
    from mmtok_cli.report.plots import save_scaling

    if all(point.refused for point in profile.scaling):
        if profile.interrupted:
            tell_not_written(path, quiet, "no number of tokens was measured before the interruption")
            return
        raise MMTokError(
            "there is nothing to plot: no number of tokens was measured", "choose smaller --scaling-tokens"
        )
    save(partial(save_scaling, profile, path), path, quiet)


def profile_exports(
    profile: ProfileResult, files: Iterable[Path], quiet: bool, notes: Sequence[str] = (), top: int = 5
) -> list[Part]:
    """A part of the output for each file: a profile as JSON or as a page, or its cases as CSV or Markdown.

    notes, top: what the page says of how to read it, and how many operators of each stage it lists.
    """
    from mmtok_cli.report.exports import write_profile

    return [partial(save, partial(write_profile, profile, path, notes, top), path, quiet) for path in files]


def save(write: Part, path: Path, quiet: bool, which: str = "") -> None:
    """Write a file and say so. which: what is in it, if not everything. Raises MMTokError that names the file."""
    try:
        write()
    except OSError as error:  # of something that is read for it, such as a font
        raise MMTokError(f"{path} could not be written: {error}") from error
    tell_written(path, quiet, which)


def tell_written(path: Path, quiet: bool, which: str = "") -> None:
    console.notes_console(quiet).print(f"wrote {printable(path)}{which}", soft_wrap=True)


def tell_not_written(path: Path, quiet: bool, why: str) -> None:
    console.notes_console(quiet).print(f"{printable(path)} was not written: {why}", soft_wrap=True)
