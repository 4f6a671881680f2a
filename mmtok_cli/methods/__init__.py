"""The catalogue of reduction methods: the built-in ones, and those that other packages register as entry points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MMTokError, first_line, suggestion

if TYPE_CHECKING:
    from mmtok_cli.methods.base import Method

BUILT_IN = {
    "full": "mmtok_cli.methods.full:Full",
    "none": "mmtok_cli.methods.none:NoVision",
    "mmtok": "mmtok_cli.methods.mmtok:MMTok",
    "mmtok:text": "mmtok_cli.methods.mmtok:TextCoverage",
    "mmtok:vision": "mmtok_cli.methods.mmtok:VisionCoverage",
    "mmtok:loop": "mmtok_cli.methods.greedy_loop:GreedyLoop",
    "random": "mmtok_cli.methods.random:Random",
    "random:inside": "mmtok_cli.methods.random:RandomInside",
    "uniform": "mmtok_cli.methods.uniform:Uniform",
    "visionzip": "mmtok_cli.methods.visionzip:VisionZip",
    "vispruner": "mmtok_cli.methods.vispruner:VisPruner",
    "divprune": "mmtok_cli.methods.divprune:DivPrune",
    "cdpruner": "mmtok_cli.methods.cdpruner:CDPruner",
    "fastv": "mmtok_cli.methods.fastv:FastV",
    "sparsevlm": "mmtok_cli.methods.sparsevlm:SparseVLM",
    "sparsevlm:v2": "mmtok_cli.methods.sparsevlm:SparseVLM2",
    "pyramiddrop": "mmtok_cli.methods.pyramiddrop:PyramidDrop",
    "resize": "mmtok_cli.methods.resize:Resize",
    "resize:pool": "mmtok_cli.methods.pool:Pool",
}
ENTRY_POINTS = "mmtok.methods"


def method_names() -> list[str]:
    """The names of all methods, those of other packages last."""
    return [*BUILT_IN, *sorted(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in BUILT_IN)]


def method_class(name: str) -> type[Method]:
    """The class of the method called `name`.

    Raises MMTokError, with the nearest names, for an unknown one, and for another package's class that cannot be used.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return _loaded(point)
    raise MMTokError(f"there is no method {name!r}", suggestion(name, method_names(), "mmtok methods"))


def make_method(name: str, **parameters: Any) -> Method:
    """Build the method called `name`; `parameters` are its fields, lists as tuples.

    A method checks its own parameters in `__post_init__` and raises ValueError or MMTokError. Raises MMTokError in
    either case, for an unknown name, and for parameters that the method does not have or that are missing.
    """
    method = method_class(name)
    known = [field for field in fields(method) if field.init]
    unknown = [parameter for parameter in parameters if parameter not in {field.name for field in known}]
    if unknown:
        raise unknown_parameter(f"{name} has no parameter {unknown[0]!r}", name, unknown[0], [f.name for f in known])
    for field in known:
        if field.default is MISSING and field.default_factory is MISSING and field.name not in parameters:
            raise MMTokError(f"{name} needs a value for {field.name}", f"give one: --set {name}.{field.name}=VALUE")
    fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    try:
        return method(**fixed)
    except ValueError as error:
        raise MMTokError(f"{name}: {first_line(error)}", f"`mmtok methods {name}` lists its parameters") from error


def unknown_parameter(message: str, name: str, parameter: str, known: Sequence[str]) -> MMTokError:
    """The error for a parameter that the method `name` does not have; `known` are those it has."""
    if not known:
        return MMTokError(f"{message}, nor any other", "leave it out")
    return MMTokError(f"{message}, only {', '.join(known)}", suggestion(parameter, known, f"mmtok methods {name}"))


def _loaded(point: EntryPoint) -> type[Method]:
    """The class behind an entry point. Raises MMTokError naming the package where it is not a usable method."""
    from mmtok_cli.methods.base import Method

    package = point.dist.name if point.dist else point.value
    hint = f"report it to the authors of {package}, or uninstall that package"
    try:
        found = point.load()
    except Exception as error:  # whatever another package raises on import
        raise MMTokError(
            f"the method {point.name} of {package} cannot be imported: {first_line(error)}", hint
        ) from error
    fault = None
    if not (isinstance(found, type) and issubclass(found, Method)):
        fault = "it is not a subclass of mmtok_cli.methods.base.Method"
    elif "__dataclass_fields__" not in vars(found):
        fault = "it has no @dataclass(frozen=True) decorator, so its parameters are not seen"
    elif not getattr(found, "summary", ""):
        fault = "it has no summary: ClassVar[str]"
    if fault:
        raise MMTokError(f"the method {point.name} of {package} cannot be used: {fault}", hint)
    return found


def accepted(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that the method called `name` has."""
    fields = method_class(name).__dataclass_fields__
    return {key: value for key, value in parameters.items() if key in fields}
