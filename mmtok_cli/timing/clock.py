"""Seconds of each stage: CUDA events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from mmtok_cli.stages import CHECK

Mark = TypeVar("Mark")


class Stages(Generic[Mark]):
    """Attributes time, or another counter, to stages. A nested stage interrupts the outer one: nothing counts twice."""

    def __init__(self, read: Callable[[], Mark]) -> None:
        self.spans: list[tuple[str, Mark, Mark]] = []
        self._read = read
        self._open: tuple[str, Mark] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer = self._open
        start = self._read()
        if outer:
            self.spans.append((*outer, start))
        self._open = (name, start)
        try:
            yield
        finally:
            end = self._read()
            self.spans.append((*self._open, end))
            self._open = (outer[0], end) if outer else None


class Clock:
    """Times the stages of one run. The pipeline enters the context `stage`; `seconds` gives the result."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stages = Stages(self.now)
        self.stage = self._stages.stage
        synchronise(device)

    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        return self.sums(self._stages.spans)

    def sums(self, spans: Iterable[tuple[str, Any, Any]]) -> dict[str, float]:
        """Seconds by name of spans between two readings of `now`, without those of this program's own checks."""
        synchronise(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in spans:
            if name == CHECK:
                continue
            seconds[name] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        return dict(seconds)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and their sums."""
        return with_sums(self.stages())

    def now(self) -> Any:
        """The current time of the device, as a CUDA event or in seconds."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronise(self._device)
        return time.perf_counter()


def with_sums(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, their sum as `total`, and the time to first token as `ttft`."""
    total = sum(seconds for name, seconds in stages.items() if not name.startswith("measured_"))
    return {**stages, "ttft": total - stages.get("decode", 0.0), "total": total}


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
