"""The catalogue of reduction methods: the built-in ones, and those that other packages register as entry points."""

from __future__ import annotations

import re
import sys
import traceback
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok_cli.errors import MethodFaultError, MMTokError, first_line, suggestion

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


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_:-]{0,63}")


def method_names() -> list[str]:
    """The names of all methods, those of other packages last, including those that cannot be used."""
    return [*BUILT_IN, *sorted(_entry_points())]


def method_class(name: str) -> type[Method]:
    """The class of the method called `name`.

    Raises MMTokError, with the nearest names, for an unknown one, and MethodFaultError for a class of another package
    that cannot be used.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    points = _entry_points()
    if name in points:
        return _loaded(points[name])
    raise MMTokError(f"there is no method {name!r}", suggestion(name, method_names(), "mmtok methods"))


def _entry_points() -> dict[str, EntryPoint]:
    """The methods of other packages by name; of packages with the same name, the one that is imported."""
    found: dict[str, EntryPoint] = {}
    seen = set()
    for package in distributions():
        try:
            name, points = package.metadata["Name"], package.entry_points.select(group=ENTRY_POINTS)
        except Exception:  # metadata that cannot be read belongs to no method
            continue
        if name not in seen:
            found = {point.name: point for point in points if point.name not in BUILT_IN} | found
        seen.add(name)
    return found


def _loaded(point: EntryPoint) -> type[Method]:
    """The class behind an entry point. Raises MethodFaultError naming the package where it is not a usable method."""
    from mmtok_cli.methods.declaration import declaration_fault

    package = point.dist.name if point.dist else point.value
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results
            found = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever another package raises on import, SystemExit as well
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__}, {Path(frame.filename).name}, line {frame.lineno}"
        message = f"the method {point.name!r} of {package} cannot be imported: {first_line(error)} ({where})"
        raise MethodFaultError(message, package) from error
    fault = declaration_fault(found)
    if not NAME.fullmatch(point.name):
        fault = "its name must consist of letters, digits, hyphens, underscores and colons"
    if fault:
        raise MethodFaultError(f"the method {point.name!r} of {package} cannot be used: {fault}", package)
    return found
