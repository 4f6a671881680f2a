"""Memory: what a run allocates above the weights, its KV cache, and what the process holds on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch


@dataclass
class Peak:
    """Bytes allocated at most above what was allocated before; None where the device does not count them."""

    bytes: int | None = None


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


def host_memory() -> int:
    """Resident bytes of this process."""
    return psutil.Process().memory_info().rss
