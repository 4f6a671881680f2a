"""`mmtok report`: tables, pages and files from saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtok_cli.cli.options import ExportOption, JsonOption, QuietOption


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of `mmtok compare`.", show_default=False)],
    exports: ExportOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show saved results, without a model. Several runs of one model on the same samples share their tables.

    [dim]mmtok report runs/monday runs/tuesday --export both.html[/dim]
    """
    from mmtok_cli.cli.showing import export, show
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.files import require_writable
    from mmtok_cli.report.console import print_json
    from mmtok_cli.report.exports import EXPORTS
    from mmtok_cli.results.merge import merge, same_kind
    from mmtok_cli.results.run_directory import RunDirectory
    from mmtok_cli.summary import summarise_run

    for path in exports or []:
        require_writable(path, EXPORTS, "--export")
    if len({run.resolve() for run in runs}) < len(runs):
        raise MMTokError("the same run is given twice", "give each run once")
    comparisons = [summarise_run(RunDirectory.open(run)) for run in runs]
    for run, comparison in zip(runs, comparisons, strict=True):
        if not comparison.results and not comparison.failures:
            raise MMTokError(f"{run} has no complete round", f"resume with: mmtok compare --run-dir {run} --resume")
    groups = same_kind(comparisons)
    if len(groups) > 1 and (exports or as_json):
        kinds = "; ".join(
            f"{one.model} on {one.schedule.planned_samples} samples of {one.schedule.data}" for one, *_ in groups
        )
        raise MMTokError(f"these runs differ in their model or samples: {kinds}", "report on them one after another")
    for group in groups:
        merged = merge(group)
        if as_json:
            print_json(merged)
        else:
            show(merged, [], False, quiet)
        export(merged, exports or [], runs[0], quiet)
