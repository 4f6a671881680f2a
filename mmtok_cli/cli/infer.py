"""`mmtok infer`: the answer, from few vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mmtok_cli.cli.options import (
    ImageArgument,
    JsonOption,
    QuestionArgument,
    QuietOption,
    given_options,
    with_options,
)
from mmtok_cli.settings import MEASUREMENT, InferSettings, require_replay_alone, require_selections

if TYPE_CHECKING:
    from mmtok_cli.cases import Case
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.results.records import TimedRun, TurnRun
    from mmtok_cli.rules import TurnPolicy


@with_options(InferSettings)
def infer(
    context: typer.Context,
    image: ImageArgument,
    question: QuestionArgument,
    settings: InferSettings,
    more: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="A further image or video. Repeatable; <image> markers in the question say where each image goes.",
            show_default=False,
        ),
    ] = None,
    turn: Annotated[
        list[str] | None,
        typer.Option(
            "--turn",
            help="A further question, asked after the answer to the one before. Repeatable; see --turns.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also show the answer without reduction.", rich_help_panel=MEASUREMENT)
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer a question about an image or a video from few vision tokens.

    [dim]mmtok infer img.jpg "What color is the car?" --budget 64 --baseline[/dim]
    """
    from mmtok_cli.cli.engine import chosen_engine
    from mmtok_cli.cli.engine import infer as infer_by_engine
    from mmtok_cli.configuration import configured_model, one_case, with_writer
    from mmtok_cli.conversation import check_conversation, require_policy
    from mmtok_cli.data.samples import Turn, require_question, sample_from_file
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.report.console import ConsoleProgress
    from mmtok_cli.timing.runner import run_case
    from mmtok_cli.timing.turns import run_conversation

    require_replay_alone(settings, given_options(context, InferSettings))
    engine = chosen_engine(context, settings)
    opened = sample_from_file(image, question, *(more or ()), sampling=settings.sampling)
    if engine != "transformers":
        infer_by_engine(settings, opened, baseline, as_json, quiet)
        return
    if not turn and (settings.turns != "reuse" or settings.encode_again):
        option = "--encode-again" if settings.encode_again else "--turns"
        raise MMTokError(f"{option} requires --turn", 'ask a further question, as in --turn "Is it red?"')
    if settings.encode_again:
        require_selections([settings.turns])
    if turn and settings.draft:
        raise MMTokError("--draft is measured with single questions, not with --turn", "omit one of them")
    progress = ConsoleProgress(quiet)
    case, full = one_case(settings)
    cases = [case, full] if baseline else [case]
    policy = cast("TurnPolicy", settings.turns)
    if turn:
        require_policy(case.method, policy)
    for further in turn or ():
        require_question(further)
    sample = replace(opened, later=tuple(map(Turn, turn or ())))
    model = configured_model(settings, progress)
    cases = with_writer(cases, settings, progress)
    case.check(model, [sample])
    check_conversation(model, sample)
    most, again = settings.max_new_tokens, settings.encode_again
    with progress.task("answering"):
        for _ in range(2):  # the first run chooses kernels and allocates memory; it is not timed
            if turn:
                talks = [run_conversation(model, case, policy, sample, most, encode_again=again)]
                talks += [run_conversation(model, each, "reuse", sample, most) for each in cases[1:]]
            else:
                runs = [run_case(model, each, [sample], most) for each in cases]
    if turn:
        _show_conversation(settings, cases, sample, talks, model.weights, as_json)
    else:
        _show(settings, cases, sample, runs, model.weights, as_json)


def _show(
    settings: InferSettings,
    cases: Sequence[Case],
    sample: Sample,
    runs: Sequence[TimedRun],
    weights: str,
    as_json: bool,
) -> None:
    """The answer of each case, and what it took."""
    from rich.text import Text

    from mmtok_cli.report.console import print_json, results_console
    from mmtok_cli.report.tables import answer_table, short_text
    from mmtok_cli.report.text import printable, printable_lines

    if as_json:
        first, *rest = map(_as_json, runs)
        print_json(_head(settings, cases[0], sample) | first | ({"baseline": rest[0]} if rest else {}))
        return
    out = results_console()
    for each, run in zip(cases, runs, strict=True):
        name = f"{printable(each)}: " if len(cases) > 1 else ""
        out.print(Text.assemble((name, "bold"), printable_lines(run.answers[0])))
        if run.drafts:
            out.print(Text.assemble(("draft: ", "bold"), printable_lines(run.drafts[0])), style="dim")
    out.print(answer_table([printable(each) for each in cases], runs))
    _show_remarks(settings, cases[0], sample, weights, short_text(runs[0].tokens[0]))


def _show_conversation(
    settings: InferSettings,
    cases: Sequence[Case],
    sample: Sample,
    talks: Sequence[Sequence[TurnRun]],
    weights: str,
    as_json: bool,
) -> None:
    """Each question with the answer of each case, and what it took."""
    from rich.text import Text

    from mmtok_cli.report.console import print_json, results_console
    from mmtok_cli.report.tables import short_text
    from mmtok_cli.report.text import printable, printable_lines
    from mmtok_cli.report.turns import conversation_table

    questions = [turn.question for turn in sample.turns]
    if as_json:
        first, *rest = ([_turn_as_json(*pair) for pair in zip(questions, talk, strict=True)] for talk in talks)
        head = _head(settings, cases[0], sample) | {"policy": settings.turns, "encode_again": settings.encode_again}
        print_json(head | {"turns": first} | ({"baseline": {"turns": rest[0]}} if rest else {}))
        return
    out = results_console()
    for number, question in enumerate(questions):
        out.print(Text(printable_lines(question), style="italic"))
        for each, talk in zip(cases, talks, strict=True):
            name = f"{printable(each)}: " if len(cases) > 1 else ""
            out.print(Text.assemble("  ", (name, "bold"), printable_lines(talk[number].answer)))
    for each, talk in zip(cases, talks, strict=True):
        out.print(conversation_table(printable(each), talk))
    _show_remarks(settings, cases[0], sample, weights, short_text(talks[0][0].tokens))


def _show_remarks(settings: InferSettings, case: Case, sample: Sample, weights: str, short: str) -> None:
    from mmtok_cli.report.console import results_console
    from mmtok_cli.report.tables import equivalent_notes, pixels_text, rules_text, weights_text
    from mmtok_cli.results.schema import equivalents_of
    from mmtok_cli.rules import NATIVE

    rules, elsewhere = rules_text(settings.rules, settings.parameters), equivalent_notes(equivalents_of([case.id]))
    frames = f"frames sampled: {', '.join(map(str, sample.frames))}" if sample.frames else ""
    pixels = "" if settings.pixels == NATIVE else pixels_text(settings.pixels)
    for remark in filter(None, (short, frames, rules, weights_text(weights), pixels, *elsewhere)):
        results_console().print(remark, style="dim", markup=False)


def _head(settings: InferSettings, case: Case, sample: Sample) -> dict[str, Any]:
    """What the JSON of an answer and of a conversation begins with. frames: of each video, if there are any."""
    return {
        "schema": "mmtok.infer/1",
        "model": settings.model,
        "weights": settings.weights,
        "quantization": settings.quantization,
        "method": case.name,
        "parameters": case.id.parameters,
        "budget": case.id.budget,
        "image_scale": case.id.image_scale,
        "pixels": settings.pixels,
        **({"frames": sample.frames} if sample.frames else {}),
        "equivalents": {} if case.budget is None else case.budget.engine_settings,
        "rules": asdict(settings.rules),
    }


def _turn_as_json(question: str, turn: TurnRun) -> dict[str, Any]:
    return {
        "question": question,
        "answer": turn.answer,
        "tokens": {**asdict(turn.tokens), "new": turn.steps},
        "seconds": turn.seconds,
        "memory": {"kv_cache": turn.kv_cache, "encoder_outputs": turn.encoder_outputs},
    }


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
