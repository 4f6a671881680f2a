"""`mmtok infer`: the answer, from few vision tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmtok_cli.cli.options import (
    MEASUREMENT,
    AttentionOption,
    BudgetMeansOption,
    BudgetOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ImageArgument,
    JsonOption,
    MaxNewTokensOption,
    MethodOption,
    ModelOption,
    PositionsOption,
    QuestionArgument,
    QuietOption,
    SeedOption,
    SetOption,
    TrackOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from mmtok_cli.results.records import TimedRun


def infer(
    image: ImageArgument,
    question: QuestionArgument,
    model: ModelOption = "demo",
    method: MethodOption = "mmtok",
    budget: BudgetOption = "64",
    more: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="A further image. Repeatable; <image> in the question says where each stands.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Put the unreduced answer beside it.", rich_help_panel=MEASUREMENT)
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "pretrained",
    attention: AttentionOption = "sdpa",
    device_map: DeviceMapOption = None,
    track: TrackOption = "released",
    positions: PositionsOption = None,
    budget_means: BudgetMeansOption = "final",
    settings: SetOption = None,
    seed: SeedOption = 0,
    max_new_tokens: MaxNewTokensOption = 64,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer a question about an image from few vision tokens.

    [dim]mmtok infer img.jpg "What color is the car?" --budget 64 --baseline[/dim]
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.cli.session import make_case, make_setup, open_model
    from mmtok_cli.data.samples import sample_from_file

    setup = make_setup(
        [method], model, seed, track=track, positions=positions, budget_means=budget_means, settings=settings
    )
    wanted = Budget.parse(budget)
    sample = sample_from_file(image, question, *(more or ()))
    case = make_case(method, wanted, setup)
    cases = [case, make_case("full", None, setup)] if baseline else [case]
    vlm = open_model(model, device, dtype, weights, quiet, attention=attention, device_map=device_map)

    from rich.text import Text

    from mmtok_cli.report.console import notes_console, print_json, results_console
    from mmtok_cli.report.tables import answer_table, rules_text, weights_text
    from mmtok_cli.timing.runner import run_case

    with notes_console(quiet).status("answering"):
        for each in cases:  # kernels are chosen and memory is claimed in a first run, which is not timed
            run_case(vlm, each, [sample], max_new_tokens)
        runs = [run_case(vlm, each, [sample], max_new_tokens) for each in cases]
    if as_json:
        first, *rest = (_as_json(run) for run in runs)
        shown = None if case.budget is None else str(case.budget)
        head = {"schema": "mmtok.infer/1", "model": model, "weights": weights, "method": method, "budget": shown}
        rules = {"rules": asdict(setup.rules)}
        print_json(head | rules | first | ({"baseline": rest[0]} if rest else {}))
        return
    out = results_console()
    for each, run in zip(cases, runs, strict=True):
        out.print(Text.assemble((f"{each}: " if baseline else "", "bold"), run.answers[0]))
    out.print(answer_table([str(each) for each in cases], runs))
    for remark in filter(None, (rules_text(setup.rules, settings), weights_text(vlm.weights))):
        out.print(remark, style="dim", markup=False)


def _as_json(run: TimedRun) -> dict[str, Any]:
    tokens = run.tokens[0]
    return {
        "answer": run.answers[0],
        "tokens": {**asdict(tokens), "new": run.steps},
        "positions": run.positions,
        "seconds": run.seconds,
        "memory": {"peak": run.peak, "kv_cache": run.kv_cache, "host": run.host},
    }
