"""Memory: the peak that a run allocates above the weights, and the resident memory of the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import psutil
import torch


@dataclass
class Peak:
    """Bytes allocated at most above what was allocated before, and bytes that the allocator had reserved at most.

    None where the device does not count them.
    """

    bytes: int | None = None
    reserved: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Record the peak within a block. Only CUDA's allocator reports one; `traces` reads the CPU's off a profile."""
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peak
    torch.cuda.synchronize(device)
    peak.bytes = torch.cuda.max_memory_allocated(device) - before
    peak.reserved = torch.cuda.max_memory_reserved(device)


def host_memory() -> int:
    """Resident bytes of this process."""
    return _process(os.getpid()).memory_info().rss


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)
