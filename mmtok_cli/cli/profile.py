"""`mmtok profile`: where the time and the memory go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtok_cli.cli.options import (
    MEASUREMENT,
    OUTPUT,
    BudgetMeansOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    MethodOption,
    ModelOption,
    PositionsOption,
    QuietOption,
    SeedOption,
    SetOption,
    TrackOption,
    WarmupOption,
    WeightsOption,
)


def profile(
    image: Annotated[
        Path | None, typer.Argument(help="Image file. Default: a drawn scene.", show_default=False)
    ] = None,
    question: Annotated[
        str, typer.Argument(help="Question about the image. Default: one about the scene.", show_default=False)
    ] = "What is in the image?",
    model: ModelOption = "demo",
    method: MethodOption = "mmtok",
    budget: BudgetOption = "64",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each case.", rich_help_panel=MEASUREMENT)] = 20,
    warmup: WarmupOption = 3,
    max_new_tokens: MaxNewTokensOption = 16,
    top: Annotated[int, typer.Option(min=1, help="Operators to list for each stage.", rich_help_panel=OUTPUT)] = 5,
    trace_dir: Annotated[
        Path, typer.Option(help="Directory for the profiler's traces.", rich_help_panel=OUTPUT)
    ] = Path("traces"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "pretrained",
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

    [dim]mmtok profile --method mmtok --budget 64[/dim]
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.cli.session import make_cases, make_setup, open_model
    from mmtok_cli.data.samples import demo_samples, sample_from_file
    from mmtok_cli.files import require_writable_directory

    setup = make_setup(
        [method], model, seed, track=track, positions=positions, budget_means=budget_means, settings=settings
    )
    cases = make_cases([method], [Budget.parse(budget)], setup)
    sample = demo_samples(1)[0] if image is None else sample_from_file(image, question)

    require_writable_directory(trace_dir, "--trace-dir")
    vlm = open_model(model, device, dtype, weights, quiet)

    from mmtok_cli.bench.flops import count_flops
    from mmtok_cli.bench.results import Profile, Schedule
    from mmtok_cli.bench.runner import run_case, run_rounds
    from mmtok_cli.bench.schedule import interleaved
    from mmtok_cli.bench.summary import summarise_cases
    from mmtok_cli.bench.traces import trace_case
    from mmtok_cli.environment import environment_of
    from mmtok_cli.report import console as report
    from mmtok_cli.report import tables

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

    result = Profile(
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
        cases=summarise_cases(cases, rounds, flops),
        stage_peaks={str(case): trace.peaks for case, trace in zip(cases, traces, strict=True)},
        operators=[operator for trace in traces for operator in trace.operators],
        trace=str(trace_dir),
    )
    if as_json:
        report.print_json(result)
        return
    out = report.results_console()
    out.print(tables.stage_table(result))
    out.print(tables.cost_table(result))
    for trace in traces:
        out.print(tables.operator_table(trace.operators, top))
    out.print(tables.environment_line(model, result.environment))
    for trace in traces:
        out.print(f"wrote {report.printable(trace.path)}", soft_wrap=True)
    notes = report.notes_console(quiet)
    baseline, *others = result.cases
    for note in [
        *filter(None, [tables.rules_text(setup.rules, settings)]),
        tables.ceiling(baseline),
        *tables.layer_notes(result.cases),
        *tables.inconclusive_notes(others, tables.COMPARED),
    ]:
        notes.print(f"• {note}")
    if interrupted:
        notes.print(f"• interrupted: {len(rounds)} of {runs} runs were timed")
    notes.print(f"• open the traces with `tensorboard --logdir {report.printable(trace_dir)}`, tab PyTorch Profiler,")
    notes.print("  or drop one of the files on https://ui.perfetto.dev")
