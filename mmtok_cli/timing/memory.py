"""Memory: the peak that a run allocates above the weights, and the resident memory of the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import psutil
import torch

from mmtok_cli.timing.clock import synchronise


@dataclass
class Peak:
    """Bytes allocated at most above what was allocated before, and bytes that the allocator had reserved at most.

    Summed over the devices; None where they do not count them.
    """

    bytes: int | None = None
    reserved: int | None = None


@contextmanager
def peak_memory(*devices: torch.device) -> Iterator[Peak]:
    """Record the peak within a block. Only CUDA's allocator reports one; `traces` reads the CPU's off a profile."""
    peak = Peak()
    if devices[0].type != "cuda":
        yield peak
        return
    synchronise(*devices)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(map(torch.cuda.memory_allocated, devices))
    yield peak
    synchronise(*devices)
    peak.bytes = sum(map(torch.cuda.max_memory_allocated, devices)) - before
    peak.reserved = sum(map(torch.cuda.max_memory_reserved, devices))


def host_memory() -> int:
    """Resident bytes of this process."""
    return _process(os.getpid()).memory_info().rss


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)
