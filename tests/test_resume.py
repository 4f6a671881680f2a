"""Runs that are stopped, by whatever, and gone on with."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import refused, run, run_json, run_process
from conftest import picture
from safetensors.torch import load_file, save_file

import mmtok_cli.timing.runner as runner
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import demo_samples
from mmtok_cli.results.progress import is_finished, whole_rounds
from mmtok_cli.results.records import TimedRun
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import Comparison, from_json, json_text
from mmtok_cli.summary import summarise_run

CASES = 4


@pytest.fixture()
def command(tiny_directory: Path) -> tuple[Any, ...]:
    common = ("-m", tiny_directory, "--limit", 6, "-b", "4", "--max-new-tokens", 2, "--warmup", 0)
    return ("compare", *common, "--methods", "mmtok,fastv,random")


def records(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "rounds").glob("*.json"))}


def without_figures(comparison: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock or on where the run was written."""
    kept = ("case", "positions", "tokens", "flops", "score", "score_counts")
    kept += ("retention", "retention_low", "retention_high", "flips", "yes_no", "fidelity")
    cases = [{key: case[key] for key in kept} for case in comparison["results"]]
    return {"schedule": comparison["schedule"], "rules": comparison["rules"], "cases": cases}


class Stop(BaseException):
    """Ends a process that a test cannot kill, since it is its own."""


def stopping_after(runs: int, stop: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many runs of a case be measured, then raise."""
    done = Counter[str]()
    usual = runner.run_case

    def run_case(*arguments: Any, **options: Any) -> Any:
        done["runs"] += 1
        if done["runs"] > runs:
            raise stop
        return usual(*arguments, **options)

    monkeypatch.setattr(runner, "run_case", run_case)


KILL = f"""
import os, signal
from pathlib import Path
usual, written = Path.replace, []
def replace(self, target):
    if Path(target).parent.name == "rounds":
        written.append(target)
        if len(written) == {3 * CASES + 3}:
            os.kill(os.getpid(), signal.SIGKILL)
    return usual(self, target)
Path.replace = replace
"""


def test_killed_and_resumed(command: tuple[Any, ...], tmp_path: Path) -> None:
    """kill -9 of a real process while it writes a record; nothing is measured twice and nothing is broken."""
    directory = tmp_path / "run"
    killed = run_process(*command, "--rounds", 8, "--run-dir", directory, "--quiet", before=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = records(directory)
    assert len(before) == 3 * CASES + 2 and len(list((directory / "rounds").iterdir())) == len(before) + 1
    assert all(from_json(TimedRun, record.decode()) for record in before.values())

    resumed = run_json("compare", "--run-dir", directory, "--resume")
    after = records(directory)
    assert len(after) == len(list((directory / "rounds").iterdir())) == 8 * CASES
    assert all(after[name] == record for name, record in before.items())
    assert not resumed["interrupted"] and resumed["schedule"]["rounds"] == 8
    whole = run_json(*command, "--rounds", 8, "--run-dir", tmp_path / "whole")
    assert without_figures(resumed) == without_figures(whole)
    assert all(len(case["seconds"]["ttft"]["values"]) == 8 for case in resumed["results"])


@pytest.mark.parametrize("runs", [1, 2, 3, CASES, CASES + 3])
def test_stopped_anywhere_in_a_round(
    runs: int, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(runs, Stop(), patch)
        with pytest.raises(Stop):
            run(*command, "--run-dir", directory)
    before = records(directory)
    assert len(before) == runs
    resumed = run_json("compare", "--run-dir", directory, "--resume")
    after = records(directory)
    assert len(after) == 6 * CASES and all(after[name] == before[name] for name in before)
    assert without_figures(resumed) == without_figures(run_json(*command, "--run-dir", tmp_path / "whole"))


def test_a_run_says_the_same_whenever_it_is_read(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables are made of records alone: those of a finished run need no model and stay to the last digit."""
    first = run_json(*command, "--batch-size", "1,3", "--runs", 2, "--run-dir", tmp_path / "run")
    monkeypatch.setattr("mmtok_cli.configuration.load_model", None)
    again = run_json("compare", "--run-dir", tmp_path / "run", "--resume", "--quiet")
    assert again == first
    store = RunDirectory.open(tmp_path / "run")
    comparison = summarise_run(store)
    assert is_finished(store) and json.loads(json_text(comparison)) == first
    assert from_json(Comparison, json_text(comparison)) == comparison
    assert json.loads((tmp_path / "run" / "comparison.json").read_text()) == first
    assert [case["case"]["batch_size"] for case in first["results"]] == [1] * CASES + [3] * CASES
    assert first["schedule"]["batch_size"] == [1, 3] and first["schedule"]["runs"] == 2
    ones, threes = first["results"][1], first["results"][CASES + 1]
    assert all(len(values) == 2 for values in ones["seconds"]["ttft"]["repetitions"])
    assert ones["score_counts"]["asked"] == threes["score_counts"]["asked"] == 6
    assert ones["tokens"]["text"] == threes["tokens"]["text"] and "ttft" in threes["speedup"]


def test_interrupting_shows_whole_rounds_and_how_to_go_on(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_after(3 * CASES + 1, KeyboardInterrupt(), monkeypatch)
    result = run(*command, "--run-dir", tmp_path / "run")
    assert result.exit_code == 130
    said = " ".join(result.stderr.split())
    assert "interrupted: 3 of 6 rounds were completed" in said
    assert f"mmtok compare --run-dir {tmp_path / 'run'} --resume" in result.stderr


def test_a_full_disk_loses_nothing(command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    usual = Path.write_text

    def write_text(self: Path, *arguments: Any, **options: Any) -> int:
        if '"round":2,' in arguments[0]:
            usual(self, "{half of", encoding="utf-8")
            raise OSError(28, "No space left on device")
        return usual(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        result = run(*command, "--run-dir", directory)
    assert result.exit_code == 1 and "No space left on device" in result.stderr and "Traceback" not in result.stderr
    assert "interrupted: 2 of 6 rounds were completed" in " ".join(result.stderr.split()) and "mmtok" in result.stdout
    assert len(whole_rounds(RunDirectory.open(directory))) == 2  # and nothing that is there is half of something
    assert run_json("compare", "--run-dir", directory, "--resume")["schedule"]["rounds"] == 6


def test_what_cannot_be_written_at_all(command: tuple[Any, ...], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    refused(run(*command, "--run-dir", taken / "run"), "--run-dir")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError()])
@pytest.mark.parametrize("at", ["warm-up", "third round"])
def test_a_case_that_runs_out_of_memory_is_a_row(
    at: str, error: Exception, command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Case.answer
    asked = Counter[str]()

    def answer(self: Case, *arguments: Any, **options: Any) -> Any:
        asked[self.name] += 1
        if self.name == "fastv" and asked["fastv"] > (0 if at == "warm-up" else 3):  # FLOPs take one
            raise error
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Case, "answer", answer)
    result = run(*command, "--run-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("fastv"))
    assert "out of memory" in row
    said = " ".join(result.stderr.split())
    when = "during warm-up" if at == "warm-up" else "in round 3"
    assert f"fastv @ 4 (batch size 1): out of memory {when}" in said and "lower --batch-size" in said
    assert (str(error) or "MemoryError") in said

    resumed = run_json("compare", "--run-dir", tmp_path / "run", "--resume")
    assert [case["case"]["method"] for case in resumed["results"]] == ["full", "mmtok", "random"]
    assert [case["case"]["method"] for case in resumed["failures"]] == ["fastv"]
    assert all(len(case["seconds"]["ttft"]["values"]) == 6 for case in resumed["results"])


def test_a_baseline_that_runs_out_of_memory_leaves_the_others_without_speedups(
    command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = Case.answer

    def answer(self: Case, *arguments: Any, **options: Any) -> Any:
        if self.name == "full" and self.batch_size == 3:
            raise torch.OutOfMemoryError
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Case, "answer", answer)
    options = ("--batch-size", "1,3", "--plot", tmp_path / "plot.png")
    shown = run(*command, *options, "--run-dir", tmp_path / "shown")
    assert shown.exit_code == 0 and shown.stdout.count("out of memory") == 1 and (tmp_path / "plot.png").exists()
    result = run_json(*command, *options)
    small, large = ([c for c in result["results"] if c["case"]["batch_size"] == size] for size in (1, 3))
    assert all("ttft" in case["speedup"] and case["fidelity"] for case in small[1:])
    assert [case["case"]["method"] for case in large] == ["mmtok", "fastv", "random"]
    assert all(case["speedup"] == {} for case in large)
    assert [case["score"] for case in large] == [case["score"] for case in small[1:]]  # asked one by one instead

    monkeypatch.setattr(Case, "answer", lambda *arguments, **options: (_ for _ in ()).throw(MemoryError()))
    nothing = run(*command, "--run-dir", tmp_path / "nothing")
    assert nothing.exit_code == 1 and nothing.stdout.count("out of memory") == CASES


def test_a_sample_that_a_case_cannot_follow_ends_that_case_alone(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtok_cli.errors import MMTokError

    usual = Case.answer
    asked = Counter[str]()

    def answer(self: Case, *arguments: Any, **options: Any) -> Any:
        asked[self.name] += 1
        if self.name == "random" and asked["random"] == 4:
            raise MMTokError("only 3 tokens are not padding")
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Case, "answer", answer)
    result = run_json(*command, "--run-dir", tmp_path / "run")
    assert [(case["case"]["method"], case["reason"], case["round"]) for case in result["failures"]] == [
        ("random", "refused", 2)
    ]
    assert len(result["results"]) == CASES - 1


def test_resuming_elsewhere_is_refused(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    run_json(*command, "--run-dir", directory)
    for path in sorted((directory / "rounds").glob("*.json"))[-3:]:
        path.unlink()
    resume = ("compare", "--run-dir", directory, "--resume")
    plan = json.loads((directory / "plan.json").read_text())

    other = json.loads(json.dumps(plan))
    other["environment"]["torch"] = "1.0"
    other["environment"]["git_commit"] = "abc"
    (directory / "plan.json").write_text(json.dumps(other))
    refused(run(*resume), "another environment", "torch 1.0 then", f"{torch.__version__} now", "git commit abc then")

    other = json.loads(json.dumps(plan))
    other["cases"][1]["case"]["parameters"]["alpha"] = 0.25
    (directory / "plan.json").write_text(json.dumps(other))
    refused(run(*resume), "mmtok @ 4 has changed", "alpha 0.25 then, 0.5 now")

    (directory / "plan.json").write_text(json.dumps(plan))
    refused(run(*resume, "--budget", "5"), "--budget is 5 here and 4 in the run", "omit --budget")
    refused(run(*resume, "--set", "mmtok.alpha=0.1"), "--set is mmtok.alpha=0.1 here and missing in the run")
    for option in ("--model", "--data", "--image-root"):
        for name in ("~nobody-here/x", "x" * 300):
            refused(run(*resume, option, name), f"{option} is", f"omit {option}")
    refused(run(*command, "--run-dir", directory), "already contains a run", "--resume")
    assert len(run_json(*resume, "--budget", "4")["results"]) == CASES  # what is spelled out may say the same

    next((directory / "rounds").glob("*.json")).unlink()
    samples = list(reversed(demo_samples(6)))
    monkeypatch.setattr("mmtok_cli.data.datasets.demo_samples", lambda limit: samples)
    refused(run(*resume), "the samples of demo have changed")


def test_damaged_and_missing_runs(command: tuple[Any, ...], tmp_path: Path) -> None:
    refused(run("compare", "--resume"), "no run to resume in runs")
    refused(run("compare", "--resume", "--run-dir", tmp_path / "gone"), "is not a run directory")
    first = run_json(*command)  # where a run goes that nobody has named
    assert Path(first["run_directory"]).parent == Path("runs") and (Path(first["run_directory"]) / "plan.json").exists()
    record = next(Path(first["run_directory"], "rounds").glob("00003-*.json"))
    whole = record.read_text()
    record.write_text(whole[:50])
    refused(run("compare", "--resume"), str(record), "delete this file")
    record.write_text(whole.replace('"key":"', '"key":"0'))
    refused(run("compare", "--resume"), str(record), "does not belong to the run")
    record.unlink()
    assert run_json("compare", "--resume")["schedule"]["rounds"] == 6


def test_rounds_go_on_until_enough_was_measured(command: tuple[Any, ...], tmp_path: Path, ticking: None) -> None:
    result = run_json(*command, "--rounds", 2, "--min-time", 2, "--run-dir", tmp_path / "run")
    rounds = result["schedule"]["rounds"]
    taken = [sum(values) for values in zip(*(c["seconds"]["total"]["values"] for c in result["results"]), strict=True)]
    assert rounds > 2 and sum(taken) >= 2 > sum(taken[:-1])
    assert result["planned_rounds"] == 2 and not result["interrupted"]
    assert run_json("compare", "--run-dir", tmp_path / "run", "--resume") == result


def test_two_processes_do_not_measure_into_one_directory(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(5, Stop(), patch)
        with pytest.raises(Stop):
            run(*command, "--run-dir", directory)
    with RunDirectory.resume(directory):
        refused(run("compare", "--run-dir", directory, "--resume"), "is in use by another run")
    assert len(records(directory)) == 5
    assert not run_json("compare", "--run-dir", directory, "--resume")["interrupted"]


@pytest.mark.parametrize("written", ["mmtok.plan/1", "mmtok.plan/99"])
def test_a_run_in_another_format_is_refused_by_its_version(written: str, tmp_path: Path) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps({"schema": written, "environment": {"mmtok": "0.0.7"}, "cases": 3}))
    for command in (("report", directory), ("compare", "--resume", "--run-dir", directory)):
        refused(run(*command), written, "newer" if written.endswith("99") else "older", "mmtok 0.0.7", "mmtok.plan/2")


def test_other_weights_and_other_images_are_noticed(tiny_directory: Path, tmp_path: Path) -> None:
    """Both keep their names, and a table of two models or two pictures would be wrong."""
    model, folder = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_directory, model)
    folder.mkdir()
    for number in range(2):
        picture(84, 84, number).save(folder / f"{number}.png")
    command = ("compare", "-m", model, "--methods", "random", "-b", 4, "--max-new-tokens", 1, "--rounds", 2)
    command += ("--data", folder, "--question", "What?", "--run-dir", tmp_path / "run")
    assert run(*command).exit_code == 0
    (measured,) = (tmp_path / "run" / "rounds").glob("00001-001.json")
    measured.unlink()
    weights = load_file(model / "model.safetensors")
    save_file({name: weight * 1.3 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    refused(run("compare", "--resume", "--run-dir", tmp_path / "run"), "another environment: weights digest")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    picture(90, 90, 7).save(folder / "1.png")
    refused(run("compare", "--resume", "--run-dir", tmp_path / "run"), "have changed")
    picture(84, 84, 1).save(folder / "1.png")
    assert run("compare", "--resume", "--run-dir", tmp_path / "run").exit_code == 0
