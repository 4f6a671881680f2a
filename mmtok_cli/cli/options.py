"""Command-line options: those of the settings, generated from the models in settings.py, and those for output."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo

from mmtok_cli.settings import PANELS, Settings, option_of

OUTPUT = "Output"
PLOTS = (".png", ".svg", ".pdf")

VISUAL = "Image or video file, or a folder with the frames of a video."
ImageArgument = Annotated[Path, typer.Argument(help=VISUAL, show_default=False)]
QuestionArgument = Annotated[str, typer.Argument(help="Question about it.", show_default=False)]

OptionalImageArgument = Annotated[Path | None, typer.Argument(help=VISUAL, show_default=False)]
OptionalQuestionArgument = Annotated[str | None, typer.Argument(help="Question about it.", show_default=False)]

ExportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--export",
        help="Also write the results to a file (.json, .csv, .md, .html), or every prediction (.jsonl). Repeatable.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress and notes.", rich_help_panel=OUTPUT)]


def with_options(settings: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of `settings`. It receives them as one object, its parameter `settings`.

    Arguments come first, then the generated options, then the command's own.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        generated = list(_parameters(settings))

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            # An option that may be repeated is None where it was not given. What was not given is left out, so that
            # settings can tell it from the default spelled out.
            context = values.get("context")
            given = {p.name: values.pop(p.name) for p in generated}
            chosen = {name: value for name, value in given.items() if value is not None and not _left(context, name)}
            return command(settings=settings.of(**chosen), **values)

        first = [p for p in own if _is_argument(p) or p.annotation is typer.Context]
        rest = [p for p in own if p not in first]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*first, *generated, *rest)]
        del run.__wrapped__  # Typer would read the signature of the command behind it
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _left(context: typer.Context | None, name: str) -> bool:
    """Whether an option was left at its default; not known without a context."""
    source = context.get_parameter_source(name) if context else None
    return source is not None and source.name == "DEFAULT"


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was spelled out on the command line; environment variables do not count."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def given_options(context: typer.Context, settings: type[Settings]) -> list[str]:
    """The fields whose options were spelled out on the command line."""
    return [name for name in settings.model_fields if is_given(context, name)]


def _parameters(settings: type[Settings]) -> Iterator[inspect.Parameter]:
    """One keyword parameter for each field, as Typer reads them."""
    by_panel = sorted(settings.model_fields.items(), key=lambda item: PANELS.index(option_of(item[1]).panel))
    for name, field in by_panel:
        option, kind, shown = option_of(field), _plain_type(field.annotation), ""
        default = field.get_default(call_default_factory=True)
        limits = {
            key: getattr(limit, attribute)
            for limit in field.metadata
            for key, attribute in (("min", "ge"), ("max", "le"))
            if hasattr(limit, attribute)
        }
        if kind is tuple and option.metavar and default == ():  # may be repeated
            kind, default = list[str] | None, None
        elif kind is tuple and default is not None:
            # Spaces let help wrap a long default instead of cutting it.
            shown = ", ".join(map(str, default)) if len(default) > 1 else ""
            kind, default = str, ",".join(map(str, default))
        elif kind is tuple:
            kind = str | None
        info = typer.Option(
            *option.names,
            help=field.description,
            rich_help_panel=option.panel,
            envvar=option.env,
            show_envvar=option.env is not None,
            metavar=option.metavar,
            show_default=shown or (default is not None and default is not False),
            autocompletion=COMPLETIONS[option.complete] if option.complete else None,
            **limits,
        )
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _plain_type(annotation: Any) -> Any:
    """The type that Typer parses: `tuple` for lists, otherwise the annotation without validators."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        plain = _plain_type(inner[0])
        return plain if plain is tuple else plain | None
    return tuple if get_origin(annotation) is tuple else annotation


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(isinstance(each, ArgumentInfo) for each in getattr(parameter.annotation, "__metadata__", ()))


def _models(incomplete: str) -> list[str]:
    from mmtok_cli.profiles import known_profiles

    return [name for name in known_profiles() if name.startswith(incomplete)]


def _methods(incomplete: str) -> list[str]:
    """The last of several methods, behind those that are typed already."""
    from mmtok_cli.methods import method_names

    typed, comma, last = incomplete.rpartition(",")
    return [typed + comma + name for name in method_names() if name.startswith(last)]


def _method_parameters(incomplete: str) -> list[str]:
    """ "fastv.layer=" for "fas"."""
    from mmtok_cli.errors import MethodFaultError
    from mmtok_cli.methods import method_class, method_names
    from mmtok_cli.methods.parameters import parameter_types

    options = []
    for name in method_names():
        if name.startswith(incomplete.partition(".")[0]):
            with suppress(MethodFaultError):
                options += [f"{name}.{parameter}=" for parameter in parameter_types(method_class(name))]
    return [option for option in options if option.startswith(incomplete)]


COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "models": _models,
    "methods": _methods,
    "parameters": _method_parameters,
}
