"""What the class of a method must declare."""

from __future__ import annotations

from dataclasses import MISSING, fields
from inspect import getdoc
from typing import Any, get_args

from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.parameters import checked, is_supported, parameter_defaults, parameter_types
from mmtok_cli.rules import Positions

FLAGS = ("reads_question", "training_free", "takes_budget", "exact", "nested", "per_crop", "keeps_padding")


def declaration_fault(kind: Any) -> str | None:
    """What is wrong with the class of a method, in words; None if nothing is."""
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        return "it is not a subclass of mmtok_cli.methods.base.Method"
    if "__dataclass_fields__" not in vars(kind) or not vars(kind)["__dataclass_params__"].frozen:
        return "it has no @dataclass(frozen=True) decorator"
    return (
        _fault_of_annotations(kind) or _fault_of_attributes(kind) or _fault_of_hooks(kind) or _fault_of_parameters(kind)
    )


def _fault_of_annotations(kind: type[Method]) -> str | None:
    """Attributes that are parameters by mistake, and parameters that are not."""
    for field in fields(kind):
        if hasattr(Method, field.name) or field.name == "summary":
            return f"{field.name} describes the class: annotate it as ClassVar, or it is a parameter"
    annotated = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}
    for name, value in vars(kind).items():
        if not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple)) and name not in annotated:
            return f"{name} has no annotation: write {name}: {type(value).__name__}, or ClassVar if it is no parameter"
    return None


def _fault_of_attributes(kind: type[Method]) -> str | None:
    summary = getattr(kind, "summary", None)
    if not isinstance(summary, str) or not summary.strip() or not summary.isprintable():
        return "it has no summary: ClassVar[str], a few words for the list of methods"
    description = getdoc(kind) or ""
    if not vars(kind).get("__doc__") or not description or description.startswith(f"{kind.__name__}("):
        return "it has no docstring, which `mmtok methods NAME` prints"
    for name in ("source", "venue", "licence", "checked"):
        if not isinstance(getattr(kind, name), str):
            return f"{name} must be text, not {getattr(kind, name)!r}"
    for name in FLAGS:
        if not isinstance(getattr(kind, name), bool):
            return f"{name} must be True or False, not {getattr(kind, name)!r}"
    if kind.positions not in get_args(Positions):
        return f"positions must be one of {', '.join(get_args(Positions))}, not {kind.positions!r}"
    choices = (kind.signals, *kind.alternative_signals) if isinstance(kind.alternative_signals, tuple) else (None,)
    if not all(isinstance(names, tuple) and all(isinstance(name, str) for name in names) for names in choices):
        return "signals must be a tuple of names, and alternative_signals a tuple of such tuples"
    if not isinstance(kind.matrices, (int, float)) or not kind.matrices >= 0:
        return f"matrices must be a number, not {kind.matrices!r}"
    return None


def _fault_of_hooks(kind: type[Method]) -> str | None:
    if (kind.choose is Method.choose) != (kind.cuts is Method.cuts):
        return "cuts and choose belong together: override both or neither"
    if kind.selects() and kind.cuts is not Method.cuts and kind.entering is Method.entering:
        return "it overrides select and cuts: override entering too, the number of tokens between the two"
    if kind.acts() == "nowhere":
        return "it overrides none of the hooks resize, select and cuts"
    return None


def _fault_of_parameters(kind: type[Method]) -> str | None:
    try:
        types, defaults = parameter_types(kind), parameter_defaults(kind)
    except Exception as error:  # an annotation that cannot be evaluated, or a factory that fails
        return f"its parameters cannot be read: {first_line(error)}"
    for field in fields(kind):
        if not field.init:
            continue
        if not is_supported(types[field.name]):
            return (
                f"its parameter {field.name} has an unsupported type: annotate it as int, float, bool, str, a Literal, "
                "tuple[int, ...] (or of float or str), or one of these or None"
            )
        if field.default is MISSING and field.default_factory is MISSING:
            continue
        try:
            checked(
                f"the default of {field.name}",
                types[field.name],
                defaults[field.name],
                defaults[field.name],
                strict=True,
            )
        except MMTokError as error:
            return f"{error.message}: {error.hint}"
    return None
