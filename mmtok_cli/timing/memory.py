"""Memory: what a run allocates above the weights, its KV cache, and what the process holds on the host."""

from __future__ import annotations

import gc
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
    """Watch the peak of a block. Only CUDA's allocator keeps one; `traces` finds the CPU's in a profile."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host, where torch has no type for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")
    )


def release_memory(device: torch.device) -> None:
    """Give back what a run that failed has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """What an error says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
