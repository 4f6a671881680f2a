"""`mmtok methods`: the catalogue of reduction methods."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from mmtok_cli.cli.options import JsonOption


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its parameters.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the reduction methods, or show one with its parameters and their defaults."""
    from mmtok_cli.methods import method_names
    from mmtok_cli.report.catalogues import method_details, methods_table
    from mmtok_cli.report.console import print_json, results_console

    listed = [_describe(each) for each in ([name] if name else method_names())]
    if as_json:
        print_json({"schema": "mmtok.methods/1", "methods": listed})
    elif name:
        results_console().print(method_details(listed[0]))
    else:
        results_console().print(methods_table(listed))


def _describe(name: str) -> dict[str, Any]:
    from mmtok_cli.methods import method_class

    method = method_class(name)
    return {
        "name": name,
        "summary": method.summary,
        "source": method.source,
        "acts": method.acts,
        "reads_question": method.reads_question,
        "parameters": {field.name: field.default for field in fields(method)},
        "description": " ".join((method.__doc__ or "").split()),
    }
