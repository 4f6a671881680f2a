"""What an NVIDIA GPU's driver tells about itself while it is measured on, through nvidia-ml-py where that is installed.

Nothing here touches the card's settings.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from mmtok_cli.results.schema import GpuUse, Record

# Bits of the driver's answer to why the clock is not at its highest, as far as they disturb a measurement: an idle card
# and clocks that somebody has fixed do not.
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class GpuState(Record):
    """One look at the card: clocks in MHz, power limit in watts, why it is throttled, how many others use it.

    joules: per repetition of what was run before the look. None stands for what the card does not tell.
    """

    clock: float | None
    memory_clock: float | None
    full_clock: float | None
    power_limit: float | None
    throttled: list[str]
    other_processes: int | None
    joules: float | None = None


@dataclass(frozen=True)
class Gpu:
    """A card, by NVML's handle. nvml: the module `pynvml`."""

    nvml: Any
    handle: Any

    def joules(self) -> float | None:
        """What the card's energy counter shows; the driver moves it on every few hundredths of a second."""
        return self._ask(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000)

    def state(self, joules: float | None = None) -> GpuState:
        nvml, handle = self.nvml, self.handle
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
        # This process holds the card too, though perhaps under a number that only the host knows.
        users = self._ask(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)))
        return GpuState(
            clock=self._ask(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            memory_clock=self._ask(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))),
            full_clock=self._ask(lambda: float(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))),
            power_limit=self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            throttled=[name for bit, name in THROTTLES.items() if reasons & bit],
            other_processes=None if users is None else max(users - 1, 0),
            joules=joules,
        )

    def driver(self) -> str | None:
        """The driver's version."""
        return self._ask(lambda: str(self.nvml.nvmlSystemGetDriverVersion()))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (self.nvml.NVMLError, AttributeError):  # not every card, driver and release knows every question
            return None


def open_gpu(device: torch.device, nvml: Any = None) -> Gpu | None:
    """The card behind a CUDA device; None for other devices, without nvidia-ml-py, and where the driver has no NVML.

    nvml: a module to use in place of `pynvml`.
    """
    if device.type != "cuda":
        return None
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
    try:
        nvml.nvmlInit()
        # By its identity: CUDA's numbers change with CUDA_VISIBLE_DEVICES, NVML's do not.
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except nvml.NVMLError:
        return None


def summarise_states(states: Sequence[GpuState], samples: int) -> GpuUse | None:
    """What was seen of the card over all rounds of a case with so many samples in a batch; None for no look at it."""
    if not states:
        return None

    def known(name: str) -> list[float]:
        return [value for state in states if (value := getattr(state, name)) is not None]

    others, joules = known("other_processes"), known("joules")
    return GpuUse(
        clock=median(clocks) if (clocks := known("clock")) else None,
        memory_clock=median(clocks) if (clocks := known("memory_clock")) else None,
        full_clock=max(known("full_clock"), default=None),
        power_limit=min(known("power_limit"), default=None),
        throttled=dict(sorted(Counter(name for state in states for name in state.throttled).items())),
        other_processes=int(max(others)) if others else None,
        # The counter is too coarse for one short run, and right on average over many.
        joules=sum(joules) / len(joules) / samples if joules else None,
    )
