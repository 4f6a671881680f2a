"""One process or several, started by `accelerate launch` or `torchrun`, that share an evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mmtok_cli.errors import MMTokError, first_line

Item = TypeVar("Item")

LONGEST_WAIT = timedelta(days=1)  # how long a process that is done waits for the others


@dataclass(frozen=True)
class Processes:
    """The processes that share a run, seen from this one. state: that of accelerate, None for a single process."""

    state: Any = None

    @property
    def count(self) -> int:
        return 1 if self.state is None else self.state.num_processes

    @property
    def is_writer(self) -> bool:
        """Whether this is the one process that reports."""
        return self.state is None or self.state.is_main_process

    @property
    def index(self) -> int:
        return 0 if self.state is None else self.state.process_index

    def tell(self, items: list[Item]) -> list[Item]:
        """The writer's items, in every process. The others pass a list of the same length, whose items are ignored.

        Raises MMTokError where another process has ended.
        """
        if self.state is None:
            return items
        from accelerate.utils import broadcast_object_list

        with _connected():
            return broadcast_object_list(items)

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in every one of them. They are sent pickled.

        Raises MMTokError where another process has ended.
        """
        if self.state is None:
            return items
        from accelerate.utils import gather_object

        with _connected():
            return gather_object(items)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo, which has no type of its own for it
        raise MMTokError("another process of this run has ended", "its message says why") from error


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that a launcher started, each with a device of its own, or this process alone.

    To be entered before the model is loaded, which then goes to this process's GPU. Raises MMTokError where several
    processes were started and accelerate is not installed, and where they cannot be joined.
    """
    launcher = "start them with torchrun or accelerate launch, or unset WORLD_SIZE to use one process"
    count = os.environ.get("WORLD_SIZE", "1")
    if count.strip() == "1":
        yield Processes()
        return
    if not re.fullmatch("[0-9]{1,6}", count) or int(count) == 0:
        raise MMTokError(f"WORLD_SIZE is {count!r}, which is not a number of processes", launcher)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MMTokError("several processes need the accelerate library", "pip install 'mmtok[accelerate]'") from error
    # This module binds the process group that exists at its import as a default argument. Imported later, for example
    # while a model is loaded, it would keep our group and its threads alive until the interpreter is torn down, where a
    # thread that is still busy aborts the process.
    from torch.distributed.nn import functional  # noqa: F401

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    # Only results are exchanged, so gloo is enough for GPUs as well.
    try:
        state = PartialState(cpu=on_cpu, backend="gloo", timeout=LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise MMTokError(f"the {count} processes cannot be joined: {first_line(error)}", launcher) from error
    try:
        yield Processes(state)
        state.wait_for_everyone()  # leaving while another still communicates can crash this one
    finally:
        state.destroy_process_group()
