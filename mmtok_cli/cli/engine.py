"""`mmtok infer`, `profile` and `compare` through a serving engine: `--engine vllm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmtok_cli.cli.options import is_given
from mmtok_cli.engines import Engine, require_engine, require_options

if TYPE_CHECKING:
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.outputs import Inputs
    from mmtok_cli.results.engine import EngineComparison, EngineProfile
    from mmtok_cli.serving import Answered
    from mmtok_cli.settings import CompareSettings, EngineSettings, InferSettings, ProfileSettings


def chosen_engine(context: typer.Context, settings: EngineSettings) -> Engine:
    """The engine of a command line. Raises MMTokError for one that does not exist or is not installed, and for options
    that do not go with it."""
    engine = require_engine(settings.engine)
    given = {param.name: param.opts[0] for param in context.command.params if param.name}
    require_options(
        engine, context.command.name or "", {name: option for name, option in given.items() if is_given(context, name)}
    )
    return engine


def infer(settings: InferSettings, sample: Sample, baseline: bool, as_json: bool, quiet: bool) -> None:
    """Answer one question."""
    from mmtok_cli.configuration import one_case
    from mmtok_cli.report.console import ConsoleProgress, print_json, results_console
    from mmtok_cli.report.engine import answer_lines, answer_table
    from mmtok_cli.report.tables import SHORT, equivalent_notes, rules_text, weights_text
    from mmtok_cli.report.text import printable
    from mmtok_cli.results.schema import equivalents_of
    from mmtok_cli.serving import answer

    case, full = one_case(settings)
    cases = [case, full] if baseline else [case]
    found = answer(settings, cases, sample, ConsoleProgress(quiet))
    if as_json:
        head = {
            "schema": "mmtok.engine-infer/1",
            "engine": found.engine,
            "model": settings.model,
            "weights": found.environment.weights,
            "method": settings.method,
            "parameters": case.id.parameters,
            "budget": case.id.budget,
            "equivalents": {} if case.budget is None else case.budget.engine_settings,
            "rules": asdict(settings.rules),
        }
        first, *rest = (_as_json(found, number) for number in range(len(cases)))
        print_json(head | first | ({"baseline": rest[0]} if rest else {}))
        return
    out, names = results_console(), [printable(each) for each in cases]
    for line in answer_lines(names, found.runs):
        out.print(line)
    out.print(answer_table(names, found.runs))
    rules = rules_text(settings.rules, settings.parameters)
    short = SHORT if found.short else ""
    same = equivalent_notes(equivalents_of([case.id]))
    for remark in filter(
        None, (short, rules, weights_text(found.environment.weights), *same, f"answered by {found.engine}")
    ):
        out.print(remark, style="dim", markup=False)


def _as_json(found: Answered, number: int) -> dict[str, Any]:
    run = found.runs[number]
    (request,) = run.requests
    return {
        "answer": request.answer,
        "tokens": {
            "total": request.vision,
            "kept": request.kept,
            "text": request.prompt - request.kept,
            "new": request.new,
        },
        "seconds": request.seconds,
        "engine_seconds": run.busy,
    }


def profile(
    settings: ProfileSettings,
    sample: Sample | None,
    size: str | None,
    exports: Sequence[Path],
    inputs: Inputs,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure cases under load. sample: what is asked; None for the data of the settings. size: of the pictures."""
    from mmtok_cli.outputs import check_outputs, outputs_of
    from mmtok_cli.report.console import ConsoleProgress
    from mmtok_cli.report.engine import EXPORTS, head_line, load_notes, load_tables
    from mmtok_cli.serving import load_samples, profile_load

    check_outputs(outputs_of([("--export", path, EXPORTS) for path in exports]), inputs)
    samples, data = load_samples(settings, sample, size)
    found = profile_load(settings, samples, data, ConsoleProgress(quiet))
    _show(found, exports, head_line, load_tables, load_notes, as_json, quiet)


def compare(settings: CompareSettings, exports: Sequence[Path], as_json: bool, quiet: bool) -> None:
    """Compare the quality of answers."""
    from mmtok_cli.outputs import check_outputs, comparison_inputs, outputs_of
    from mmtok_cli.report.console import ConsoleProgress
    from mmtok_cli.report.engine import EXPORTS, quality_head, quality_notes, quality_tables
    from mmtok_cli.report.exports import PREDICTIONS
    from mmtok_cli.serving import compare_quality

    outputs = outputs_of([("--export", path, (*EXPORTS, PREDICTIONS)) for path in exports])
    check_outputs(outputs, comparison_inputs(settings, None, outputs))
    found = compare_quality(settings, ConsoleProgress(quiet))
    _show(found, exports, quality_head, quality_tables, quality_notes, as_json, quiet)


def _show(
    found: Any,
    exports: Sequence[Path],
    head: Callable[[Any], str],
    tables: Callable[[Any], Sequence[Any]],
    notes: Callable[[Any], Sequence[str]],
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the files, then show the result. Ends with status 130 if it was interrupted, 1 if a part failed."""
    from mmtok_cli.cli.showing import save
    from mmtok_cli.report.console import attempt_all, print_json
    from mmtok_cli.report.engine import write_engine_result

    lines = notes(found)
    parts: list[Callable[[], object]] = [
        partial(save, partial(write_engine_result, found, path, lines), path, quiet) for path in exports
    ]
    shown = partial(print_json, found) if as_json else partial(_print, found, head, tables, lines, quiet)
    done = attempt_all([*parts, shown])
    if found.interrupted:
        raise typer.Exit(130)
    if not done or getattr(found, "failure", None):
        raise typer.Exit(1)


def _print(
    found: EngineProfile | EngineComparison,
    head: Callable[[Any], str],
    tables: Callable[[Any], Sequence[Any]],
    lines: Sequence[str],
    quiet: bool,
) -> None:
    """Tables on standard output, notes on standard error."""
    from mmtok_cli.report.console import notes_console, results_console
    from mmtok_cli.report.engine import engine_line
    from mmtok_cli.report.text import printable, printable_record

    result = printable_record(found)
    out, notes = results_console(), notes_console(quiet)
    out.print(head(result), markup=False, highlight=False)
    for table in tables(result):
        out.print(table)
    out.print(engine_line(result.model, result.engine, result.environment), style="dim", markup=False)
    for line in lines:
        notes.print(f"• {printable(line)}")
