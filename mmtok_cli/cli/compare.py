"""`mmtok compare`: methods x budgets x batch sizes, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtok_cli.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PLOTS,
    REDUCTION,
    AskedOption,
    AttentionOption,
    BudgetMeansOption,
    ColumnsOption,
    DataOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ExportOption,
    ImageRootOption,
    JsonOption,
    LayersOption,
    MaxNewTokensOption,
    ModelOption,
    PositionsOption,
    QuietOption,
    SeedOption,
    SetOption,
    TrackOption,
    WarmupOption,
    WeightsOption,
)

RUN = "Run directory"
VERDICT = "Verdict"


def compare(
    context: typer.Context,
    model: ModelOption = "demo",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas. `full` is always measured; named here, once more, to show the noise.",
            rich_help_panel=REDUCTION,
        ),
    ] = "mmtok,random,uniform,resize,none",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Budgets, separated by commas: 64,16 or 10%,5%. Default: those of the model's profile.",
            show_default=False,
            rich_help_panel=REDUCTION,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Samples to ask, at most.", rich_help_panel=MEASUREMENT)] = 80,
    batch_size: Annotated[
        str,
        typer.Option(help="Samples per run, or several such numbers: 1,8.", rich_help_panel=MEASUREMENT),
    ] = "1",
    data: DataOption = "demo",
    image_root: ImageRootOption = None,
    question: AskedOption = None,
    columns: ColumnsOption = None,
    no_quality: Annotated[
        bool, typer.Option("--no-quality", help="Measure times and memory alone.", rich_help_panel=MEASUREMENT)
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timed passes over all cases, each on the next batch of samples. Default: all batches, at most 30.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    runs: Annotated[
        int,
        typer.Option(
            min=1, help="Repetitions of each case in a round; their median counts.", rich_help_panel=MEASUREMENT
        ),
    ] = 1,
    min_time: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Go on with rounds until so many seconds were measured.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    warmup: WarmupOption = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and how long it will take.", rich_help_panel=MEASUREMENT),
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "pretrained",
    layers: LayersOption = None,
    attention: AttentionOption = "sdpa",
    device_map: DeviceMapOption = None,
    track: TrackOption = "released",
    positions: PositionsOption = None,
    budget_means: BudgetMeansOption = "final",
    settings: SetOption = None,
    seed: SeedOption = 0,
    max_new_tokens: MaxNewTokensOption = 16,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where everything measured is written at once. Default: runs/TIME-MODEL.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --run-dir, or with the newest.", rich_help_panel=RUN),
    ] = False,
    fail_below: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit with status 1 unless every speedup is surely that large: its interval lies above.",
            show_default=False,
            rich_help_panel=VERDICT,
        ),
    ] = None,
    fail_below_stage: Annotated[
        str,
        typer.Option(help="Whose speedup --fail-below looks at: prefill, ttft, total, …", rich_help_panel=VERDICT),
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

    In every round all cases run on the same samples, in random order, and speedups are paired within the round. Then
    all samples are asked once for the quality. What was measured is written down at once: a run that was stopped,
    however that was, goes on with --resume. Under `torchrun` or `accelerate launch` all processes share the asking.

    [dim]mmtok compare --methods mmtok,resize --budget 64,16[/dim]
    """
    from mmtok_cli.cli.comparing import Session, check_verdict, judge
    from mmtok_cli.cli.request import Request
    from mmtok_cli.cli.showing import export, show
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.evaluation.processes import join_processes
    from mmtok_cli.files import require_writable
    from mmtok_cli.report.console import print_error
    from mmtok_cli.report.exports import EXPORTS
    from mmtok_cli.results.run_directory import NotWrittenError

    if plot:
        require_writable(plot, PLOTS, "--plot")
        if no_quality or layers is not None:
            raise MMTokError("--plot shows quality, and none is measured", "leave --plot out")
    for path in exports or []:
        require_writable(path, EXPORTS, "--export")
    request = Request(
        model=model,
        methods=methods,
        budget=budget,
        limit=limit,
        batch_size=batch_size,
        rounds=rounds,
        runs=runs,
        min_time=min_time,
        warmup=warmup,
        device=device,
        dtype=dtype,
        weights=weights,
        track=track,
        positions=positions,
        budget_means=budget_means,
        settings=settings or [],
        seed=seed,
        max_new_tokens=max_new_tokens,
        data=data,
        image_root=None if image_root is None else str(image_root),
        question=question,
        columns=columns,
        no_quality=no_quality,
        layers=layers,
        attention=attention,
        device_map=device_map,
    )
    check_verdict(fail_below, fail_below_stage)
    given = [name for name in Request.model_fields if _is_given(context, name)]
    with join_processes(device) as processes:
        if device_map is not None and processes.count > 1:
            raise MMTokError("--device-map gives one process all GPUs, and here are several", "leave it out")
        silent = quiet or not processes.is_writer
        session = Session.resumed(request, given, run_dir, silent) if resume else Session(request, run_dir, silent)
        session.pictures = any(path.suffix.lower() == ".html" for path in exports or [])
        if not processes.is_writer:
            if not dry_run:
                session.help(processes)
            return
        if dry_run:
            session.preview(as_json)
            return
        try:
            comparison, stopped = session.measure(processes)
        except NotWrittenError as error:
            print_error(error)
            raise typer.Exit(1) from error
        show(comparison, session.request.settings, as_json, quiet)
        session.tell_how_to_resume(comparison)
        if comparison.results:
            export(comparison, exports or [], session.directory, quiet)
        if plot:
            session.plot(comparison, plot)
        if stopped is not None:
            print_error(stopped)
        if not judge(comparison, fail_below, fail_below_stage) or stopped is not None or not comparison.results:
            raise typer.Exit(1)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
