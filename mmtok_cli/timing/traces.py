"""torch profiler traces, and what can be read off them: operators and memory by stage."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.files import write_whole
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.profile import Operator
from mmtok_cli.stages import CHECK, DRAFT, STAGES

# TensorBoard's profiler plugin knows the category "Runtime"; torch writes these names for the same thing.
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")
LONGEST_NAME = 60  # characters, of which each may take four bytes


@dataclass(frozen=True)
class Trace:
    """A trace of one case.

    path: its file; None where that could not be written, which `problem` explains. peaks: bytes allocated at most
    within a stage, above what was allocated at the start.
    """

    path: Path | None
    operators: list[Operator]
    peaks: dict[str, int]
    problem: MMTokError | None = None


def trace_case(
    model: VisionLanguageModel, case: Case, samples: Sequence[Sample], directory: Path, max_new_tokens: int
) -> Trace:
    """Run a case once under the profiler, which slows it down: times of a trace are not results.

    Writes `directory/METHOD/HOST_PID.TIME.pt.trace.json`, one run of TensorBoard's profiler plugin.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (model.device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        case.answer(model, samples, max_new_tokens, record_function)
    events = _export(profiler)
    spans = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events["traceEvents"]
        if event.get("cat") == "user_annotation" and event["name"] in (DRAFT, *STAGES)
    ]
    operators, peaks = _operators(profiler, case), _peaks(events, spans, model.device)
    process = f"{socket.gethostname()}_{os.getpid()}"
    path = directory / _file_name(case) / f"{process}.{time.time_ns() // 1_000_000}.pt.trace.json"
    try:
        write_whole(path, lambda part: part.write_text(json.dumps(events), encoding="utf-8"))
    except MMTokError as error:
        return Trace(None, operators, peaks, error)
    return Trace(path, operators, peaks)


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
            event["cat"] = "Runtime"
    return trace


def _operators(profiler: Any, case: Case) -> list[Operator]:
    """Time spent in each operator itself, by the stage during which it was called."""
    events = profiler.events()
    spans = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.name in (DRAFT, *STAGES, CHECK) and e.is_user_annotation
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
    return sorted(operators, key=lambda o: ((DRAFT, *STAGES).index(o.stage), -(o.device_seconds or o.cpu_seconds)))


def _peaks(trace: dict[str, Any], spans: list[tuple[str, float, float]], device: torch.device) -> dict[str, int]:
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    levels = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in trace["traceEvents"]
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == kind.value
    )
    if not levels:
        return {}
    start = levels[0][1] - levels[0][2]  # before the first allocation
    peaks: dict[str, int] = defaultdict(int)
    for stage, begin, end in spans:
        if stage != "prepare":  # the processor's memory is NumPy's, which the profiler does not see
            peaks[stage] = max(peaks[stage], *(total - start for ts, total, _ in levels if begin <= ts < end), 0)
    return dict(peaks)
