"""The parameters of a method class: their types, their defaults, and whether a value fits."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmtok_cli.errors import MMTokError

if TYPE_CHECKING:
    from mmtok_cli.methods.base import Method

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def parameter_types(kind: type[Method]) -> dict[str, Any]:
    """The parameters of a method and their types."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # types that are imported for type checkers only
        hints = {field.name: type(field.default) for field in fields(kind)}
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def parameter_defaults(kind: type[Method]) -> dict[str, Any]:
    """The parameters of a method and their defaults, None where there is none."""
    defaults = {}
    for field in fields(kind):
        made = field.default_factory() if field.default_factory is not MISSING else None
        if field.init:
            defaults[field.name] = made if field.default is MISSING else field.default
    return defaults


def is_supported(kind: Any) -> bool:
    """Whether values of a type can be written on the command line and in a profile."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return all(isinstance(option, (str, int)) for option in options)
    if get_origin(kind) is tuple:
        return len(options) == 2 and options[1] is Ellipsis and options[0] in WORDS
    if NoneType in options:
        return all(option is NoneType or is_supported(option) for option in options)
    return kind in WORDS


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
    return WORDS[kind]


def checked(key: str, kind: Any, value: Any, shown: Any, *, strict: bool) -> Any:
    """The value as one of type `kind`.

    key, shown: the parameter and its value for the message. strict: text does not count as a number.
    Raises MMTokError for a value of another type.
    """
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=strict)
    except ValidationError as error:
        raise MMTokError(f"{key} cannot be {shown!r}", f"it takes {expected(kind)}") from error


def as_tuples(value: Any) -> Any:
    """Lists as tuples, since methods are frozen and kept in sets."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _lower_none(value: Any) -> str:
    return "none" if value is None else str(value)
