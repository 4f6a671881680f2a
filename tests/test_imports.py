"""Which folders may import from which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmtok_cli

PACKAGE = Path(mmtok_cli.__file__).parent
SHARED = {"tokens", "crops", "budget", "errors", "rules"}
ALLOWED = {
    "methods": SHARED | {"methods"},
    "models": SHARED | {"models", "profiles"},
    "data": {"errors", "data", "demo"},
    "decoding": {"models"},
    "configuration": {"methods", "models"},
    "api": SHARED | {"models", "methods", "data", "pipeline", "configuration", "timing"},
    "pipeline": SHARED | {"models", "methods", "data", "decoding"},
    **dict.fromkeys(
        ("timing", "evaluation", "results"),  # until the plan and the summary have left results
        SHARED
        | {
            "__version__",
            "timing",
            "evaluation",
            "results",
            "pipeline",
            "decoding",
            "data",
            "models",
            "methods",
            "files",
        },
    ),
    "report": {"report", "results", "timing", "errors", "files", "profiles", "rules"},
    "demo": {"demo", "errors", "models"},
    "tokens": {"crops"},  # for a type alone
    "crops": {"tokens", "errors"},
    "errors": set(),
    "budget": {"errors"},
    "rules": {"errors"},
    "profiles": {"errors"},
    "files": {"errors"},
    "environment": {"__version__", "timing", "results", "models"},
}


# The checks run methods on tiny models of every family, which `methods` itself must not know.
EXCEPTIONS = {"methods/testing.py": {"models", "pipeline", "data"}}


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports from."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] if node.module != "mmtok_cli" else [f"mmtok_cli.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("mmtok_cli.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        more = EXCEPTIONS.get(path.relative_to(PACKAGE).as_posix(), set())
        assert imported(path) <= ALLOWED[room] | more, path


def test_no_print_outside_the_report() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints or path.parent.name == "report", path
