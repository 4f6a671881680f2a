"""Runs `mmtok` hundreds of times: one process imports torch and the rest, and a fork of it runs each command.

As a program this is the server: it reads one request per line on standard input and answers each with one line.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

TIMED_OUT = -signal.SIGALRM
MEMORY = 6 * 2**30  # bytes of address space that a command may use beyond those of the server


@dataclass(frozen=True)
class Done:
    """A command that has ended. status: negative for a signal. peak: bytes of memory, those of the server included."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    peak: int


class ForkServer:
    """A server process, to be used in a `with` block."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONPATH": paths}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MMTOK_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=inherited | settings,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def run(
        self,
        arguments: Sequence[str],
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        packages: str = "",
        limit: int = 120,
    ) -> Done:
        """Run `mmtok` with these arguments in a directory.

        packages: a directory of installed packages, put on the path of imports. limit: seconds after which the command
        is killed.
        """
        request = {
            "arguments": list(arguments),
            "directory": str(directory),
            "environment": dict(environment or {}),
            "packages": packages,
            "limit": limit,
        }
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    _respect_permissions()
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open("r+") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    _warm_up()
    for line in requests:
        replies.write(json.dumps(asdict(_run(json.loads(line)))) + "\n")
        replies.flush()


def _warm_up() -> None:
    """Import what commands import when they run, by running some and importing the modules of the rest."""
    import mmtok_cli
    from mmtok_cli.cli.main import app

    image = str(Path(mmtok_cli.__file__).parent / "demo" / "example.png")
    for command in (["infer", image, "What is it?"], ["compare", "--dry-run", "--limit", "1", "--methods", "none"]):
        app([*command, "--json"], standalone_mode=False)
    for module in pkgutil.walk_packages(mmtok_cli.__path__, "mmtok_cli."):
        if not module.name.startswith(("mmtok_cli.demo.", "mmtok_cli.integrations", "mmtok_cli.__main__")):
            importlib.import_module(module.name)


def _run(request: Mapping[str, Any]) -> Done:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(request, out, err)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        said = [_content(file) for file in (out, err)]
    return Done(os.waitstatus_to_exitcode(status), *said, seconds, usage.ru_maxrss * 1024)


def _child(request: Mapping[str, Any], out: BinaryIO, err: BinaryIO) -> None:
    """Run one command in place of this process."""
    status: Any = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        signal.alarm(request["limit"])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        os.chdir(request["directory"])
        os.environ.update(request["environment"])
        if request["packages"]:
            sys.path.insert(0, str(Path(request["packages"]).absolute()))
        sys.argv = ["mmtok", *request["arguments"]]
        from mmtok_cli.cli.main import main

        main()
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status if isinstance(status, int) else 1)


def _content(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(2**20).decode("utf-8", "backslashreplace")


def _respect_permissions() -> None:
    """Let the superuser meet "permission denied" as everybody else does (Linux)."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return
    version_3, override, search = 0x20080522, 1, 2  # see capabilities(7)
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of capabilities above 31
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets) == 0:
        for each in range(3):
            sets[each] &= ~(1 << override | 1 << search)
        libc.capset(header, sets)


if __name__ == "__main__":
    _serve()
