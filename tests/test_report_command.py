"""`mmtok report`: runs shown again without a model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import refused, run, run_json

from mmtok_cli.results.merge import label
from mmtok_cli.results.schema import SamplePrediction


@pytest.fixture(scope="module")
def measured(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with pictures, and the page and the JSON that came of it."""
    place = tmp_path_factory.mktemp("measured")
    command = ("compare", "-m", tiny_directory, "--limit", 4, "-b", "8,4", "--max-new-tokens", 2, "--warmup", 0)
    outputs = [option for name in ("page.html", "result.json") for option in ("--export", place / name)]
    result = run(*command, "--methods", "mmtok,fastv", "--run-dir", place / "run", *outputs)
    assert result.exit_code == 0, result.output
    return place


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok_cli.models.load_model", None)


@pytest.fixture()
def other(measured: Path, tmp_path: Path) -> Path:
    """The same run, as if it had been measured on another machine."""
    other = tmp_path / "other"
    shutil.copytree(measured / "run", other)
    plan = json.loads((other / "plan.json").read_text())
    plan["environment"] |= {"device": "cuda:0", "dtype": "float16", "git_commit": "f" * 40}
    (other / "plan.json").write_text(json.dumps(plan))
    return other


def test_one_run_says_what_it_said_when_it_was_measured(measured: Path, tmp_path: Path) -> None:
    outputs = [option for name in ("page.html", "t.md", "t.csv") for option in ("--export", tmp_path / name)]
    shown = run_json("report", measured / "run", *outputs)
    assert shown == json.loads((measured / "result.json").read_text())
    assert (tmp_path / "page.html").read_text() == (measured / "page.html").read_text()
    assert next(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))["method"] == "full"


def test_the_page_shows_what_is_kept_at_the_middle_budget(measured: Path) -> None:
    page = (measured / "page.html").read_text()
    assert page.count("Vision tokens kept by mmtok @ 4") == page.count("Vision tokens kept by fastv @ 4") > 0
    assert "Vision tokens kept by mmtok @ 8" not in page
    index = json.loads((measured / "run" / "overlays" / "index.json").read_text())
    captions = ["full", "mmtok @ 4", "fastv @ 4"]
    assert [[p["caption"] for p in group["pictures"]] for group in index["groups"]] == [captions] * 3
    assert all(p["note"].startswith("“") for group in index["groups"] for p in group["pictures"])
    predictions = json.loads((measured / "run" / "predictions" / "000000.json").read_text())
    asked, answers = predictions["samples"][0], predictions["predictions"]
    first = index["groups"][0]
    assert first["references"] == " / ".join(asked["references"]) and first["title"] == asked["question"]
    assert f"reference answer: {asked['references'][0]}" in page
    assert first["pictures"][0]["note"] == f"“{answers[0]['answer']}”" and f"“{answers[0]['answer']}”" in page


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Strict JSON lines."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_predictions_are_exported_sample_by_sample(measured: Path, tmp_path: Path) -> None:
    assert run("report", measured / "run", "--export", tmp_path / "p.jsonl").exit_code == 0
    rows = read_lines(tmp_path / "p.jsonl")
    assert [(row["sample"], row["method"], row["budget"]) for row in rows[:5]] == [
        (0, "full", None), (0, "mmtok", "8"), (0, "mmtok", "4"), (0, "fastv", "8"), (0, "fastv", "4")
    ]  # fmt: skip
    assert len(rows) == 4 * 5 and list(rows[0]) == [f.alias or n for n, f in SamplePrediction.model_fields.items()]
    saved = [json.loads(file.read_text()) for file in sorted((measured / "run" / "predictions").iterdir())]
    theirs = {(each["sample"], each["case"]): each for batch in saved for each in batch["predictions"]}
    labels = [each for batch in saved for each in batch["samples"]]
    for place, row in enumerate(rows):
        sample, case = divmod(place, 5)
        mine, base, asked = theirs[sample, case], theirs[sample, 0], labels[sample]
        assert (row["question"], row["images"]) == (asked["question"], asked["images"]) and asked["question"]
        assert row["references"] == asked["references"] and asked["references"][0] == asked["answer"]
        assert (row["prediction"], row["baseline_prediction"]) == (mine["answer"], base["answer"])
        assert (row["score"], row["baseline_score"]) == (mine["score"], base["score"])
        assert (row["kl"], row["top1"], row["same"]) == tuple(mine["closeness"].values())
        assert (row["kept"], row["total"]) == (mine["tokens"]["kept"], mine["tokens"]["total"])
    shown = run_json("report", measured / "run")
    for place, result in enumerate(shown["results"][:5]):
        mine = rows[place::5]
        assert sum(row["score"] for row in mine) == pytest.approx(result["score_counts"]["right"])
        lost, gained = (sum(row["flip"] == flip for row in mine) for flip in ("lost", "gained"))
        assert result["flips"] is None or (lost, gained) == (
            result["flips"]["right_wrong"],
            result["flips"]["wrong_right"],
        )


def test_flips_are_relative_to_the_unreduced_model(measured: Path, tmp_path: Path) -> None:
    """Also in a run without the fields that older versions did not record."""
    old = Path(shutil.copytree(measured / "run", tmp_path / "old"))
    scores = {0: [1.0, 0.0, 1.0, 0.4, 0.6], 1: [0.2, 0.9, 0.0, 0.5, 0.4]}
    for file in (old / "predictions").iterdir():
        saved = json.loads(file.read_text())
        for asked in saved["samples"]:
            for name in ("question", "references", "id"):
                del asked[name]
        for each in saved["predictions"]:
            if each["sample"] in scores:
                each["score"] = scores[each["sample"]][each["case"]]
        file.write_text(json.dumps(saved))
    assert run("report", old, measured / "run", "--export", tmp_path / "p.jsonl").exit_code == 0
    rows = read_lines(tmp_path / "p.jsonl")
    assert [row["flip"] for row in rows[:10]] == ["", "lost", "", "lost", "", "", "gained", "", "gained", ""]
    assert rows[0]["question"] is rows[0]["references"] is rows[0]["id"] is None
    assert [row["run"] for row in rows] == ["A"] * 20 + ["B"] * 20 and rows[20]["question"]


def test_a_run_without_answers_has_no_predictions(measured: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(measured / "run", tmp_path / "bare"))
    shutil.rmtree(bare / "predictions")
    files = ("--export", tmp_path / "t.csv", "--export", tmp_path / "p.jsonl")
    refused(run("report", bare, *files), "no answers were evaluated")
    assert not (tmp_path / "p.jsonl").exists() and not (tmp_path / "t.csv").exists()


def test_runs_of_one_kind_share_their_tables(
    measured: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outputs = [option for name in ("page.html", "t.md", "t.csv") for option in ("--export", tmp_path / name)]
    shown = run("report", measured / "run", other, *outputs)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("Speed ") == 1 and max(map(len, shown.stdout.splitlines())) <= 80
    names = [line.split("  ")[0].strip() for line in shown.stdout.splitlines()]
    assert names.count("A: full") == names.count("B: full") > 0 and "B: mmtok" in names
    said = " ".join(shown.stderr.split())
    assert "device differs: cpu (A), cuda:0 (B)" in said and "dtype differs: float32 (A), float16 (B)" in said
    assert "git commit differs: " in said and f"{'f' * 9} (" in said and "torch differs" not in said
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["A"] * 5 + ["B"] * 5
    assert "B: fastv" in (tmp_path / "t.md").read_text() and "B: fastv" in (tmp_path / "page.html").read_text()
    merged = run_json("report", measured / "run", other)
    alone = run_json("report", other)
    theirs = [case | {"case": case["case"] | {"run": None}} for case in merged["results"] if case["case"]["run"] == "B"]
    assert theirs == alone["results"]  # speedups and retention are those against their own baseline


def test_runs_that_do_not_belong_together(measured: Path, other: Path, tmp_path: Path) -> None:
    plan: dict[str, Any] = json.loads((other / "plan.json").read_text())
    (other / "plan.json").write_text(json.dumps(plan | {"data_digest": "0"}))
    shown = run("report", measured / "run", other)
    assert shown.exit_code == 0 and shown.stdout.count("Speed ") == 2 and "A: " not in shown.stdout
    refused(run("report", measured / "run", other, "--json"), "differ in their model or samples", "4 samples")
    refused(run("report", measured / "run", other, "--export", tmp_path / "t.csv"), "one after another")
    assert not (tmp_path / "t.csv").exists()


def test_what_cannot_be_reported(measured: Path, tmp_path: Path) -> None:
    refused(run("report", tmp_path), "is not a run directory")
    refused(run("report", measured / "run", measured / "run" / ".." / "run"), "given twice")
    refused(run("report", measured / "run", "--export", tmp_path / "t.xlsx"), "--export", ".csv")
    begun = tmp_path / "begun"
    shutil.copytree(measured / "run", begun)
    shutil.rmtree(begun / "rounds")
    refused(run("report", begun), "has no complete round", "--resume")


def test_labels() -> None:
    assert [label(i) for i in (0, 25, 26, 53)] == ["A", "Z", "A2", "B3"]
