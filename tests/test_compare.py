"""`mmtok compare`: what is planned, measured, shown and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import refused, run, run_json

from mmtok_cli.report.checks import notes, shortfalls
from mmtok_cli.report.tables import speed_table
from mmtok_cli.report.units import duration
from mmtok_cli.results.schema import (
    CaseId,
    CaseResult,
    Comparison,
    Drift,
    FailedCase,
    FlopCoverage,
    GpuUse,
    Speedup,
    Times,
)


@pytest.fixture()
def command(tiny_directory: Path) -> tuple[Any, ...]:
    return ("compare", "-m", tiny_directory, "--limit", 8, "-b", "4", "--max-new-tokens", 2, "--warmup", 0)


def test_the_baseline_named_as_a_method_is_measured_once_more(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, ticking: None
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = ("compare", "-m", tiny_directory, "--max-new-tokens", 1, "--methods", "full", "--rounds", 8)
    result = run(*command)
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("full (again)"))
    assert "36/36" in row
    compared = run_json("compare", "--resume")
    first, again = compared["results"]
    assert (first["case"]["method"], first["case"]["again"], first["speedup"]) == ("full", False, {})
    assert (again["case"]["method"], again["case"]["again"]) == ("full", True)
    assert again["fidelity"] == {"kl": 0, "top1": 1, "same": 1} and again["retention"] in (1, None)
    assert (again["flips"]["right_wrong"], again["flips"]["wrong_right"], again["flips"]["p_value"]) == (0, 0, 1)
    speedup = again["speedup"]["total"]
    assert (speedup["low"], speedup["high"]) == (pytest.approx(1), pytest.approx(1)) and not speedup["conclusive"]


def test_inconclusive_in_words(tiny_directory: Path) -> None:
    few = run("compare", "-m", tiny_directory, "--max-new-tokens", 1, "--methods", "full", "--rounds", 3)
    assert "inconclusive speedup: fewer than six rounds" in " ".join(few.stderr.split())


def test_dry_run(command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--methods", "full,mmtok", "--batch-size", "1,4", "--runs", 3, "--dry-run", "--run-dir", tmp_path / "r")
    plan = run_json(*command, *options)
    assert plan["schema"] == "mmtok.estimate/2" and not (tmp_path / "r").exists()
    cases = [(c["case"]["method"], c["case"]["again"], c["case"]["batch_size"], c["rounds"]) for c in plan["cases"]]
    one = [("full", False, 1, 8), ("mmtok", False, 1, 8), ("full", True, 1, 8)]
    assert cases == one + [(name, again, 4, 6) for name, again, _, _ in one]
    assert plan["rounds"] == 8 and plan["runs"] == 3 and sorted(plan["order"][0]) == list(range(6))
    longer = run_json(*command, *options, "--min-time", 5000)
    for estimate in (plan, longer):
        cases = estimate["cases"]
        counted = sum(case["seconds"] for case in cases)
        measured = max(sum(case["seconds"] * case["rounds"] * 3 for case in cases), estimate["min_time"] or 0)
        asked = sum(
            2 * 2 * case["seconds"] for case in cases if case["case"]["batch_size"] == 4 and not case["case"]["again"]
        )
        assert estimate["quality_seconds"] == pytest.approx(asked)
        assert estimate["seconds"] == pytest.approx(counted + measured + asked)

    shown = run(*command, *options)
    assert "round 1: " in shown.stdout and "… 8 rounds in total" in shown.stdout and "full (again)" in shown.stdout
    assert "8 samples, seed 0; about" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_the_order_that_was_planned_is_the_order_that_was_run(command: tuple[Any, ...]) -> None:
    planned = run_json(*command, "--methods", "mmtok,random", "--seed", 3, "--dry-run")["order"]
    compared = run_json(*command, "--methods", "mmtok,random", "--seed", 3)["schedule"]["order"]
    assert compared[: len(planned)] == planned and len(compared) == 8


def test_tables_of_several_batch_sizes(command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*command, "--methods", "mmtok,fastv", "--batch-size", "1,4", "--rounds", 6)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(", ")[1] for line in lines if "samples, batch size" in line] == ["batch size 1", "batch size 4"]
    assert sum(line.startswith("Speed") for line in lines) == 2 and max(map(len, lines)) <= 80
    said = " ".join(result.stderr.split())
    assert "batch size 1: prepare and encode take" in said and "batch size 4: prepare and encode take" in said


def test_bad_batch_sizes(command: tuple[Any, ...]) -> None:
    for size in ("0", "-1", "a", "", "1,,8", "1.5", "٣"):
        refused(run(*command, "--batch-size", size), "is not a batch size", "--batch-size 1,8")
    refused(run(*command, "--batch-size", "2,9"), "batch size 9 is larger than the number of samples")


def test_fail_below(command: tuple[Any, ...], ticking: None) -> None:
    options = ("--methods", "none,full", "--fail-below-stage", "prefill")
    passed = run(*command, *options, "--fail-below", 0.01)
    assert passed.exit_code == 0, passed.output
    failed = run(*command, *options, "--fail-below", 50, "--quiet", "--json")
    assert failed.exit_code == 1 and len(json.loads(failed.stdout)["results"]) == 3
    lines = failed.stderr.splitlines()
    assert [line.split(",")[0] for line in lines] == ["failed: none", "failed: full (again)"]
    assert "must reach 50x" in lines[0] and "speedup (prefill)" in lines[0]
    few = run(*command, *options, "--rounds", 5, "--fail-below", 0.01)
    assert few.exit_code == 1 and "no interval, which requires six rounds" in few.stderr
    refused(run(*command, "--fail-below", 1, "--fail-below-stage", "select"), "'select' has no speedup", "ttft")
    refused(run(*command, "--fail-below", "inf"), "--fail-below must be finite", "--fail-below 1.2")
    refused(run(*command, "--min-time", "inf"), "--min-time", "less than or equal to 604800")
    refused(run(*command, "--fail-below-stage", "ttft"), "--fail-below-stage requires --fail-below")


def case(method: str, low: float | None = 1.3, **more: Any) -> CaseResult:
    from test_report import result

    speedup = {} if method == "full" else {"ttft": Speedup(median=1.5, low=low, high=1.7, conclusive=True)}
    return result(method, 576 if method == "full" else 64, 64).model_copy(update={"speedup": speedup, **more})


def compared(*results: CaseResult, **more: Any) -> Comparison:
    from test_report import comparison

    return comparison(results).model_copy(update=more)


def test_shortfalls() -> None:
    good = compared(case("full"), case("mmtok"))
    assert shortfalls(good, "ttft", 1.3) == [] and len(shortfalls(good, "ttft", 1.31)) == 1
    assert "no interval" in shortfalls(compared(case("full"), case("mmtok", low=None)), "ttft", 0.1)[0]
    assert "no interval" in shortfalls(good, "prefill", 0.1)[0]
    failed = FailedCase(
        case=CaseId(method="fastv", parameters={}, budget="64", batch_size=8),
        round=3,
        reason="out of memory",
        message="2 GiB",
    )
    assert shortfalls(good.model_copy(update={"failures": [failed]}), "ttft", 1) == [
        "fastv @ 64, batch size 8: out of memory, so there is no speedup (ttft)"
    ]


def said(*results: CaseResult, **more: Any) -> str:
    return "\n".join(notes(compared(*results, **more)))


def test_trouble_is_told_with_what_to_do_about_it() -> None:
    quiet = said(case("full"), case("mmtok"))
    assert not any(word in quiet for word in ("outliers", "drift", "FLOPs cover", "GPU", "energy"))
    ttft = {"ttft": Times(median=0.1, p10=0.1, p90=0.1, values=[0.1] * 9 + [2.0])}
    slow = case("mmtok", outliers=[9])
    slow = slow.model_copy(update={"seconds": slow.seconds | ttft})
    assert "outliers: round 10 of 10 took up to 2 s to the first token, with a median of 100 ms (mmtok @ 64)" in said(
        case("full"), slow
    )
    assert "the first round took much longer than the others (mmtok @ 64): raise --warmup" in said(
        case("full"), case("mmtok", outliers=[0])
    )
    hot = said(case("full", drift=Drift(change=0.12, p=1e-4)), case("mmtok"))
    assert "drift: full became 12% slower" in hot and "let the machine cool" in hot
    cold = said(case("full", drift=Drift(change=-0.2, p=1e-4)), case("mmtok"))
    assert "became 20% faster" in cold and "raise --warmup" in cold


def test_what_the_flops_leave_out() -> None:
    whole = FlopCoverage(calls=200, counted={"mm": 20}, missed={})
    assert "FLOPs cover 10% of the operator calls" in said(case("full", flop_coverage=whole))
    lacking = FlopCoverage(calls=200, counted={"mm": 20}, missed={"_int_mm": 4})
    assert "FLOPs are underestimated: torch has no formula for _int_mm" in said(case("full", flop_coverage=lacking))


def test_what_the_gpu_gave_away() -> None:
    use = GpuUse(
        clock=1200,
        memory_clock=None,
        full_clock=1980,
        power_limit=350,
        throttled={"power cap": 3},
        other_processes=1,
        joules=12.34,
    )
    base = compared(case("full", gpu=use), case("mmtok"))
    on_gpu = base.environment.model_copy(update={"device": "cuda:0"})
    told = "\n".join(notes(base.model_copy(update={"environment": on_gpu})))
    assert "the GPU throttled (power cap) during full" in told and "1 other process used the GPU" in told
    assert "energy per answer (whole card): full 12.3 J" in told
    silent = compared(case("full"), environment=on_gpu)
    assert "pip install 'mmtok[gpu]'" in "\n".join(notes(silent))


def test_a_failed_case_fits_the_table() -> None:
    from test_report import shown

    failed = FailedCase(
        case=CaseId(method="sparsevlm:v2", parameters={}, budget="64", batch_size=1),
        round=None,
        reason="out of memory",
        message="x",
    )
    lines = shown(speed_table(compared(case("full"), case("mmtok"), failures=[failed])), width=80).splitlines()
    row = next(line for line in lines if "sparsevlm:v2" in line)
    assert "out of memory" in row and not any("…" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.5 s"), (90, "90 s"), (130, "2 minutes"), (7000, "117 minutes"), (7300, "2 h 2 min")]
)
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text
