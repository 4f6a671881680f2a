"""The quality run over a dataset, by one process or by several under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import batches
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.predictions import Item as Said
from mmtok_cli.evaluation.predictions import Refusal, ask_batch
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.timing.runner import Case

Item = TypeVar("Item")

LONGEST_WAIT = timedelta(days=1)  # of a process that is done, for the others


@dataclass(frozen=True)
class Processes:
    """The processes that share a run, as this one sees them. state: accelerate's, None for one process alone."""

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
        """What the writer has, in every process; the others give what is to be replaced. Items travel pickled."""
        if self.state is None:
            return items
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list(items)

    def gather(self, items: list[Item]) -> list[Item]:
        """What all processes have, in every one of them. Items travel pickled."""
        if self.state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that a launcher has started, each with a device of its own; otherwise this one alone.

    To be entered before the model is loaded, which then goes to this process's GPU. Raises MMTokError where several
    were started and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MMTokError("several processes need the accelerate library", "pip install 'mmtok[accelerate]'") from error
    # Its functions have the group that exists when they are imported as a default. Imported later, as by loading a
    # model, they would keep this group and its threads until the interpreter is torn down, where a thread that still
    # has something to do aborts the process.
    from torch.distributed.nn import functional  # noqa: F401

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    # Only results travel, so that gloo serves GPUs as well.
    state = PartialState(cpu=on_cpu, backend="gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(state)
        state.wait_for_everyone()  # one that leaves while another still speaks to it may crash on its way out
    finally:
        state.destroy_process_group()


@dataclass(frozen=True)
class Found:
    """What came of one batch of samples: its number, those of its samples, and what all cases said."""

    batch: int
    numbers: list[int]
    items: list[Said]


def ask_all(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    *,
    processes: Processes,
    batch_size: int,
    max_new_tokens: int,
    only: Sequence[int] | None = None,
) -> Iterator[list[Found]]:
    """Ask all cases about all samples, or `only` these batches, one batch for each process at a time.

    Batches are those that one process alone would make. Yields after each step what all processes found, the same in
    each of them, so that one can write it down at once. A case that was refused an answer is not asked again. Raises
    KeyboardInterrupt in all processes after a step in which one was interrupted.
    """
    groups = list(batches(range(len(dataset.samples)), batch_size))
    refused: set[int] = set()
    for step in batches(range(len(groups)) if only is None else only, processes.count):
        mine, interrupted = [], False
        try:
            for number in step[processes.index : processes.index + 1]:
                items = ask_batch(model, cases, dataset, groups[number], max_new_tokens, refused)
                mine.append(Found(number, groups[number], items))
        except KeyboardInterrupt:
            interrupted = True
        parts = processes.gather([(mine, interrupted)])
        found = [each for part, _ in parts for each in part]
        if found:
            yield found
        if any(stopped for _, stopped in parts):
            raise KeyboardInterrupt
        refused |= {item.case for each in found for item in each.items if isinstance(item, Refusal)}
        if 0 in refused:
            return
