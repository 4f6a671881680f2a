"""The reduction methods: making one by its name. `catalogue` lists them, `base` says how to write one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MethodFaultError, MMTokError, first_line, suggestion
from mmtok_cli.methods.catalogue import REPLAY, method_class, method_names
from mmtok_cli.methods.isolation import isolated
from mmtok_cli.methods.parameters import as_tuples, checked, parameter_types

if TYPE_CHECKING:
    from mmtok_cli.methods.base import Method

__all__ = ["accepted", "make_method", "method_class", "method_names", "unknown_parameter"]


def make_method(name: str, **parameters: Any) -> Method:
    """Build the method called `name`; `parameters` are its fields, lists as tuples.

    A method checks the range of its own parameters in `__post_init__` and raises ValueError or MMTokError. Raises
    MMTokError in either case, for an unknown name, for parameters that the method does not have or that are missing,
    and for values of another type.
    """
    kind = method_class(name)
    types = parameter_types(kind)
    for key, value in parameters.items():
        if key not in types:
            raise unknown_parameter(f"{name} has no parameter {key!r}", name, key, list(types))
        parameters[key] = checked(f"{name}.{key}", types[key], as_tuples(value), value, strict=True)
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name in types.keys() - parameters:
            setting = "replay a file by --kept FILE" if name == REPLAY else f"give one: --set {name}.{field.name}=VALUE"
            raise MMTokError(f"{name} needs a value for {field.name}", setting)
    from mmtok_cli.methods.base import package_of

    try:
        with isolated():
            method = kind(**parameters)
            hash(method)  # cases are kept in sets
    except MMTokError:
        raise
    except ValueError as error:
        raise MMTokError(f"{name}: {first_line(error)}", f"`mmtok methods {name}` lists its parameters") from error
    except Exception as error:
        message = f"{name} cannot be made: {type(error).__name__}: {first_line(error)}"
        raise MethodFaultError(message, package_of(kind)) from error
    return method


def unknown_parameter(message: str, name: str, parameter: str, known: Sequence[str]) -> MMTokError:
    """The error for a parameter that the method `name` does not have; `known` are those it has."""
    if not known:
        return MMTokError(f"{message}, nor any other", "leave it out")
    return MMTokError(f"{message}, only {', '.join(known)}", suggestion(parameter, known, f"mmtok methods {name}"))


def accepted(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that the method called `name` has."""
    types = parameter_types(method_class(name))
    return {key: value for key, value in parameters.items() if key in types}
