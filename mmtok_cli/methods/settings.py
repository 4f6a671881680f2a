"""Parameters of methods from the command line (`--set`) and from profiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from mmtok_cli.errors import MethodFaultError, MMTokError
from mmtok_cli.methods import method_class, method_names, unknown_parameter
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.parameters import as_tuples, checked, parameter_types


def read_settings(texts: Sequence[str], running: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Values by method and parameter from texts such as `fastv.layer=3`; a later text for the same parameter wins.

    running: the methods that are to be run. Raises MMTokError for a text that cannot be read, a method that is not
    among them, an unknown parameter, and a value of the wrong type.
    """
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    for text in texts:
        name, parameter, value = _split(text)
        types = parameter_types(method_class(name))
        if name not in running:
            raise MMTokError(
                f"--set {text} has no effect: {name} is not among the methods",
                f"methods of this run: {', '.join(running)}",
            )
        if parameter not in types:
            raise unknown_parameter(f"{name} has no parameter {parameter!r}", name, parameter, list(types))
        parsed = _parse(types[parameter], value)
        settings[name][parameter] = checked(f"{name}.{parameter}", types[parameter], parsed, value, strict=False)
    return dict(settings)


def settings_of(name: str, method: Method) -> list[str]:
    """The parameters of a method as texts that `read_settings` reads. What cannot be written is left at its default."""
    values = {parameter: getattr(method, parameter) for parameter in parameter_types(method_class(name))}
    return [f"{name}.{parameter}={_text(value)}" for parameter, value in values.items() if value != ()]


def _text(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def profile_parameters(name: str, tables: Mapping[str, Mapping[str, Any]], profile: str) -> dict[str, Any]:
    """The parameters that a profile sets for a method. A table for X also applies to its variants X:y.

    tables: parameters by method, as TOML has them. Raises MMTokError naming the profile and the key for a parameter
    that neither the method nor a variant of it has, and for a value of another type.
    """
    base, mine = name.partition(":")[0], parameter_types(method_class(name))
    values = {}
    for parameter, value in tables.get(base, {}).items():
        if parameter in mine:
            key = f"methods.{base}.{parameter} of the profile {profile}"
            values[parameter] = checked(key, mine[parameter], as_tuples(value), value, strict=True)
        elif parameter not in _parameters_of_variants(base):
            message = f"the profile {profile} sets methods.{base}.{parameter}, but {base} has no such parameter"
            raise unknown_parameter(message, base, parameter, list(mine))
    return values


def _parameters_of_variants(base: str) -> set[str]:
    """The parameters of a method and its variants; those that cannot be used have none."""
    found: set[str] = set()
    for name in method_names():
        if name.partition(":")[0] == base:
            try:
                found |= parameter_types(method_class(name)).keys()
            except MethodFaultError:
                continue
    return found


def _split(text: str) -> tuple[str, str, str]:
    target, equals, value = text.partition("=")
    name, dot, parameter = (part.strip() for part in target.partition("."))
    if not (equals and dot and name and parameter and value.strip()):
        raise MMTokError(f"--set {text!r} cannot be read", "write METHOD.PARAMETER=VALUE, as in --set fastv.layer=3")
    return name, parameter, value.strip()


def _parse(kind: Any, text: str) -> Any:
    """Text as pydantic expects it for a type."""
    options = [option for option in get_args(kind) if option is not NoneType]
    if NoneType in get_args(kind):
        return None if text.lower() == "none" else _parse(options[0], text) if len(options) == 1 else text
    if get_origin(kind) is Literal:
        return next((option for option in options if str(option) == text), text)
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(","))
    return text
