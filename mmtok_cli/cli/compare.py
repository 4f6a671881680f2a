"""`mmtok compare`: methods x budgets, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtok_cli.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PLOTS,
    REDUCTION,
    BudgetMeansOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
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


def compare(
    model: ModelOption = "demo",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; `full` is always measured.", rich_help_panel=REDUCTION)
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
    limit: Annotated[int, typer.Option(min=1, help="Samples to ask.", rich_help_panel=MEASUREMENT)] = 80,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per run.", rich_help_panel=MEASUREMENT)] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over all cases, each on the next batch of samples. Default: until every sample was asked.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    warmup: WarmupOption = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "pretrained",
    track: TrackOption = "released",
    positions: PositionsOption = None,
    budget_means: BudgetMeansOption = "final",
    settings: SetOption = None,
    seed: SeedOption = 0,
    max_new_tokens: MaxNewTokensOption = 16,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot of quality against tokens and time (.png, .svg, .pdf).", rich_help_panel=OUTPUT),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare methods and budgets: latency, speedup, memory and quality on held-out questions.

    In every round all cases run on the same samples, in random order, and speedups are paired within the round.

    [dim]mmtok compare --methods mmtok,resize --budget 64,16[/dim]
    """
    from mmtok_cli.budget import parse_budgets
    from mmtok_cli.cli.session import make_cases, make_setup, open_model
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.files import require_writable

    if plot:
        require_writable(plot, PLOTS, "--plot")
    if batch_size > limit:
        raise MMTokError(f"--limit {limit} is less than one batch of {batch_size}", "raise it, or lower --batch-size")
    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    setup = make_setup(
        names, model, seed, track=track, positions=positions, budget_means=budget_means, settings=settings
    )
    chosen = parse_budgets(budget) if budget is not None else None
    cases = make_cases(names, chosen, setup)
    vlm = open_model(model, device, dtype, weights, quiet)

    from mmtok_cli.bench.flops import count_flops
    from mmtok_cli.bench.results import Comparison, Schedule
    from mmtok_cli.bench.runner import run_case, run_rounds
    from mmtok_cli.bench.schedule import interleaved
    from mmtok_cli.bench.summary import summarise_cases
    from mmtok_cli.data.samples import batches, demo_samples
    from mmtok_cli.environment import environment_of
    from mmtok_cli.report import console as report
    from mmtok_cli.report import tables

    notes = report.notes_console(quiet)
    whole = limit - limit % batch_size
    if whole < limit:
        notes.print(f"asking {whole} of {limit} samples: whole batches of {batch_size}, so that all runs are alike")
    groups = list(batches(demo_samples(whole), batch_size))
    for case in cases:
        case.check(vlm, [sample for group in groups for sample in group])
    order = interleaved(len(cases), rounds or len(groups), seed)
    done = []
    interrupted = False
    with report.progress_bar(quiet) as progress:
        task = progress.add_task("warming up", total=len(cases))
        flops = []
        for case in cases:
            flops.append(count_flops(vlm, case, groups[0], max_new_tokens))
            for _ in range(warmup):
                run_case(vlm, case, groups[0], max_new_tokens)
            progress.advance(task)
        progress.update(task, description="measuring", total=len(order), completed=0)
        try:
            for runs in run_rounds(vlm, cases, groups, order, max_new_tokens=max_new_tokens):
                done.append(runs)
                progress.advance(task)
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True

    comparison = Comparison(
        model=model,
        rules=setup.rules,
        environment=environment_of(vlm),
        schedule=Schedule(
            data="demo",
            seed=seed,
            max_new_tokens=max_new_tokens,
            samples=sum(len(group) for group in groups[: len(done)]),
            batch_size=batch_size,
            rounds=len(done),
            warmup=warmup,
            order=order[: len(done)],
        ),
        interrupted=interrupted,
        results=summarise_cases(cases, done, flops),
    )
    if as_json:
        report.print_json(comparison)
    else:
        out = report.results_console()
        rules = tables.rules_text(setup.rules, settings)
        out.print(
            f"{report.printable(model)}: {comparison.schedule.samples} samples, batches of {batch_size}, seed {seed}"
            + (f"; {rules}" if rules else "")
        )
        out.print(tables.speed_table(comparison))
        out.print(tables.quality_table(comparison))
        if kinds := tables.kind_table(comparison):
            out.print(kinds)
        out.print(tables.environment_line(model, comparison.environment))
        for note in [tables.ceiling(comparison.results[0]), *tables.comparison_notes(comparison)]:
            notes.print(f"• {note}")
    if plot:
        from mmtok_cli.report.plots import save_tradeoff

        save_tradeoff(comparison, plot)
        notes.print(f"wrote {report.printable(plot)}", soft_wrap=True)
