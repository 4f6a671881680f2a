"""torch profiler traces, and what can be read off them: operators and memory by stage."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.files import write_whole
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.profile import KernelTime, MemoryTimeline, Operator, StageSpan
from mmtok_cli.stages import ALL_STAGES, CHECK

# TensorBoard's profiler plugin knows the category "Runtime"; torch writes these names for the same thing.
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
RUNTIME = "Runtime"
KERNEL_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LONGEST_NAME = 60  # characters, of which each may take four bytes
MOST_MOMENTS = 300  # of a timeline

Span = tuple[str, float, float]  # a stage, and when it begins and ends, in microseconds
Level = tuple[float, int]  # a moment in microseconds, and the bytes allocated from then on

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trace:
    """A trace of one case.

    path: its file; None where that could not be written, which `problem` explains. peaks: bytes allocated at most
    within a stage, above what was allocated at the start. memory: the same over time; None where nothing is recorded.
    kernels: of each stage; empty where there is no GPU.
    """

    path: Path | None
    operators: list[Operator]
    peaks: dict[str, int]
    memory: MemoryTimeline | None
    kernels: list[KernelTime]
    problem: MMTokError | None = None


def trace_case(
    model: VisionLanguageModel,
    case: Case,
    samples: Sequence[Sample],
    directory: Path,
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> Trace:
    """Run a case once under the profiler, which slows it down: times of a trace are not results.

    Writes `directory/METHOD/HOST_PID.TIME.pt.trace.json`, one run of TensorBoard's profiler plugin.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (model.device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        case.answer(model, samples, max_new_tokens, record_function, ignore_eos=ignore_eos)
    events = _export(profiler)
    annotated = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events["traceEvents"]
        if event.get("cat") == "user_annotation" and event["name"] in (*ALL_STAGES, CHECK)
    ]
    spans = [span for span in annotated if span[0] != CHECK]
    levels = _levels(events, model.device)
    operators, peaks, memory = _operators(profiler, case), _peaks(levels, spans), timeline(case.id.label, levels, spans)
    kernels = kernel_times(case.id.label, events["traceEvents"], annotated)
    process = f"{socket.gethostname()}_{os.getpid()}"
    path = directory / _file_name(case) / f"{process}.{time.time_ns() // 1_000_000}.pt.trace.json"
    try:
        write_whole(path, lambda part: part.write_text(json.dumps(events), encoding="utf-8"))
    except MMTokError as error:
        return Trace(None, operators, peaks, memory, kernels, error)
    return Trace(path, operators, peaks, memory, kernels)


def _file_name(case: Case) -> str:
    """A name for the case's directory, whatever its method is called."""
    label = case.id.label.replace(" @ ", "-").replace(" x ", "-x").replace("%", "pct")
    return re.sub(r"[^\w.-]", "-", label).lstrip(".")[:LONGEST_NAME] or "case"


def _export(profiler: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    for event in trace["traceEvents"]:
        if event.get("cat") in RUNTIME_CATEGORIES:
            event["cat"] = RUNTIME
    return trace


def _operators(profiler: Any, case: Case) -> list[Operator]:
    """Time spent in each operator itself, by the stage during which it was called."""
    events = profiler.events()
    spans = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.name in (*ALL_STAGES, CHECK) and e.is_user_annotation
    ]
    spans.sort(key=lambda span: span[2] - span[1])  # of nested stages the inner one counts
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in events:
        if event.is_user_annotation or event.device_type != torch.autograd.DeviceType.CPU or event.name == "[memory]":
            continue
        stage = next((name for name, start, end in spans if start <= event.time_range.start < end), None)
        if stage is not None and stage != CHECK:
            total = totals[stage, event.name]
            total[0] += 1
            total[1] += event.self_cpu_time_total / 1e6
            total[2] += event.self_device_time_total / 1e6
    operators = [
        Operator(case=case.id.label, stage=stage, name=name, calls=int(calls), cpu_seconds=cpu, device_seconds=device)
        for (stage, name), (calls, cpu, device) in totals.items()
    ]
    return sorted(operators, key=lambda o: (ALL_STAGES.index(o.stage), -(o.device_seconds or o.cpu_seconds)))


def kernel_times(case: str, events: Sequence[Mapping[str, Any]], spans: Sequence[Span]) -> list[KernelTime]:
    """Seconds and number of the kernels that each stage launched, in the order of the stages.

    events: of the exported trace. A kernel runs whenever the GPU comes to it; it belongs to the stage in which the host
    called the launch with the same correlation. Of nested stages the inner one counts; checks count in none.
    """
    inner_first = sorted(spans, key=lambda span: span[2] - span[1])
    launched = {event["args"].get("correlation"): event["ts"] for event in events if event.get("cat") == RUNTIME}
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        moment = launched.get(event["args"].get("correlation")) if event.get("cat") in KERNEL_CATEGORIES else None
        if moment is not None:
            stage = next((name for name, begin, end in inner_first if begin <= moment < end), CHECK)
            totals[stage][0] += event["dur"] / 1e6
            totals[stage][1] += 1
    return [
        KernelTime(case=case, stage=stage, seconds=totals[stage][0], launches=int(totals[stage][1]))
        for stage in ALL_STAGES
        if stage in totals
    ]


def _levels(trace: dict[str, Any], device: torch.device) -> list[Level]:
    """Bytes allocated on the device after each allocation and release, above those before the first."""
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in trace["traceEvents"]
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == kind.value
    )
    start = events[0][1] - events[0][2] if events else 0  # before the first allocation
    return [(moment, total - start) for moment, total, _ in events]


def _peaks(levels: Sequence[Level], spans: Sequence[Span]) -> dict[str, int]:
    if not levels:
        return {}
    peaks: dict[str, int] = defaultdict(int)
    for stage, begin, end in spans:
        if stage != "prepare":  # the processor's memory is NumPy's, which the profiler does not see
            peaks[stage] = max(peaks[stage], *(level for moment, level in levels if begin <= moment < end), 0)
    return dict(peaks)


def timeline(case: str, levels: Sequence[Level], spans: Sequence[Span]) -> MemoryTimeline | None:
    """The levels over time, at most `MOST_MOMENTS` of them, and the stages; None without either.

    levels: moments in microseconds and bytes, in their order. Of the levels in each of equal intervals of time, the
    highest, the lowest and the last are kept.
    """
    if not levels or not spans:
        return None
    origin = min(begin for _, begin, _ in spans)
    kept = list(levels)
    if len(levels) > MOST_MOMENTS:
        first, last = levels[0][0], levels[-1][0]
        width = (last - first) / (MOST_MOMENTS // 3) or 1.0
        intervals: dict[int, list[Level]] = defaultdict(list)
        for level in levels:
            intervals[min(int((level[0] - first) / width), MOST_MOMENTS // 3 - 1)].append(level)
        kept = [
            each
            for group in intervals.values()
            for each in sorted({min(group, key=_bytes), max(group, key=_bytes), group[-1]})
        ]
    return MemoryTimeline(
        case=case,
        seconds=[(moment - origin) / 1e6 for moment, _ in kept],
        bytes=[level for _, level in kept],
        stages=[
            StageSpan(stage=stage, start=(begin - origin) / 1e6, end=(end - origin) / 1e6)
            for stage, begin, end in sorted(spans, key=lambda span: (span[1], -span[2]))
        ],
    )


def _bytes(level: Level) -> int:
    return level[1]


def allocated_peak(work: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """The most bytes that some work allocates, as the profiler sees it, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    return max((allocated for _, allocated in _levels(_export(profiler), device)), default=0), result
