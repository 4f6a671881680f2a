"""The catalogue of reduction methods: the built-in ones, and those that other packages register as entry points."""

from __future__ import annotations

import re
import traceback
from importlib import import_module
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok_cli.errors import MethodFaultError, MMTokError, first_line, suggestion
from mmtok_cli.methods.isolation import isolated

if TYPE_CHECKING:
    from mmtok_cli.methods.base import Method

BUILT_IN = {
    "full": "mmtok_cli.methods.full:Full",
    "none": "mmtok_cli.methods.none:NoVision",
    "mmtok": "mmtok_cli.methods.mmtok:MMTok",
    "mmtok:text": "mmtok_cli.methods.mmtok:TextCoverage",
    "mmtok:vision": "mmtok_cli.methods.mmtok:VisionCoverage",
    "mmtok:stack": "mmtok_cli.methods.stacktok:StackTok",
    "mmtok:loop": "mmtok_cli.methods.greedy_loop:GreedyLoop",
    "random": "mmtok_cli.methods.random:Random",
    "random:inside": "mmtok_cli.methods.random:RandomInside",
    "uniform": "mmtok_cli.methods.uniform:Uniform",
    "uniform:frames": "mmtok_cli.methods.uniform:UniformFrames",
    "visionzip": "mmtok_cli.methods.visionzip:VisionZip",
    "vispruner": "mmtok_cli.methods.vispruner:VisPruner",
    "divprune": "mmtok_cli.methods.divprune:DivPrune",
    "cdpruner": "mmtok_cli.methods.cdpruner:CDPruner",
    "gots": "mmtok_cli.methods.gots:GOTS",
    "scope": "mmtok_cli.methods.scope:SCOPE",
    "hiprune": "mmtok_cli.methods.hiprune:HiPrune",
    "otprune": "mmtok_cli.methods.otprune:OTPrune",
    "fastv": "mmtok_cli.methods.fastv:FastV",
    "sparsevlm": "mmtok_cli.methods.sparsevlm:SparseVLM",
    "sparsevlm:v2": "mmtok_cli.methods.sparsevlm:SparseVLM2",
    "pyramiddrop": "mmtok_cli.methods.pyramiddrop:PyramidDrop",
    "dart": "mmtok_cli.methods.dart:DART",
    "v2drop": "mmtok_cli.methods.v2drop:V2Drop",
    "pace": "mmtok_cli.methods.pace:PACE",
    "evs": "mmtok_cli.methods.evs:EVS",
    "vidcom2": "mmtok_cli.methods.vidcom2:VidCom2",
    "resize": "mmtok_cli.methods.resize:Resize",
    "resize:pool": "mmtok_cli.methods.pool:Pool",
}
REPLAY = "kept"  # needs a file, so it is not listed; see --kept
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
    if name in BUILT_IN or name == REPLAY:
        module, _, attribute = (BUILT_IN | {REPLAY: "mmtok_cli.methods.kept:Replay"})[name].partition(":")
        return getattr(import_module(module), attribute)
    points = _entry_points()
    if name in points:
        return _loaded(points[name])
    raise MMTokError(f"there is no method {name!r}", suggestion(name, method_names(), "mmtok methods"))


def _entry_points() -> dict[str, EntryPoint]:
    """The methods of other packages by name; of packages with the same name, the one that is imported."""
    try:
        points = [*entry_points(group=ENTRY_POINTS)]
    except Exception:  # metadata that cannot be read: the others are found one by one, which takes far longer
        points = _readable_entry_points()
    return {point.name: point for point in reversed(points) if point.name not in BUILT_IN}


def _readable_entry_points() -> list[EntryPoint]:
    found: dict[str, list[EntryPoint]] = {}
    for package in distributions():
        try:
            found.setdefault(package.metadata["Name"], [*package.entry_points.select(group=ENTRY_POINTS)])
        except Exception:  # metadata that cannot be read belongs to no method
            continue
    return [point for points in found.values() for point in points]


def _loaded(point: EntryPoint) -> type[Method]:
    """The class behind an entry point. Raises MethodFaultError naming the package where it is not a usable method."""
    from mmtok_cli.methods.declaration import declaration_fault

    package = _package_of(point)
    try:
        with isolated():
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


def _package_of(point: EntryPoint) -> str:
    """The name of an entry point's package, or its code's where the package's metadata cannot be read."""
    try:
        return (point.dist and point.dist.name) or point.value
    except Exception:
        return point.value
