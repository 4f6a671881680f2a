"""`mmtok profile`: where the time and the memory go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmtok_cli.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PLOTS,
    REDUCTION,
    AttentionOption,
    BudgetMeansOption,
    BudgetOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
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

if TYPE_CHECKING:
    from mmtok_cli.cases import Case
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.models.base import VisionLanguageModel
    from mmtok_cli.results.profile import CeilingProfile, ScalingProfile

SCALING_TOKENS = "576,1024,2304,4096,9216,16384"


def profile(
    image: Annotated[
        Path | None, typer.Argument(help="Image file. Default: a drawn scene.", show_default=False)
    ] = None,
    question: Annotated[
        str, typer.Argument(help="Question about the image. Default: one about the scene.", show_default=False)
    ] = "What is in the image?",
    model: ModelOption = "demo",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Reduction methods (see `mmtok methods`), separated by commas.",
            rich_help_panel=REDUCTION,
        ),
    ] = "mmtok",
    budget: BudgetOption = "64",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each case.", rich_help_panel=MEASUREMENT)] = 20,
    warmup: WarmupOption = 3,
    max_new_tokens: MaxNewTokensOption = 16,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Time selection and prefill against the number of vision tokens, too.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    scaling_tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of vision tokens for --scaling, squares. Default: {SCALING_TOKENS}.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Operators to list for each stage.", rich_help_panel=OUTPUT)] = 5,
    trace_dir: Annotated[
        Path, typer.Option(help="Directory for the profiler's traces.", rich_help_panel=OUTPUT)
    ] = Path("traces"),
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot of what --scaling measures (.png, .svg, .pdf).", rich_help_panel=OUTPUT),
    ] = None,
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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time every stage with and without reduction, and write torch profiler traces of both.

    Timing and tracing happen in separate runs, since a profiler slows down what it watches.

    [dim]mmtok profile --method mmtok,divprune --budget 64 --scaling --plot scaling.png[/dim]
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.cli.session import make_cases, make_setup, open_model
    from mmtok_cli.data.samples import demo_samples, sample_from_file
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.files import require_writable, require_writable_directory
    from mmtok_cli.timing.scaling import parse_tokens

    if not scaling and (plot or scaling_tokens):
        option = "--plot" if plot else "--scaling-tokens"
        raise MMTokError(f"{option} is for --scaling alone", "add --scaling")
    names = list(dict.fromkeys(name.strip() for name in method.split(",") if name.strip()))
    setup = make_setup(
        names, model, seed, track=track, positions=positions, budget_means=budget_means, settings=settings
    )
    cases = make_cases(names, [Budget.parse(budget)], setup)
    sample = demo_samples(1)[0] if image is None else sample_from_file(image, question)

    require_writable_directory(trace_dir, "--trace-dir")
    if plot:
        require_writable(plot, PLOTS, "--plot")
    sizes = parse_tokens(scaling_tokens or SCALING_TOKENS)
    vlm = open_model(model, device, dtype, weights, quiet, layers=layers, attention=attention, device_map=device_map)

    from mmtok_cli.environment import environment_of
    from mmtok_cli.report import console as report
    from mmtok_cli.report import tables
    from mmtok_cli.report.plots import save_scaling
    from mmtok_cli.report.profiles import ceiling_notes, ceiling_table, profile_tables
    from mmtok_cli.report.scaling import growth_table, scaling_notes, scaling_table
    from mmtok_cli.results.profile import CeilingProfile, ScalingProfile
    from mmtok_cli.results.schedule import interleaved
    from mmtok_cli.results.schema import Schedule
    from mmtok_cli.timing.ceilings import achieved, measure_ceilings, weights_read
    from mmtok_cli.timing.flops import count_flops
    from mmtok_cli.timing.runner import run_case, run_rounds
    from mmtok_cli.timing.scaling import check_scaling
    from mmtok_cli.timing.summary import summarise_cases
    from mmtok_cli.timing.traces import trace_case

    if scaling:
        check_scaling(vlm, cases, sample, sizes)
    order = interleaved(len(cases), runs, seed)
    with report.progress_bar(quiet) as progress:
        task = progress.add_task("warming up", total=len(cases) * warmup)
        for case in cases:
            for _ in range(warmup):
                run_case(vlm, case, [sample], max_new_tokens)
                progress.advance(task)
        progress.update(task, description="timing", total=runs, completed=0)
        rounds = []
        interrupted = False
        try:
            for done in run_rounds(vlm, cases, [[sample]], order, max_new_tokens=max_new_tokens):
                rounds.append(done)
                progress.advance(task)
        except KeyboardInterrupt:
            if not rounds:
                raise
            interrupted = True
        progress.update(task, description="tracing", total=len(cases), completed=0)
        flops = []
        traces = []
        for case in cases:
            flops.append(count_flops(vlm, case, [sample], max_new_tokens))
            traces.append(trace_case(vlm, case, [sample], trace_dir, max_new_tokens))
            progress.advance(task)
        progress.update(task, description="ceilings", total=None)
        ceilings = measure_ceilings(vlm.device, vlm.dtype)

    results, read = summarise_cases(cases, rounds, flops), weights_read(vlm)
    result = CeilingProfile(
        model=model,
        parameters=vlm.parameter_count,
        rules=setup.rules,
        environment=environment_of(vlm),
        schedule=Schedule(
            data="demo" if image is None else str(image),
            seed=seed,
            max_new_tokens=max_new_tokens,
            samples=1,
            batch_size=1,
            rounds=len(rounds),
            warmup=warmup,
            order=order[: len(rounds)],
        ),
        interrupted=interrupted,
        cases=results,
        stage_peaks={str(case): trace.peaks for case, trace in zip(cases, traces, strict=True)},
        operators=[operator for trace in traces for operator in trace.operators],
        trace=str(trace_dir),
        ceilings=ceilings,
        weights_read=read,
        achieved=achieved(results, read),
    )
    if scaling:
        result = _with_scaling(vlm, cases, sample, sizes, result, runs, quiet)
    notes = report.notes_console(quiet)
    if plot and isinstance(result, ScalingProfile):
        save_scaling(result, plot)
        notes.print(f"wrote {report.printable(plot)}", soft_wrap=True)
    if as_json:
        report.print_json(result)
        return
    out = report.results_console()
    for table in [*profile_tables(result), ceiling_table(result)]:
        out.print(table)
    for trace in traces:
        out.print(tables.operator_table(trace.operators, top))
    if isinstance(result, ScalingProfile):
        out.print(scaling_table(result.scaling))
        out.print(growth_table(result.growth, sizes))
    out.print(tables.environment_line(model, result.environment))
    for trace in traces:
        out.print(f"wrote {report.printable(trace.path)}", soft_wrap=True)
    baseline, *others = result.cases
    for note in [
        *filter(None, [tables.rules_text(setup.rules, settings)]),
        tables.ceiling(baseline),
        *tables.layer_notes(result.cases),
        *tables.inconclusive_notes(others, tables.COMPARED),
        *ceiling_notes(result),
        *(scaling_notes(result, vlm.context_length) if isinstance(result, ScalingProfile) else []),
    ]:
        notes.print(f"• {note}")
    if interrupted:
        notes.print(f"• interrupted: {len(rounds)} of {runs} runs were timed")
    if isinstance(result, ScalingProfile) and result.interrupted:
        reached = len({point.tokens for point in result.scaling})
        notes.print(f"• interrupted: {reached} of {len(sizes)} numbers of tokens were measured")
    notes.print(f"• open the traces with `tensorboard --logdir {report.printable(trace_dir)}`, tab PyTorch Profiler,")
    notes.print("  or drop one of the files on https://ui.perfetto.dev")


def _with_scaling(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    sample: Sample,
    sizes: Sequence[int],
    profile: CeilingProfile,
    runs: int,
    quiet: bool,
) -> ScalingProfile:
    """The profile with what is measured against the number of tokens: as far as that went, if it is interrupted."""
    from mmtok_cli.report.console import progress_bar
    from mmtok_cli.results.profile import ScalingPoint, ScalingProfile
    from mmtok_cli.timing.scaling import growth_of, measure_size, smallest_size

    smallest = smallest_size(model, cases, sample, sizes)
    points: dict[int, list[ScalingPoint]] = {}
    interrupted = profile.interrupted
    with progress_bar(quiet) as progress:
        task = progress.add_task("scaling", total=len(sizes) + (smallest is not None))
        try:
            for tokens in [] if interrupted else [*filter(None, [smallest]), *sizes]:
                progress.update(task, description=f"{tokens} tokens")
                points[tokens] = measure_size(
                    model,
                    cases,
                    sample,
                    tokens,
                    runs=runs,
                    warmup=profile.schedule.warmup,
                    seed=profile.schedule.seed,
                )
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    fixed = points.pop(smallest, []) if smallest else []
    scaling = [point for measured in points.values() for point in measured]
    return ScalingProfile(
        **profile.model_dump(by_alias=True) | {"interrupted": interrupted},
        scaling=scaling,
        growth=list(growth_of(scaling, fixed)),
        fixed=fixed,
    )
