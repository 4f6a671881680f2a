"""`mmtok methods`: the catalogue of reduction methods."""

from __future__ import annotations

from inspect import cleandoc
from typing import Annotated, Any

import typer

from mmtok_cli.cli.options import JsonOption
from mmtok_cli.errors import MethodFaultError


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its parameters.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the reduction methods, or show one with its parameters and their defaults."""
    from mmtok_cli.methods import method_names
    from mmtok_cli.report.catalogues import (
        METHODS_LEGEND,
        PAPERS_LEGEND,
        method_details,
        methods_table,
        papers_table,
    )
    from mmtok_cli.report.console import print_json, results_console
    from mmtok_cli.report.text import printable

    listed = [_describe(name)] if name else [_describe_or_fault(each) for each in method_names()]
    if as_json:
        print_json({"schema": "mmtok.methods/1", "methods": listed})
    elif name:
        results_console().print(method_details(listed[0]))
    else:
        results_console().print(methods_table(listed))
        results_console().print(METHODS_LEGEND, style="dim")
        results_console().print(papers_table(listed))
        results_console().print(PAPERS_LEGEND, style="dim")
        for method in listed:
            if "fault" in method:
                results_console().print(printable(method["fault"]), style="yellow", markup=False)


def _describe_or_fault(name: str) -> dict[str, Any]:
    """A package that cannot be used must not hide the others."""
    try:
        return _describe(name)
    except MethodFaultError as error:
        return {"name": name, "fault": error.message}


def _describe(name: str) -> dict[str, Any]:
    from mmtok_cli.methods import method_class
    from mmtok_cli.methods.parameters import expected, parameter_defaults, parameter_types, setting_text

    method = method_class(name)
    defaults, types = parameter_defaults(method), parameter_types(method)
    return {
        "name": name,
        "summary": method.summary,
        "source": method.source,
        "venue": method.venue,
        "licence": method.licence,
        "checked": method.checked,
        "acts": method.acts(),
        "reads_question": method.reads_question,
        "training_free": method.training_free,
        "multi_turn": not method.reads_question,
        "takes_budget": method.takes_budget,
        "positions": method.positions,
        "keeps_padding": method.keeps_padding,
        "signals": list(method.signals),
        "alternative_signals": [list(names) for names in method.alternative_signals],
        "parameters": defaults,
        "expected": {parameter: expected(kind) for parameter, kind in types.items()},
        "settings": {parameter: setting_text(name, parameter, value) for parameter, value in defaults.items()},
        "description": _paragraphs(method.__doc__ or ""),
    }


def _paragraphs(text: str) -> str:
    """Text with one line per paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in cleandoc(text).split("\n\n"))
