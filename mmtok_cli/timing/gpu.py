"""The state of an NVIDIA GPU as its driver reports it, read through nvidia-ml-py where that is installed.

Nothing here changes the card's settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mmtok_cli.results.records import GpuState

# The reasons for a reduced clock that disturb a measurement, by their bit in the driver's answer. An idle card and
# clocks locked by an administrator are not among them.
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
# The reasons of which the driver counts the time (nvmlPerfPolicyType_t): what happened during a run shows in it, which
# the state after the run does not.
COUNTED = {0: "power cap", 1: "thermal slowdown", 3: "board limit", 5: "reliability limit"}
Violations = dict[str, int]  # nanoseconds since the driver was loaded, of the reasons that the card counts


@dataclass(frozen=True)
class Gpu:
    """A card, by NVML's handle. nvml: the module `pynvml`."""

    nvml: Any
    handle: Any

    def joules(self) -> float | None:
        """The card's energy counter, which the driver updates every few hundredths of a second."""
        return self._read(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000)

    def violations(self) -> Violations:
        """How long the clock was reduced so far, by reason."""
        found = {}
        for policy, name in COUNTED.items():
            status = self._read(partial(self._violation_status, policy))
            if status is not None:
                found[name] = int(status.violationTime)
        return found

    def _violation_status(self, policy: int) -> Any:
        return self.nvml.nvmlDeviceGetViolationStatus(self.handle, policy)

    def state(self, joules: float | None = None, before: Violations | None = None) -> GpuState:
        """The card now. before: `violations` at the start of a run, so that `throttled` holds what occurred in it.

        Reasons that are not counted are those of this moment.
        """
        nvml, handle = self.nvml, self.handle
        reasons = self._read(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
        since = before or {}
        counted = {name: now - since[name] for name, now in self.violations().items() if name in since}
        throttled = [name for bit, name in THROTTLES.items() if reasons & bit and name not in counted]
        throttled += [name for name, nanoseconds in counted.items() if nanoseconds > 0]
        # One of them is this process, which cannot be told apart: in a container, its id differs from the host's.
        users = self._read(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)))
        return GpuState(
            clock=self._read(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            memory_clock=self._read(lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))),
            full_clock=self._read(lambda: float(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))),
            power_limit=self._read(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            throttled=throttled,
            other_processes=None if users is None else max(users - 1, 0),
            joules=joules,
        )

    def driver(self) -> str | None:
        """The driver's version."""
        return self._read(lambda: str(self.nvml.nvmlSystemGetDriverVersion()))

    def _read(self, query: Callable[[], Any]) -> Any:
        try:
            return query()
        except (self.nvml.NVMLError, AttributeError):  # not supported by this card, driver or release
            return None


@dataclass(frozen=True)
class Gpus:
    """Several cards that share a model, read as if they were one."""

    cards: tuple[Gpu, ...]

    def joules(self) -> float | None:
        """The sum of the cards' energy counters."""
        return _combined(sum, (card.joules() for card in self.cards))

    def violations(self) -> Violations:
        """Those of all cards, by the card's number and the reason."""
        return {
            f"{number} {reason}": nanoseconds
            for number, card in enumerate(self.cards)
            for reason, nanoseconds in card.violations().items()
        }

    def state(self, joules: float | None = None, before: Violations | None = None) -> GpuState:
        """Clocks and limits of the slowest card, and what slowed down any."""
        given = [
            {key.partition(" ")[2]: value for key, value in (before or {}).items() if key.startswith(f"{number} ")}
            for number in range(len(self.cards))
        ]
        states = [card.state(before=since) for card, since in zip(self.cards, given, strict=True)]
        return GpuState(
            clock=_combined(min, (state.clock for state in states)),
            memory_clock=_combined(min, (state.memory_clock for state in states)),
            full_clock=_combined(min, (state.full_clock for state in states)),
            power_limit=_combined(min, (state.power_limit for state in states)),
            throttled=list(dict.fromkeys(reason for state in states for reason in state.throttled)),
            other_processes=_combined(max, (state.other_processes for state in states)),
            joules=joules,
        )

    def driver(self) -> str | None:
        return self.cards[0].driver()


def _combined(combine: Callable[[list[Any]], Any], values: Iterable[Any]) -> Any:
    """None where any card does not tell."""
    known = list(values)
    return None if None in known else combine(known)


def open_gpus(devices: Sequence[torch.device], nvml: Any = None) -> Gpu | Gpus | None:
    """The cards behind CUDA devices; None where `open_gpu` gives None for any."""
    cards = [open_gpu(device, nvml) for device in devices]
    found = tuple(card for card in cards if card is not None)
    if len(found) < len(cards):
        return None
    return found[0] if len(found) == 1 else Gpus(found)


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
        # By UUID: CUDA's device numbers depend on CUDA_VISIBLE_DEVICES, NVML's do not.
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except nvml.NVMLError:
        return None
