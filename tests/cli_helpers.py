"""Running the command line in tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from mmtok_cli.cli.main import app

QUESTION = "Is there a red circle?"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run_process(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """`mmtok` in a process of its own, in which the code `before` runs first."""
    code = f"{before}\nfrom mmtok_cli.cli.main import main\nmain()\n"
    command = [sys.executable, "-c", code, *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(result: Result, *words: str) -> None:
    """Exit status 2, nothing on standard output, one line that names the fault, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ") and len(rest) <= 1 and all(line.startswith("hint: ") for line in rest)
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
