"""Running code of methods that other packages bring: what it prints, raises or changes must not reach other cases."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

Setting = tuple[str, Callable[[], Any], Callable[[Any], Any]]


class GlobalStateError(Exception):
    """The code changed the state of the whole process; it was restored."""


@contextmanager
def isolated() -> Iterator[None]:
    """Standard output is for results: prints go to standard error. Raises GlobalStateError for changes of global state,
    which would change the other cases as well, and restores it."""
    before = [(name, read(), write) for name, read, write in _settings()]
    readers = {name: read for name, read, _ in _settings()}
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        changed = [(name, value, write) for name, value, write in before if readers[name]() != value]
        for _, value, write in changed:
            write(value)
    if changed:
        raise GlobalStateError(f"changed {changed[0][0]} of the whole process")


def _settings() -> list[Setting]:
    """What code might change: names, and how to read and write them. Those of torch only if it was imported."""
    settings: list[Setting] = [
        ("the working directory", _working_directory, os.chdir),
        ("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    ]
    if torch := sys.modules.get("torch"):
        settings += [
            ("the default data type", torch.get_default_dtype, torch.set_default_dtype),
            ("the number of threads", torch.get_num_threads, torch.set_num_threads),
            ("the default device", torch.get_default_device, torch.set_default_device),
            (
                "the choice of deterministic algorithms",
                torch.are_deterministic_algorithms_enabled,
                torch.use_deterministic_algorithms,
            ),
            (
                "the precision of float32 products",
                torch.get_float32_matmul_precision,
                torch.set_float32_matmul_precision,
            ),
        ]
    return settings


def _working_directory() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 (a string, to be compared)
    except OSError:  # it was deleted
        return None
