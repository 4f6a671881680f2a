"""`mmtok report`: tables, pages and files from saved runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mmtok_cli.cli.options import ExportOption, JsonOption, QuietOption


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run directories of `mmtok compare`, or output folders of lmms-eval.", show_default=False),
    ],
    files: ExportOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show saved results, without a model. Several runs of one model on the same samples share their tables.

    Of lmms-eval's --output_path folders: scores of tasks x methods, retention and costs.

    [dim]mmtok report runs/monday runs/tuesday --export both.html[/dim]
    """
    from mmtok_cli.cli.showing import exports, predictions_of, show
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.outputs import Inputs, check_outputs, outputs_of
    from mmtok_cli.overlays import read_overlays
    from mmtok_cli.report.console import attempt_all
    from mmtok_cli.report.exports import EXPORTS, PREDICTIONS
    from mmtok_cli.results.evaluations import holds_evaluations
    from mmtok_cli.results.merge import merge, same_kind
    from mmtok_cli.results.retention import is_search
    from mmtok_cli.results.run_directory import RunDirectory
    from mmtok_cli.summary import summarise_run

    if len({run.resolve() for run in runs}) < len(runs):
        raise MMTokError("the same run is given twice", "give each run once")
    if any(map(holds_evaluations, runs)):
        _report_evaluations(runs, files or [], as_json, quiet)
        return
    if any(map(is_search, runs)):
        _report_search(runs, files or [], as_json, quiet)
        return
    stores = [RunDirectory.open(run) for run in runs]
    comparisons = [summarise_run(store) for store in stores]
    formats = (*EXPORTS, PREDICTIONS)
    check_outputs(outputs_of(("--export", path, formats) for path in files or []), Inputs(runs=runs))
    for run, comparison in zip(runs, comparisons, strict=True):
        if not comparison.results and not comparison.failures:
            raise MMTokError(f"{run} has no complete round", f"resume with: mmtok compare --run-dir {run} --resume")
    groups = same_kind(comparisons)
    if len(groups) > 1 and (files or as_json):
        kinds = "; ".join(
            f"{one.model} on {one.schedule.planned_samples} samples of {one.schedule.data}" for one, *_ in groups
        )
        raise MMTokError(f"these runs differ in their model or samples: {kinds}", "report on them one after another")
    if any(path.suffix.lower() == ".html" for path in files or []):
        read_overlays(runs[0])  # those that cannot be read are refused before anything is written
    if any(path.suffix.lower() == PREDICTIONS for path in files or []) and not predictions_of(stores):
        raise MMTokError(
            "no answers were evaluated in these runs, so there are no predictions", "export another format"
        )
    merged = [merge(group) for group in groups]
    parts = [part for one in merged for part in exports(one, files or [], runs, quiet)]
    if not attempt_all([*parts, *(partial(show, one, [], as_json, quiet) for one in merged)]):
        raise typer.Exit(1)


def _report_search(runs: list[Path], files: list[Path], as_json: bool, quiet: bool) -> None:
    """Show what `mmtok compare --retain` found."""
    from mmtok_cli.cli.retain import exports, show
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.outputs import Inputs, check_outputs, outputs_of
    from mmtok_cli.report.console import attempt_all
    from mmtok_cli.report.retention import EXPORTS
    from mmtok_cli.retention import read_retention

    if len(runs) > 1:
        raise MMTokError("searches for budgets are shown one at a time", "give one of them")
    found = read_retention(runs[0])
    check_outputs(outputs_of(("--export", path, EXPORTS) for path in files), Inputs(runs=runs))
    if not attempt_all([*exports(found, files, quiet), partial(show, found, as_json, quiet)]):
        raise typer.Exit(1)


def _report_evaluations(folders: list[Path], files: list[Path], as_json: bool, quiet: bool) -> None:
    """Show what lmms-eval found, and what it cost."""
    from mmtok_cli.cli.showing import save
    from mmtok_cli.outputs import Inputs, check_outputs, outputs_of
    from mmtok_cli.report.console import attempt_all
    from mmtok_cli.report.evaluations import EXPORTS, show, write_evaluations
    from mmtok_cli.results.evaluations import read_evaluations

    found = read_evaluations(folders)
    check_outputs(outputs_of(("--export", path, EXPORTS) for path in files), Inputs(directories=folders))
    parts = [partial(save, partial(write_evaluations, found, path), path, quiet) for path in files]
    if not attempt_all([*parts, partial(show, found, as_json, quiet)]):
        raise typer.Exit(1)
