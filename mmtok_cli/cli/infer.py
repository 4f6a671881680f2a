"""`mmtok infer`: the answer, from few vision tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmtok_cli.cli.options import ImageArgument, JsonOption, QuestionArgument, QuietOption, with_options
from mmtok_cli.settings import MEASUREMENT, InferSettings

if TYPE_CHECKING:
    from mmtok_cli.results.records import TimedRun


@with_options(InferSettings)
def infer(
    image: ImageArgument,
    question: QuestionArgument,
    settings: InferSettings,
    more: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="A further image. Repeatable; <image> markers in the question say where each image goes.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also show the answer without reduction.", rich_help_panel=MEASUREMENT)
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer a question about an image from few vision tokens.

    [dim]mmtok infer img.jpg "What color is the car?" --budget 64 --baseline[/dim]
    """
    from rich.text import Text

    from mmtok_cli.configuration import configured_model, one_case, with_writer
    from mmtok_cli.data.samples import sample_from_file
    from mmtok_cli.report.console import ConsoleProgress, print_json, results_console
    from mmtok_cli.report.tables import answer_table, rules_text, short_text, weights_text
    from mmtok_cli.report.text import printable, printable_lines
    from mmtok_cli.timing.runner import run_case

    progress = ConsoleProgress(quiet)
    case, full = one_case(settings)
    cases = [case, full] if baseline else [case]
    sample = sample_from_file(image, question, *(more or ()))
    model = configured_model(settings, progress)
    cases = with_writer(cases, settings, progress)
    case.check(model, [sample])
    with progress.task("answering"):
        for each in cases:  # the first run chooses kernels and allocates memory; it is not timed
            run_case(model, each, [sample], settings.max_new_tokens)
        runs = [run_case(model, each, [sample], settings.max_new_tokens) for each in cases]
    if as_json:
        first, *rest = map(_as_json, runs)
        head = {
            "schema": "mmtok.infer/1",
            "model": settings.model,
            "weights": settings.weights,
            "method": settings.method,
            "parameters": case.id.parameters,
            "budget": case.id.budget,
            "rules": asdict(settings.rules),
        }
        print_json(head | first | ({"baseline": rest[0]} if rest else {}))
        return
    out = results_console()
    for each, run in zip(cases, runs, strict=True):
        name = f"{printable(each)}: " if baseline else ""
        out.print(Text.assemble((name, "bold"), printable_lines(run.answers[0])))
        if run.drafts:
            out.print(Text.assemble(("draft: ", "bold"), printable_lines(run.drafts[0])), style="dim")
    out.print(answer_table([printable(each) for each in cases], runs))
    rules = rules_text(settings.rules, settings.parameters)
    for remark in filter(None, (short_text(runs[0].tokens[0]), rules, weights_text(model.weights))):
        out.print(remark, style="dim", markup=False)


def _as_json(run: TimedRun) -> dict[str, Any]:
    tokens = run.tokens[0]
    return {
        "answer": run.answers[0],
        **({"draft": run.drafts[0]} if run.drafts else {}),
        "tokens": {**asdict(tokens), "new": run.steps},
        "positions": run.positions,
        "seconds": run.seconds,
        "memory": {"peak": run.peak, "kv_cache": run.kv_cache, "host": run.host},
    }
