"""What answers in a fraction of a second because it imports neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmtok_cli.methods.catalogue import BUILT_IN

HEAVY = ("torch", "transformers", "scipy", "matplotlib")
COMMAND = "from mmtok_cli.cli.main import app; app({arguments}, standalone_mode=False)"


def imported_by(code: str) -> set[str]:
    """Those of the slow modules that a new process has imported after `code`."""
    ask = f"{code}\nimport sys\nsys.stderr.write(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["methods"], ["methods", "--json"], ["methods", "fastv"], ["models"]], ids=" ".join
)
def test_catalogues_import_no_torch(arguments: list[str]) -> None:
    assert imported_by(COMMAND.format(arguments=arguments)) == set()


def test_import_of_the_package_imports_no_torch() -> None:
    assert imported_by("import mmtok_cli") == set()


def test_no_method_imports_torch_before_it_is_run() -> None:
    code = f"from mmtok_cli.methods import make_method\nfor name in {list(BUILT_IN)!r}: make_method(name)"
    assert imported_by(code) == set()
