"""Parameters of methods from the command line and from profiles, checked against the types of the fields."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import method_class, method_names, unknown_parameter

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_settings(texts: Sequence[str], running: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Values by method and parameter from texts such as `fastv.layer=3`; a later text for the same parameter wins.

    running: the methods that are to be run. Raises MMTokError for a text that cannot be read, a method that is not
    among them, an unknown parameter, and a value of the wrong type.
    """
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    for text in texts:
        name, parameter, value = _split(text)
        types = parameter_types(name)
        if name not in running:
            raise MMTokError(
                f"--set {text} has no effect: {name} is not among the methods",
                f"methods of this run: {', '.join(running)}",
            )
        if parameter not in types:
            raise unknown_parameter(f"{name} has no parameter {parameter!r}", name, parameter, list(types))
        parsed = _parse(types[parameter], value)
        settings[name][parameter] = _checked(f"{name}.{parameter}", types[parameter], parsed, value, strict=False)
    return dict(settings)


def profile_parameters(name: str, tables: Mapping[str, Mapping[str, Any]], profile: str) -> dict[str, Any]:
    """The parameters that a profile sets for a method. A table for X also applies to its variants X:y.

    tables: parameters by method, as TOML has them. Raises MMTokError naming the profile and the key for a parameter
    that neither the method nor a variant of it has, and for a value of another type.
    """
    base, mine = name.partition(":")[0], parameter_types(name)
    variants = [other for other in method_names() if other.partition(":")[0] == base]
    values = {}
    for parameter, value in tables.get(base, {}).items():
        if parameter in mine:
            key = f"methods.{base}.{parameter} of the profile {profile}"
            values[parameter] = _checked(key, mine[parameter], _hashable(value), value, strict=True)
        elif not any(parameter in parameter_types(other) for other in variants):
            message = f"the profile {profile} sets methods.{base}.{parameter}, but {base} has no such parameter"
            raise unknown_parameter(message, base, parameter, list(mine))
    return values


def parameter_types(name: str) -> dict[str, Any]:
    """The parameters of a method and their types. Raises MMTokError for an unknown method."""
    method = method_class(name)
    try:
        hints = get_type_hints(method)
    except NameError:  # types that are imported for type checkers only
        hints = {field.name: type(field.default) for field in fields(method)}
    return {field.name: hints[field.name] for field in fields(method) if field.init}


def parameter_defaults(name: str) -> dict[str, Any]:
    """The parameters of a method and their defaults, None where there is none."""
    defaults = {}
    for field in fields(method_class(name)):
        made = field.default_factory() if field.default_factory is not MISSING else None
        if field.init:
            defaults[field.name] = made if field.default is MISSING else field.default
    return defaults


def setting_text(name: str, parameter: str, value: Any) -> str:
    """A parameter as `--set` takes it: `sparsevlm.layers=2,6,15`."""
    return f"{name}.{parameter}={','.join(map(str, value)) if isinstance(value, tuple) else _lower_none(value)}"


def expected(kind: Any) -> str:
    """The values of a type, in words."""
    options = get_args(kind)
    if NoneType in options:
        return " or ".join([*(expected(option) for option in options if option is not NoneType), "none"])
    if get_origin(kind) is Literal:
        return " or ".join(map(str, options))
    if get_origin(kind) is tuple and options[-1] is Ellipsis:
        return f"{expected(options[0])}, or several with commas between"
    return WORDS.get(kind, str(kind))


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


def _hashable(value: Any) -> Any:
    """Lists as tuples, since methods are frozen and kept in sets."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _checked(key: str, kind: Any, value: Any, shown: Any, *, strict: bool) -> Any:
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=strict)
    except ValidationError as error:
        raise MMTokError(f"{key} cannot be {shown!r}", f"it takes {expected(kind)}") from error
    except PydanticUserError as error:
        raise MMTokError(f"{key} cannot be set: it is {expected(kind)}", "set it in Python") from error


def _lower_none(value: Any) -> str:
    return "none" if value is None else str(value)
