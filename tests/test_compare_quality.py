"""The evaluation of `mmtok compare`: any data, by one process or several, stopped and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import refused, run, run_json
from conftest import picture

from mmtok_cli.evaluation import predictions

CASES = ["full", "mmtok", "fastv"]


@pytest.fixture()
def command(tiny_directory: Path) -> tuple[Any, ...]:
    common = ("-m", tiny_directory, "-b", "4", "--max-new-tokens", 2, "--warmup", 0, "--rounds", 1)
    return ("compare", *common, "--methods", "mmtok,fastv")


def quality(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("score", "score_counts", "retention", "retention_low", "retention_high", "flips", "yes_no", "fidelity")
    return [{"method": case["case"]["method"]} | {name: case[name] for name in names} for case in comparison["results"]]


def pope(folder: Path, images: int) -> Path:
    """A POPE file of two questions about each image."""
    folder.mkdir()
    lines = []
    for i in range(images):
        picture(90, 60 + i, i).save(folder / f"{i}.png")
        for j, label in enumerate(("yes", "no")):
            lines.append({"question_id": 2 * i + j, "image": f"{i}.png", "text": "Is there a dog?", "label": label})
    (folder / "pope.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pope.jsonl"


def test_yes_and_no(command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = pope(tmp_path / "data", 3)
    (tmp_path / "data" / "1.png").unlink()
    (tmp_path / "data" / "2.png").write_bytes(b"no picture")
    shown = run(*command, "--data", f"pope:{file}", "--export", tmp_path / "t.json")
    assert shown.exit_code == 0, shown.output
    assert "Yes or no" in shown.stdout and "says yes" in shown.stdout and "2 samples of pope.jsonl" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    said = " ".join(shown.stderr.split())
    assert "image files missing: 1; samples left out because of that: 2" in said and "2.png is not an image" in said
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["schedule"]["samples"] == 2 and result["schedule"]["planned_samples"] == 4
    assert len(result["left_out"]) == 3
    full = result["results"][0]
    assert full["score"] == full["yes_no"]["f1"] and full["score_counts"]["asked"] == 2


def test_pictures_without_answers(command: tuple[Any, ...], tmp_path: Path) -> None:
    pope(tmp_path / "data", 3)
    shown = run(*command, "--data", tmp_path / "data", "--question", "What is it?", "--export", tmp_path / "t.json")
    assert shown.exit_code == 0, shown.output
    assert "Fidelity" in shown.stdout and "Quality" not in shown.stdout and "retention" not in shown.stdout
    result = json.loads((tmp_path / "t.json").read_text())
    assert all(case["score"] is None and case["flips"] is None for case in result["results"])
    assert 0 <= result["results"][1]["fidelity"]["same"] <= 1


def test_bad_data(command: tuple[Any, ...], tmp_path: Path) -> None:
    refused(run(*command, "--data", tmp_path / "gone.jsonl"), "there is no file")
    refused(run(*command, "--question", "What?"), "demo questions are fixed")
    refused(run(*command, "--columns", "question"), "'question' is not field=name")
    file = pope(tmp_path / "data", 1)
    (tmp_path / "data" / "0.png").write_bytes(b"no picture")
    refused(run(*command, "--data", file), "only 0 of 2 samples can be used", "0.png is not an image")


def test_times_alone(command: tuple[Any, ...], tmp_path: Path) -> None:
    outputs = ("--export", tmp_path / "t.json", "--export", tmp_path / "t.html")
    shown = run(*command, "--limit", 2, "--no-quality", *outputs)
    page = (tmp_path / "t.html").read_text()
    assert "loses more than that" not in page and "Quality against cost" not in page and "Time per stage" in page
    assert "score" not in shown.stdout and "same" not in shown.stdout and "Memory, operations" in shown.stdout
    result = json.loads((tmp_path / "t.json").read_text())
    assert all(case["score"] is None and case["fidelity"] is None for case in result["results"])
    assert not result["interrupted"] and not (Path(result["run_directory"]) / "predictions").exists()


def test_part_of_a_model_is_not_asked(command: tuple[Any, ...], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = run(*command, "--limit", 2, "--layers", 1, "--methods", "mmtok", "--export", page)
    assert shown.exit_code == 0, shown.output
    assert "decoder layers measured, the rest estimated" in page.read_text()
    assert "answers are not evaluated" in shown.stderr and "score" not in shown.stdout


def test_the_attention_kernel_belongs_to_the_run(command: tuple[Any, ...], tmp_path: Path) -> None:
    place = ("--run-dir", tmp_path / "run")
    eager = run_json(*command, "--limit", 2, "--attention", "eager", *place)
    assert eager["environment"]["attention"] == "eager"
    refused(run("compare", *place, "--resume", "--attention", "sdpa"), "--attention is sdpa here and eager in the run")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_stopped_during_evaluation_and_resumed(
    stop: type[BaseException], command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[int]] = []
    usual = predictions.predict_batch

    def predict_batch(model: Any, cases: Any, dataset: Any, numbers: list[int], *rest: Any) -> Any:
        tried.append(numbers)
        if stopping and len(tried) == 3:
            raise stop
        return usual(model, cases, dataset, numbers, *rest)

    monkeypatch.setattr(predictions, "predict_batch", predict_batch)
    options = ("--limit", 7, "--batch-size", "1,2", "--run-dir", tmp_path / "run")
    stopping = True
    shown = run(*command, *options)
    if stop is KeyboardInterrupt:
        assert shown.exit_code == 130 and "interrupted: 4 of 7 samples were evaluated" in " ".join(shown.stderr.split())
    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "predictions").iterdir()}
    assert len(before) == 2
    stopping = False
    resumed = run_json("compare", "--run-dir", tmp_path / "run", "--resume")
    assert tried[3:] == [[4, 5], [6]]  # whole batches of the larger size, and none twice
    after = {file.name: file.read_bytes() for file in (tmp_path / "run" / "predictions").iterdir()}
    assert before.items() <= after.items()
    whole = run_json(*command, *options[:-1], tmp_path / "whole")
    assert quality(resumed) == quality(whole) and not resumed["interrupted"]
    small, large = quality(whole)[:3], quality(whole)[3:]
    assert small == large and [case["method"] for case in small] == CASES


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_panorama_costs_no_case_anything(place: int, command: tuple[Any, ...], tmp_path: Path) -> None:
    """An image with fewer tokens than the budget that are not padding, wherever it comes."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        picture(*((400, 40) if number == place else (84, 84)), number).save(folder / f"{number}.png")
    methods = "mmtok,resize,resize:pool,random,fastv,none"
    options = ("--set", "fastv.layer=1", "--methods", methods, "-b", "30", "--rounds", 3)
    result = run_json(*command, "--data", folder, "--question", "What?", *options)
    assert [case["case"]["method"] for case in result["results"]] == ["full", *methods.split(",")]
    assert not result["failures"] and not result["unevaluated"]
    assert all(case["fidelity"] for case in result["results"][1:])
    kept = {case["case"]["method"]: case["tokens"]["kept"] for case in result["results"]}
    assert kept["mmtok"] == kept["random"] == (30 + 30 + 12) / 3 and kept["resize"] == 30


def test_a_sample_that_the_model_cannot_read_is_not_timed(command: tuple[Any, ...], tmp_path: Path) -> None:
    file = pope(tmp_path / "data", 3)
    first, *rest = file.read_text().splitlines()
    endless = json.dumps(json.loads(first) | {"text": "word " * 3000, "question": "word " * 3000})
    file.write_text("\n".join([endless, *rest]) + "\n")
    shown = run(*command, "--data", file, "--export", tmp_path / "out.json")
    assert shown.exit_code == 0 and "sample 1 is left out" in shown.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["results"]) > 1 and not result["failures"]
    assert any("not fit into" in line for line in result["left_out"])


def test_undecodable_names_are_recorded(command: tuple[Any, ...], tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"data\xff")
    file = pope(folder, 2)
    made = run(*command, "--data", file, "--limit", 2, "--run-dir", tmp_path / "run")
    assert made.exit_code == 0, made.output
    shown = run("report", tmp_path / "run", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["schedule"]["samples"] == 2
    assert "data\\udcff" in json.loads((tmp_path / "run" / "plan.json").read_text())["options"]["data"]


def test_two_processes_give_the_scores_of_one(command: tuple[Any, ...], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    options = [str(word) for word in (*command, "--limit", 12, "--batch-size", 2, "--device", "cpu", "--json")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmtok_cli"]
    done = subprocess.run([*launch, *options, "--run-dir", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one object: one of the processes speaks
    one = run_json(*options[:-1], "--run-dir", tmp_path / "one")

    def without_noise(comparison: dict[str, Any]) -> list[Any]:
        """KL is a sum whose last digits hang on the number of threads."""
        return [
            {**case, "fidelity": case["fidelity"] and {**case["fidelity"], "kl": round(case["fidelity"]["kl"], 4)}}
            for case in quality(comparison)
        ]

    assert without_noise(two) == without_noise(one)
    assert len(list((tmp_path / "two" / "predictions").iterdir())) == 6
    assert not list((tmp_path / "two").rglob("*.part"))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_the_output_names_the_metric(command: tuple[Any, ...], tmp_path: Path) -> None:
    """Whatever the slice holds; the metric of the file is that of the whole run."""
    file = pope(tmp_path / "data", 2)
    outputs = [tmp_path / f"t.{kind}" for kind in ("json", "csv", "html", "md")]
    exports = [each for path in outputs for each in ("--export", path)]
    shown = run(*command, "--data", file, "--limit", 1, *exports)
    assert shown.exit_code == 0, shown.output
    assert "Quality (metric: yes-no)" in shown.stdout and "score: F1 of yes, by POPE's script" in " ".join(
        shown.stderr.split()
    )
    result = json.loads(outputs[0].read_text())
    assert result["schedule"]["metric"] == "yes-no" and result["results"][0]["yes_no"] is not None
    assert ",yes-no," in outputs[1].read_text().splitlines()[1]
    assert all("F1 of yes, by POPE" in path.read_text() for path in outputs[2:])
    plan = tmp_path / "run"
    plain = write_rows(tmp_path / "data" / "plain.jsonl", [{"image": "0.png", "question": "Is it?", "answer": "no"}])
    for options, pointed_out in (((), True), (("--metric", "exact"), False)):
        result = run_json(*command, "--data", plain, *options)
        assert result["schedule"]["metric"] == "exact"
        assert any("--metric yes-no" in remark for remark in result["remarks"]) == pointed_out
    by_hand = run_json(*command, "--data", file, "--metric", "mme", "--run-dir", plan)
    assert by_hand["schedule"]["metric"] == "mme" and by_hand["results"][0]["paired"]["kinds"] == 1
    table = run("report", plan).stdout
    assert "Quality (metric: mme)" in table and "acc+" in table and "MME" in table
    refused(run("compare", "--run-dir", plan, "--resume", "--metric", "exact"), "--metric is exact here and mme in the")
    refused(run(*command, "--data", file, "--metric", "vqav2"), "pope.jsonl, line 1: VQA accuracy needs 3")


def test_a_model_that_answers_nothing_right(command: tuple[Any, ...], tmp_path: Path) -> None:
    """There is nothing to retain: no retention, no claim about reductions, an axis with a range, and a warning."""
    picture(90, 60, 1).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What is it?", "answer": "something that it never says"}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(line)] * 3))
    outputs = ("--export", tmp_path / "t.json", "--export", tmp_path / "t.html", "--plot", tmp_path / "t.svg")
    shown = run(*command, "--data", tmp_path / "a.jsonl", *outputs)
    assert shown.exit_code == 0, shown.output
    assert "warning: the unreduced model answers nothing right" in " ".join(shown.stderr.split())
    result = json.loads((tmp_path / "t.json").read_text())
    for case in result["results"]:
        assert case["score"] == 0 and case["retention"] is case["retention_low"] is None
    page = (tmp_path / "t.html").read_text()
    assert "loses more than that" not in page and "it cannot do this task" in page
    assert ">100 %<" in page and ">100</text>" in (tmp_path / "t.svg").read_text()  # the axes of quality


def test_f1_of_zero_is_not_called_inability(command: tuple[Any, ...], tmp_path: Path) -> None:
    """Where no answer is yes, F1 is 0 however right the model is."""
    picture(90, 60, 1).save(tmp_path / "a.png")
    line = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    (tmp_path / "a.json").write_text("\n".join([json.dumps(line)] * 3))
    shown = run(*command, "--data", tmp_path / "a.json", "--export", tmp_path / "t.html")
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stderr.split())
    accuracy = run_json(*command, "--data", tmp_path / "a.json")["results"][0]["yes_no"]["accuracy"]
    assert ("finds no answer yes, so F1 is 0" in said) == (accuracy > 0)
    assert ("answers nothing right" in said) == (accuracy == 0)
    assert "loses more than that" not in (tmp_path / "t.html").read_text()
