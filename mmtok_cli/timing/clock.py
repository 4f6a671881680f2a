"""Seconds of each stage: CUDA events on GPUs, the wall clock elsewhere."""

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
    """Attributes time, or another counter, to stages, so that everything counts once.

    A nested stage interrupts the outer one. What lies between two stages belongs to the later one, which it prepares,
    and what follows the last belongs to that.
    """

    def __init__(self, read: Callable[[], Mark]) -> None:
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._read = read
        self._names: list[str] = []  # of the stages that are open
        self._last = read()  # up to which everything is attributed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._names:
            self._attribute(self._names[-1])
        self._names.append(name)
        try:
            yield
        finally:
            self._attribute(self._names.pop())

    def spans(self) -> list[tuple[str, Mark, Mark]]:
        """The stages so far: name, begin and end of each, without a gap between them."""
        if self._spans and not self._names:
            self._attribute(self._spans[-1][0])
        return list(self._spans)

    def _attribute(self, name: str) -> None:
        now = self._read()
        self._spans.append((name, self._last, now))
        self._last = now


class Clock:
    """Times the stages of one run. The pipeline enters the context `stage`; `seconds` gives the result.

    devices: those that take part, as in `VisionLanguageModel.devices`. Times are taken on the first.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices
        self._waiting = torch.cuda.Stream(devices[0]) if len(devices) > 1 else None
        synchronise(*devices)
        self._stages = Stages(self.now)
        self.stage = self._stages.stage

    def stages(self) -> dict[str, float]:
        """Seconds by stage, from the creation of the clock up to now."""
        return self.sums(self._stages.spans())

    def sums(self, spans: Iterable[tuple[str, Any, Any]]) -> dict[str, float]:
        """Seconds by name of spans between two readings of `now`, without those of `CHECK`."""
        synchronise(*self._devices)
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in spans:
            if name == CHECK:
                continue
            seconds[name] += end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
        return dict(seconds)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and their sums."""
        return with_sums(self.stages())

    def now(self) -> Any:
        """The moment at which all devices have done what they were given so far: a CUDA event, or seconds."""
        first = self._devices[0]
        if first.type != "cuda":
            synchronise(first)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        if self._waiting is None:
            event.record(torch.cuda.current_stream(first))
            return event
        # Times of different GPUs cannot be compared: a stream of the first waits for each, and nothing waits for it.
        for device in self._devices:
            self._waiting.wait_event(torch.cuda.current_stream(device).record_event())
        event.record(self._waiting)
        return event


def with_sums(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, their sum as `total`, and the time to first token as `ttft`."""
    total = sum(seconds for name, seconds in stages.items() if not name.startswith("measured_"))
    return {**stages, "ttft": total - stages.get("decode", 0.0), "total": total}


def synchronise(*devices: torch.device) -> None:
    """Wait until the devices have finished their work."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
