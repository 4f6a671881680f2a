"""`mmtok … --engine vllm` in processes of its own, with the demo model. Each command starts an engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mmtok_cli

EXAMPLE = Path(mmtok_cli.__file__).parent / "demo" / "example.png"
SECONDS = 600  # that a command may take on a busy machine


def mmtok(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmtok_cli", *map(str, arguments)]
    others = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment = {**others, "VLLM_CPU_KVCACHE_SPACE": "1", **variables}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=SECONDS, check=False
    )


def printed(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on standard output, on which vLLM must not write."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.extended
def test_profile_under_load(tmp_path: Path) -> None:
    command = "profile --engine vllm --method mmtok,random --budget 64 --concurrency 1,4 --rounds 6 --requests 6 --json"
    found = printed(mmtok(tmp_path, *command.split(), "--export", "load.md"))
    assert found["schema"] == "mmtok.engine-profile/1" and not found["interrupted"]
    assert [(case["concurrency"], case["case"]["method"]) for case in found["cases"]] == [
        (concurrency, method) for concurrency in (1, 4) for method in ("full", "mmtok", "random")
    ]
    assert len(found["runs"]) == 6 * 6 and "in flight" in (tmp_path / "load.md").read_text()
    for run in found["runs"]:
        requests, budget = run["requests"], 576 if run["case"] == 0 else 64
        assert {(each["vision"], each["kept"]) for each in requests} == {(576, budget)}
        # No cache answers: every image is encoded, and all of the prompt is prefilled.
        assert run["images"] == len(requests) == 6 and run["encodings"] <= 6
        assert run["kv_cache"] > 0 and run["steps"] >= 2
        assert (run["busy"]["select"] > 0) == (run["case"] > 0)
        assert abs(sum(run["busy"].values()) - run["seconds"]) < 0.01 * run["seconds"]
        for each in requests:
            seconds = each["seconds"]
            parts = sum(seconds[stage] for stage in ("preprocess", "queue", "first_step"))
            assert abs(parts - seconds["ttft"]) < 1e-6 and seconds["ttft"] <= seconds["total"] <= run["seconds"]
    # The prompt is nine times as long without reduction, so that its KV cache is larger, whatever the machine does.
    full, mmtok_, _ = found["cases"][:3]
    assert full["kv_cache"] > 3 * mmtok_["kv_cache"]
    assert mmtok_["speedup"].keys() >= {"throughput", "ttft"} and mmtok_["speedup"]["ttft"]["low"] is not None


@pytest.mark.extended
def test_quality_is_that_without_an_engine(tmp_path: Path) -> None:
    """The same samples, metric and cases: the same answers, one by one."""
    command = ["compare", "--methods", "mmtok,random", "--budget", "16,10%", "--limit", 40, "--json"]
    engine = printed(mmtok(tmp_path, *command, "--engine", "vllm"))
    alone = printed(
        mmtok(tmp_path, *command, "--rounds", 1, "--warmup", 0, "--export", "alone.jsonl", OMP_NUM_THREADS="1")
    )
    expected = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    compared = ("sample", "method", "budget", "prediction", "kept", "total", "score", "flip")

    def rows(predictions: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        return {tuple(each[name] for name in compared) for each in predictions}

    assert engine["samples"] == 40 and len(engine["predictions"]) == 40 * 5
    assert rows(engine["predictions"]) == rows(expected)
    for mine, theirs in zip(engine["cases"], alone["results"], strict=True):
        assert [mine[name] for name in ("score", "retention", "retention_low", "flips")] == [
            theirs[name] for name in ("score", "retention", "retention_low", "flips")
        ]
    assert engine["equivalents"]["10%"] == {"vllm.video_pruning_rate": 0.9, "openvino.pruning_ratio": 90.0}


def test_an_engine_that_does_not_start_says_why_in_one_line(tmp_path: Path) -> None:
    question = ("infer", EXAMPLE, "What color is the star?", "--engine", "vllm")
    done = mmtok(tmp_path, *question, VLLM_CPU_KVCACHE_SPACE="0", TMPDIR=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    first, hint = done.stderr.splitlines()
    assert first.startswith("error: vLLM did not start: ") and "memory" in first and "Traceback" not in done.stderr
    assert Path(hint.removeprefix("hint: its log is ")).read_text(encoding="utf-8")
    done = mmtok(tmp_path, *question, VLLM_PLUGINS="")  # before anything of vLLM is imported
    assert done.returncode == 2 and "switches off the plug-in" in done.stderr
