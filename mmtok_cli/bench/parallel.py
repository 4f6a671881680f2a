"""The quality run over a dataset, by one process or by several under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mmtok_cli.bench.quality import Outcome, Unread, ask_batch
from mmtok_cli.bench.runner import Case
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import batches
from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import VisionLanguageModel

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

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of what all were given alike; parts follow one another and differ in size by one."""
        if self.state is None:
            return list(items)
        with self.state.split_between_processes(list(items)) as mine:
            return mine

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
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    # Only results travel, so that gloo serves GPUs as well.
    state = PartialState(cpu=on_cpu, backend="gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(state)
    finally:
        state.destroy_process_group()


@dataclass(frozen=True)
class Asked:
    """What came of a run, ordered by sample and case. interrupted: whether it is a part of the dataset alone."""

    outcomes: list[Outcome]
    unread: list[Unread]
    interrupted: bool


def ask_all(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    *,
    processes: Processes,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Asked:
    """Ask all cases about all samples, or until an interrupt; every process returns the same.

    Processes share out whole batches, which are those that one process alone would make. advance: called with the
    number of samples that this process has just done. Raises MMTokError where a budget cannot be met, and where no
    sample could be read.
    """
    mine: list[Outcome | Unread] = []
    interrupted = False
    try:
        for numbers in processes.share(list(batches(range(len(dataset.samples)), batch_size))):
            mine += ask_batch(model, cases, dataset, numbers, max_new_tokens)
            advance(len(numbers))
    except KeyboardInterrupt:
        if not mine:
            raise
        interrupted = True
    found = processes.gather(mine)
    outcomes = sorted((item for item in found if isinstance(item, Outcome)), key=lambda o: (o.number, o.case))
    unread = sorted((item for item in found if isinstance(item, Unread)), key=lambda u: u.number)
    if not outcomes:
        raise MMTokError(f"no sample of {dataset.name} could be read: {unread[0].problem}", "check the image files")
    return Asked(outcomes, unread, interrupted)
