"""The catalogue of reduction methods: ours by name, other packages' through the entry points `mmtok.methods`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MMTokError, suggestion

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
    """Every method that can be asked for by name."""
    return [*BUILT_IN, *sorted(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in BUILT_IN)]


def method_class(name: str) -> type[Method]:
    """The class behind a name. Raises MMTokError, with the nearest names, for one that nobody registered."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return point.load()
    raise MMTokError(f"there is no method {name!r}", suggestion(name, method_names(), "mmtok methods"))


def make_method(name: str, **parameters: Any) -> Method:
    """Build the method called `name`; `parameters` are its fields, lists as tuples. Raises MMTokError for an unknown
    name."""
    fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    return method_class(name)(**fixed)


def accepted(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that the method called `name` has."""
    fields = method_class(name).__dataclass_fields__
    return {key: value for key, value in parameters.items() if key in fields}
