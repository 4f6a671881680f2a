"""Traces as the real TensorBoard plugin reads them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method
from mmtok_cli.models.llava import Llava
from mmtok_cli.stages import STAGES
from mmtok_cli.timing.traces import RUNTIME_CATEGORIES, Trace, kernel_times, trace_case


@pytest.fixture(scope="module")
def trace(tiny_sdpa: Llava, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    case = Case("mmtok", make_method("mmtok"), Budget(count=4))
    return trace_case(tiny_sdpa, case, samples[:1], tmp_path_factory.mktemp("traces"), max_new_tokens=3)


def test_stages_are_ranges_of_the_trace(trace: Trace) -> None:
    events = json.loads(trace.path.read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation" and event["name"] in STAGES]
    assert [name for name, _ in groupby(ranges)] == list(STAGES)
    assert not any(event.get("cat") in RUNTIME_CATEGORIES for event in events)
    assert list(trace.path.parent.iterdir()) == [trace.path]


def test_operators_and_peaks_by_stage(trace: Trace) -> None:
    stages = [operator.stage for operator in trace.operators]
    assert stages == sorted(stages, key=STAGES.index) and set(stages) >= {"encode", "select", "prefill", "decode"}
    convolutions = [operator.stage for operator in trace.operators if "convolution" in operator.name]
    assert set(convolutions) == {"encode"}
    assert all(operator.cpu_seconds >= 0 and operator.calls > 0 for operator in trace.operators)
    assert trace.peaks["encode"] > 0 and trace.peaks["prefill"] > 0


@pytest.mark.parametrize("name", ["../../up", "..", "/etc/x", "a/../../b", "x" * 300, "\x1b[2J\n", "名前" * 100])
def test_traces_stay_in_their_directory(name: str, tiny_sdpa: Llava, samples: list[Sample], tmp_path: Path) -> None:
    place = tmp_path / "traces"
    written = trace_case(tiny_sdpa, Case(name, make_method("none"), None), samples[:1], place, max_new_tokens=1)
    assert written.path and written.path.resolve().parent.parent == place.resolve()
    assert list(tmp_path.iterdir()) == [place] and written.path.parent.name.isprintable()


def launch(moment: float, number: int) -> dict:
    return {"cat": "Runtime", "name": "cudaLaunchKernel", "ts": moment, "dur": 1, "args": {"correlation": number}}


def kernel(begin: float, duration: float, number: int, category: str = "kernel") -> dict:
    return {"cat": category, "name": "k", "ts": begin, "dur": duration, "args": {"correlation": number}}


def test_kernels_belong_to_the_stage_that_launched_them() -> None:
    """However late the GPU comes to them, in the inner one of nested stages, and not to checks."""
    spans = [("encode", 0, 100), ("prefill", 100, 300), ("select", 120, 160), ("check", 200, 220)]
    events = [
        *(launch(moment, i) for i, moment in enumerate((10, 20, 110, 130, 140, 210, 400))),
        kernel(11, 5, 0),
        kernel(150, 1000, 1),  # launched while encoding, run long after
        kernel(1150, 7, 2),
        kernel(1157, 2, 3, "gpu_memcpy"),
        kernel(1159, 3, 4),
        kernel(1162, 50, 5),
        kernel(1212, 9, 6),  # after the last stage
        kernel(1300, 9, 99),  # of which no launch is known
        {"cat": "cpu_op", "name": "aten::mm", "ts": 10, "dur": 5, "args": {}},
        {"name": "[memory]", "ts": 10, "args": {"Bytes": 1}},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        {"cat": "gpu_user_annotation", "name": "encode", "ts": 11, "dur": 2000, "args": {"correlation": 0}},
    ]
    found = kernel_times("full", events, spans)
    assert [(each.stage, each.launches) for each in found] == [("encode", 2), ("select", 2), ("prefill", 1)]
    assert [each.seconds for each in found] == pytest.approx([1005e-6, 5e-6, 7e-6])
    assert all(each.case == "full" for each in found)


def test_without_a_gpu_there_are_no_kernels(trace: Trace) -> None:
    assert trace.kernels == []


@pytest.fixture(scope="module")
def tensorboard(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(trace.path.parent.parent)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("plugin"))},
    )
    address = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler"
    runs: dict = {}
    try:
        while not (runs.get("runs") and not runs.get("loading")):
            assert server.poll() is None
            time.sleep(0.3)
            with suppress(URLError, ConnectionError):  # it is still starting
                runs = get(f"{address}/runs")
        yield address
    finally:
        server.kill()
        server.wait()


def get(url: str) -> dict:
    with urlopen(url) as answer:
        return json.loads(answer.read())


def test_tensorboard_plugin_opens_the_trace(tensorboard: str, trace: Trace) -> None:
    runs = get(f"{tensorboard}/runs")
    assert runs["runs"] == [trace.path.parent.name]
    run = f"run={runs['runs'][0]}"
    worker = get(f"{tensorboard}/workers?{run}&view=Operator")[0]
    span = get(f"{tensorboard}/spans?{run}&worker={worker}")[0]
    operators = get(f"{tensorboard}/operation/table?{run}&worker={worker}&span={span}&group_by=Operation")["data"]
    assert "aten::mm" in {row["name"] for row in operators}
