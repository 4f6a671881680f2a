"""Which folders may import from which, and what must not be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmtok_cli

PACKAGE = Path(mmtok_cli.__file__).parent
SHARED = {"tokens", "budget", "errors", "rules", "stages", "values", "video"}
ALLOWED = {
    "methods": SHARED | {"methods", "kept"},
    "models": SHARED | {"models", "profiles"},
    "data": {"errors", "data", "demo", "stages", "video"},
    "decoding": {"models", "errors", "values"},
    "configuration": {"methods", "models", "settings", "cases", "drafts", "image_scale"}
    | {"budget", "errors", "progress", "rules"},
    "fallback": SHARED
    | {"cases", "configuration", "data", "drafts", "image_plan", "lengths", "models", "profiles"}
    | {"progress", "settings", "timing"},
    "settings": {"budget", "errors", "option_values", "protocols", "rules", "video"},
    "option_values": {"budget", "errors", "rules"},
    "protocols": {"errors"},
    "kept": {"errors", "files", "tokens"},
    "progress": {"errors"},
    "planning": {"cases", "data", "profiles", "results", "option_values", "settings", "errors", "rules"},
    "api": SHARED
    | {"cases", "comparison", "configuration", "conversation", "data", "evaluation", "methods", "models", "pipeline"}
    | {"results", "retention", "settings", "timing"},
    "hooks": SHARED | {"methods"},
    "lengths": {"data", "errors", "models", "video"},
    "image_scale": SHARED | {"models", "methods"},
    "image_plan": SHARED | {"models", "methods", "hooks", "image_scale"},
    "pipeline": SHARED | {"models", "methods", "data", "decoding", "image_plan", "image_scale", "hooks"},
    "conversation": SHARED | {"models", "methods", "data", "decoding", "image_plan", "pipeline"},
    # Plain data: neither what measures it nor what runs a model.
    "results": {"__version__", "results", "kept", "data", "settings", "budget", "errors", "files", "rules", "stages"},
    "drafts": SHARED | {"option_values", "pipeline", "models", "methods", "data"},
    "encodings": SHARED | {"cases", "data", "image_plan", "image_scale", "methods", "models", "pipeline"},
    "cases": SHARED | {"drafts", "pipeline", "models", "methods", "results", "data"},
    "timing": SHARED
    | {
        "timing",
        "cases",
        "encodings",
        "hooks",
        "conversation",
        "pipeline",
        "decoding",
        "models",
        "methods",
        "results",
        "data",
    }
    | {"files", "option_values", "settings"},
    "evaluation": SHARED
    | {
        "evaluation",
        "cases",
        "encodings",
        "pipeline",
        "decoding",
        "models",
        "methods",
        "results",
        "data",
    },
    "summary": {"evaluation", "precision", "stages", "timing", "results", "turns"},
    "precision": SHARED | {"cases", "data", "models", "pipeline", "results"},
    "turns": {"evaluation", "timing", "results"},
    "report": SHARED | {"report", "results", "planning", "progress", "option_values", "settings", "files", "profiles"},
    "integrations": SHARED
    | {
        "integrations",
        "api",
        "cases",
        "configuration",
        "data",
        "decoding",
        "environment",
        "evaluation",
        "files",
        "hooks",
    }
    | {"image_plan", "methods", "models", "pipeline", "profiles", "progress", "results", "settings", "timing"},
    "demo": {"demo", "errors", "models"},
    "tokens": {"errors", "values"},
    "values": {"errors"},
    "stages": set(),
    "video": set(),
    "errors": set(),
    "engines": {"errors"},
    "budget": {"errors"},
    "rules": {"errors"},
    "profiles": {"errors"},
    "files": {"errors"},
    "outputs": {"data", "errors", "files", "option_values", "profiles", "results", "settings"},
    "environment": {"__version__", "timing", "results", "models"},
}


PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROGRAMS = {"tensorboard", "torch-tb-profiler"}  # declared to be run, not to be imported

# The checks run methods on tiny models of every family, which `methods` itself must not know.
EXCEPTIONS = {"methods/testing.py": {"models", "image_plan", "pipeline", "data"}}


def declared(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def packages(paths: Iterable[Path]) -> set[str]:
    """The packages, apart from this one and Python's own, that files import from."""
    owners = packages_distributions()
    beside = {path.stem for path in paths} | {"mmtok_cli"}
    found: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {name.split(".")[0] for name in names}
    found -= sys.stdlib_module_names | beside
    return {canonicalize_name(owners.get(name, [name])[0]) for name in found}


def test_what_is_imported_is_declared() -> None:
    """A package that comes along with another may be gone with that one's next release."""
    needed, extras = declared(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    names = ("accelerate", "datasets", "gpu", "lmms", "quantization", "video", "vllm")
    optional = declared(requirement for name in names for requirement in extras[name])
    checks = PACKAGE / "methods" / "testing.py"  # those who use it test with pytest
    used = packages([path for path in PACKAGE.rglob("*.py") if path != checks])
    assert used <= needed | optional and needed - PROGRAMS <= used
    in_tests = packages([*Path(__file__).parent.rglob("*.py"), checks])
    assert in_tests <= needed | optional | declared(extras["test"])


def modules() -> dict[str, Path]:
    """All modules of the package but the package itself, by name."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del names["mmtok_cli"]
    return names


def imports(path: Path) -> set[str]:
    """What a file imports from this package, by dotted name; for types and within functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("mmtok_cli.")}


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports from."""
    return {name.split(".")[1] for name in imports(path)}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        more = EXCEPTIONS.get(path.relative_to(PACKAGE).as_posix(), set())
        assert imported(path) <= ALLOWED[room] | more, path


def test_integrations_are_imported_where_they_are_asked_for() -> None:
    """What runs inside other programs is not needed to run without them."""
    files = [path for path in PACKAGE.rglob("*.py") if "integrations" in imported(path)]
    assert {path.relative_to(PACKAGE).parts[0] for path in files} == {"integrations", "serving.py", "comparison.py"}


def test_no_modules_import_each_other() -> None:
    """Directly or through others, imports for types included."""
    paths = modules()
    graph = {
        name: {found if found in paths else found.rpartition(".")[0] for found in imports(path)} & paths.keys()
        for name, path in paths.items()
    }

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reached = {name: reachable(name) for name in graph}
    circles = {name: {other for other in reached[name] if name in reached[other]} for name in graph}
    assert not {name: circle for name, circle in circles.items() if circle}


@pytest.mark.parametrize(
    "module",
    [
        "results.schema",
        "results.run_directory",
        "results.merge",
        "results.progress",
        "results.profile",
        "timing.summary",
        "summary",
    ],
)
def test_saved_results_are_read_without_torch_and_scipy(module: str) -> None:
    script = f"import sys, mmtok_cli.{module}; print(*sys.modules.keys() & {{'torch', 'transformers', 'scipy'}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_print_outside_the_report() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints or path.parent.name == "report", path


def test_methods_widen_numbers_where_apple_gpus_can() -> None:
    """An Apple GPU has no float64; `in_float64` moves what it is given."""
    for path in (PACKAGE / "methods").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        widened = [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "double"]
        assert not widened or path.name == "cosine.py", (path, widened)
