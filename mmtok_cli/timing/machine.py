"""What other processes take of the CPUs while cases are timed, and the CPUs' frequency, as the system reports them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from mmtok_cli.results.records import MachineState

FREQUENCY_EVERY = 1.0  # seconds; on some systems reading it takes milliseconds for every CPU
LANES = {"AVX2": 8, "AVX512": 8}  # float32 values that a unit multiplies at once; with AVX-512, some have one unit
UNITS, FUSED = 2, 2  # of multiplication; a multiplication and an addition at once

Result = TypeVar("Result")


@dataclass(frozen=True)
class Counters:
    """Readings of counters, all in seconds. wall: of a clock. busy: of all CPUs, for any process. own: of this process.
    stolen: that a hypervisor gave to others."""

    wall: float
    busy: float
    own: float
    stolen: float


def read_counters() -> Counters:
    """The counters now. Raises OSError, psutil.Error or NotImplementedError where the system does not offer them."""
    all_cpus, process = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(all_cpus, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return Counters(time.perf_counter(), busy, process.user + process.system, getattr(all_cpus, "steal", 0.0))


class Machine:
    """Reads the counters; each state covers the time since the one before, so that none is lost.

    The counters advance in steps of about a hundredth of a second: right over many states, coarse for one short run.
    """

    def __init__(self, read: Callable[[], Counters] = read_counters) -> None:
        self._read = read
        self._last = _offered(read)
        self._frequency_read = float("-inf")
        self._cpus = psutil.cpu_count() or 1
        self._cores = usable_cores()

    def state(self) -> MachineState | None:
        """What happened since the last call; None where the system does not offer the counters."""
        now, before = _offered(self._read), self._last
        self._last = now
        if now is None or before is None:
            return None
        return MachineState(
            cpus=self._cpus,
            cores=self._cores,
            seconds=max(0.0, now.wall - before.wall),
            others=max(0.0, (now.busy - before.busy) - (now.own - before.own)),
            stolen=max(0.0, now.stolen - before.stolen),
            frequency=self._frequency(now.wall),
        )

    def _frequency(self, wall: float) -> float | None:
        if wall - self._frequency_read < FREQUENCY_EVERY:
            return None
        self._frequency_read = wall
        return cpu_frequency()


def usable_cores() -> int:
    """Physical cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def cpu_frequency() -> float | None:
    """Megahertz now, on average over the CPUs; None where the system does not say."""
    found = _offered(lambda: psutil.cpu_freq())
    return found.current if found and found.current > 0 else None


def expected_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a large product should reach on this processor, roughly: cores that are used x frequency x values
    per cycle. None where too little is known: other devices, data types and instruction sets."""
    lanes, frequency = LANES.get(torch.backends.cpu.get_cpu_capability()), cpu_frequency()
    if device.type != "cpu" or dtype != torch.float32 or lanes is None or frequency is None:
        return None
    return min(torch.get_num_threads(), usable_cores()) * frequency * 1e6 * lanes * UNITS * FUSED


def _offered(read: Callable[[], Result]) -> Result | None:
    try:
        return read()
    except (OSError, psutil.Error, NotImplementedError, AttributeError, RuntimeError):
        return None
