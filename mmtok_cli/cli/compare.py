"""`mmtok compare`: methods x budgets x batch sizes, measured side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmtok_cli.cli.options import (
    OUTPUT,
    PLOTS,
    ExportOption,
    JsonOption,
    QuietOption,
    given_options,
    is_given,
    with_options,
)
from mmtok_cli.settings import ENGINE_METHODS, MEASUREMENT, CompareSettings, require_consistent

if TYPE_CHECKING:
    from mmtok_cli.comparison import ComparisonRun
    from mmtok_cli.evaluation.processes import Processes
    from mmtok_cli.progress import Progress
    from mmtok_cli.results.schema import Comparison
    from mmtok_cli.retention import RetentionRun

RUN = "Run directory"
CHECK = "Check"


@with_options(CompareSettings)
def compare(
    context: typer.Context,
    settings: CompareSettings,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and the estimated time.", rich_help_panel=MEASUREMENT),
    ] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Run directory; results are saved there as they are measured. Default: runs/TIME-MODEL.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the run in --run-dir, or the most recent run.", rich_help_panel=RUN),
    ] = False,
    fail_below: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit with status 1 unless the lower 95 % bound of every speedup reaches this value.",
            show_default=False,
            rich_help_panel=CHECK,
        ),
    ] = None,
    fail_below_stage: Annotated[
        str,
        typer.Option(help="Stage that --fail-below checks: prefill, ttft, total, …", rich_help_panel=CHECK),
    ] = "ttft",
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot of quality against tokens and time (.png, .svg, .pdf).", rich_help_panel=OUTPUT),
    ] = None,
    exports: ExportOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare methods and budgets: latency, speedup, memory and quality on held-out questions or your own data.

    In every round all cases run on the same samples, in random order, and speedups are paired within the round. Then the answers to all samples are evaluated once. Results are saved as they are measured: an interrupted run resumes with --resume. Under `torchrun` or `accelerate launch` the evaluation is distributed over all processes.

    With --retain, budgets are searched instead: samples are added until it is sure, with 95 % confidence, which is the smallest that keeps the share of the score; then that budget is timed.

    With --engine vllm, the engine answers, and quality alone is compared.

    [dim]mmtok compare --methods mmtok,resize --budget 64,16[/dim]
    [dim]mmtok compare --methods mmtok,divprune --retain 98%[/dim]
    """  # noqa: E501 (a paragraph is one line, so that help wraps it)
    from mmtok_cli.cli.engine import chosen_engine
    from mmtok_cli.cli.engine import compare as compare_by_engine
    from mmtok_cli.cli.retain import search
    from mmtok_cli.comparison import RUNS, ComparisonRun
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.evaluation.processes import join_processes
    from mmtok_cli.outputs import check_outputs, comparison_inputs, outputs_of
    from mmtok_cli.report.console import ConsoleProgress
    from mmtok_cli.report.exports import EXPORTS, PREDICTIONS
    from mmtok_cli.report.retention import EXPORTS as RETAINED
    from mmtok_cli.results.run_directory import newest_run
    from mmtok_cli.retention import RetentionRun

    engine = chosen_engine(context, settings)
    require_consistent(settings, given_options(context, CompareSettings))
    files = exports or []
    if engine != "transformers":
        if not is_given(context, "methods"):
            settings = settings.model_copy(update={"methods": ENGINE_METHODS})
        compare_by_engine(settings, files, as_json, quiet)
        return
    if plot and not settings.measures_quality:
        raise MMTokError("--plot shows quality, which is not measured with these options", "omit --plot")
    _check_fail_below(context, fail_below, fail_below_stage)
    with join_processes(settings.device) as processes:
        if settings.device_map is not None and processes.count > 1:
            raise MMTokError("--device-map gives all GPUs to one process, and there are several", "omit it")
        progress = ConsoleProgress(quiet or not processes.is_writer)
        run = _run_of(context, settings, run_dir if not resume else run_dir or newest_run(RUNS), resume, progress)
        if dry_run and isinstance(run, RetentionRun):
            raise MMTokError(
                "how long --retain takes depends on what it finds: there is no --dry-run", "omit --dry-run"
            )
        _check_predictions(files, run.settings)
        formats = RETAINED if isinstance(run, RetentionRun) else (*EXPORTS, PREDICTIONS)
        new_run = None if resume or (dry_run and run_dir is None) else run.directory
        outputs = outputs_of(
            [("--run-dir", new_run, ()), ("--plot", plot, PLOTS), *(("--export", path, formats) for path in files)]
        )
        check_outputs(outputs, comparison_inputs(run.settings, run.directory, outputs))
        if isinstance(run, ComparisonRun) and dry_run:
            if processes.is_writer:
                _show_plan(run, as_json)
        elif not processes.is_writer:
            run.help(processes)
        else:
            without_budget: list[str] = []
            if isinstance(run, RetentionRun):
                found, status = search(run, processes, files, plot, as_json, quiet)
                comparison, without_budget = found.timing, found.without_budget()
            else:
                run.overlays = any(path.suffix.lower() == ".html" for path in files)
                comparison, status = _measure(run, processes, files, plot, as_json, quiet)
            if not status and fail_below is not None:
                status = _check_speedups(comparison, without_budget, fail_below, fail_below_stage)
            if status:
                raise typer.Exit(status)


def _run_of(
    context: typer.Context, settings: CompareSettings, directory: Path | None, resume: bool, progress: Progress
) -> ComparisonRun | RetentionRun:
    """The run that was asked for, or the one in a directory that is to be resumed."""
    from mmtok_cli.comparison import ComparisonRun
    from mmtok_cli.results.retention import is_search
    from mmtok_cli.retention import RetentionRun

    if directory and resume:
        given = given_options(context, CompareSettings)
        kind: type[ComparisonRun | RetentionRun] = RetentionRun if is_search(directory) else ComparisonRun
        return kind.resumed(settings, given, directory, progress)
    return (RetentionRun if settings.retain else ComparisonRun)(settings, directory, progress)


def _check_predictions(files: list[Path], settings: CompareSettings) -> None:
    """Raises MMTokError for an export of predictions that are not made."""
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.report.exports import PREDICTIONS

    for path in files:
        if path.suffix.lower() == PREDICTIONS and not settings.measures_quality:
            raise MMTokError(f"--export {path} lists answers, which are not evaluated with these options", "omit it")


def _check_fail_below(context: typer.Context, least: float | None, stage: str) -> None:
    """Raises MMTokError for a check of the speedup that cannot be made."""
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.report.checks import require_speedup_stage

    if least is None:
        if is_given(context, "fail_below_stage"):
            raise MMTokError("--fail-below-stage requires --fail-below", "add --fail-below, as in --fail-below 1.2")
        return
    if not math.isfinite(least):
        raise MMTokError("--fail-below must be finite", "give the least speedup, as in --fail-below 1.2")
    require_speedup_stage(stage)


def _show_plan(run: ComparisonRun, as_json: bool) -> None:
    from mmtok_cli.report import checks, console
    from mmtok_cli.report.text import printable_record

    plan = run.estimate()
    if as_json:
        console.print_json(plan)
        return
    plan = printable_record(plan)
    out = console.results_console()
    out.print(checks.plan_table(plan))
    for line in checks.plan_lines(plan):
        out.print(line)


def _measure(
    run: ComparisonRun,
    processes: Processes,
    files: list[Path],
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> tuple[Comparison | None, int]:
    """Measure, write the files, then show. The result, None where nothing could be saved, and the exit status: 1 if
    a part or every case failed, 130 if the run was interrupted."""
    from mmtok_cli.cli.showing import exports, save_plot, show
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.report.console import attempt_all, print_error
    from mmtok_cli.results.run_directory import NotWrittenError

    try:
        comparison, stopped = run.measure(processes)
    except NotWrittenError as error:
        print_error(error)
        return None, 1
    parts = exports(comparison, files, [run.directory], quiet) if comparison.results else []
    if plot:
        parts.append(partial(save_plot, comparison, plot, quiet))
    done = attempt_all([*parts, partial(show, comparison, run.settings.parameters, as_json, quiet)])
    if isinstance(stopped, MMTokError):
        print_error(stopped)
        return comparison, 1
    if stopped or comparison.interrupted:
        return comparison, 130
    reduced = [result for result in comparison.results if not result.case.is_baseline]
    nothing = not comparison.results or (comparison.failures and not reduced)
    return comparison, 1 if nothing or not done else 0


def _check_speedups(comparison: Comparison | None, without_budget: Sequence[str], least: float, stage: str) -> int:
    """Say which speedups are too low, or missing. without_budget: methods of which no budget was found. The exit
    status."""
    from mmtok_cli.report.checks import shortfalls
    from mmtok_cli.report.console import notes_console
    from mmtok_cli.report.text import printable

    lines = [f"{method}: no budget was found, so there is no speedup ({stage})" for method in without_budget]
    lines += shortfalls(comparison, stage, least) if comparison else []
    for line in lines:
        notes_console().print(f"failed: {printable(line)}", soft_wrap=True)
    return 1 if lines else 0
