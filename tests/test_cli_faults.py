"""The command line at fault: one clear line that says what is wrong and what to do, and nothing lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import QUESTION, refused, run, run_json
from conftest import picture


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("0", ["--method none"]),
        ("-3", ["'-3' is not a budget"]),
        ("abc", ["'abc' is not a budget"]),
        ("101%", ["'101%' is not a budget"]),
        ("0%", ["--method none"]),
        ("", ["not a budget"]),
        ("1.5", ["not a budget"]),
        ("9" * 5000, ["not a budget"]),
        ("٣", ["not a budget"]),
        ("1000000", ["more than the 36 vision tokens", "choose 1 to 36"]),
        ("1%", ["less than one", "at least 2.78%"]),
    ],
)
def test_bad_budgets(budget: str, words: list[str], tiny_directory: Path, photo: Path) -> None:
    refused(run("infer", photo, QUESTION, "-m", tiny_directory, "--budget", budget), *words)


def test_budget_that_resizing_cannot_meet(tiny_directory: Path, photo: Path) -> None:
    result = run("infer", photo, QUESTION, "-m", tiny_directory, "--budget", 7, "--method", "resize")
    refused(result, "no rectangle of 7 tokens", "6 or 8")


def test_bad_names(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    refused(run("infer", photo, QUESTION, "--method", "mmtk"), "no method 'mmtk'", "did you mean mmtok")
    refused(run("compare", "--methods", "mmtok,rndom"), "did you mean random")
    refused(run("compare", "--methods", ","), "no method was named")
    refused(run("methods", "fastvv"), "no method 'fastvv'", "`mmtok methods`")
    refused(run("infer", photo, QUESTION, "-m", "llava-1.5-7"), "no model", "did you mean llava-1.5-7b")
    refused(run("infer", photo, QUESTION, "-m", "./nowhere/at/all"), "no model")
    (tmp_path / "empty").mkdir()
    refused(run("infer", photo, QUESTION, "-m", tmp_path / "empty"), "config.json is missing")
    refused(run("infer", photo, QUESTION, "-m", photo), "is a file")
    refused(run("infer", photo, QUESTION, "-m", tiny_directory, "--device", "tpu"), "no device 'tpu'")
    refused(run("infer", photo, QUESTION, "-m", tiny_directory, "--dtype", "int3"), "no data type 'int3'")


def test_broken_model_directories(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_directory.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    weights = bare / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(run("infer", photo, QUESTION, "-m", bare), "model.safetensors", "cannot be read")
    weights.unlink()
    refused(run("infer", photo, QUESTION, "-m", bare), "has no weights")
    weights.write_bytes(whole)
    (bare / "config.json").write_text("{")
    refused(run("infer", photo, QUESTION, "-m", bare), "config.json")
    (bare / "config.json").write_text('{"model_type": "bert"}')
    refused(run("infer", photo, QUESTION, "-m", bare), "'bert'", "supported families")


def test_hub_id_that_cannot_be_had(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run(
        [sys.executable, "-m", "mmtok_cli", "infer", str(photo), QUESTION, "-m", "nobody/has-this-model"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "error: nobody/has-this-model is not in the local cache" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_question(question: str, tiny_directory: Path, photo: Path) -> None:
    refused(run("infer", photo, question, "-m", tiny_directory), "the question is empty")


def test_bad_images(tiny_directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("this is not a picture")
    refused(run("infer", text, QUESTION, "-m", tiny_directory), "is not an image")
    refused(run("infer", tmp_path / "gone.png", QUESTION, "-m", tiny_directory), "there is no file")
    (tmp_path / "frames").mkdir()  # a folder would be a video
    refused(run("infer", tmp_path / "frames", QUESTION, "-m", tiny_directory), "there is no image in")
    whole = tmp_path / "whole.jpg"
    picture(300, 300).save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:3000])
    refused(run("infer", tmp_path / "half.jpg", QUESTION, "-m", tiny_directory), "is damaged")


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", "a/[/red]"])
def test_markup_is_text(name: str, tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    refused(run("infer", photo, QUESTION, "-m", name), name)
    target = tmp_path / f"{name.replace('/', '')}.png"
    result = run("prune", photo, name, "-m", tiny_directory, "-b", 4, "-o", target)
    assert result.exit_code == 0 and target.exists() and f"wrote {target}" in result.stderr


def test_question_longer_than_the_context(tiny_directory: Path, photo: Path) -> None:
    refused(run("infer", photo, "word " * 3000, "-m", tiny_directory, "-b", 4), "not fit into the 2048 tokens")


def test_nothing_is_written_over_the_image(tiny_directory: Path, photo: Path) -> None:
    before = photo.read_bytes()
    command = ("prune", photo, QUESTION, "-m", tiny_directory, "-b", 4)
    refused(run(*command, "-o", photo.parent / ".." / photo.parent.name / photo.name), "the same file")
    assert photo.read_bytes() == before


def test_full_disk_behind_standard_output() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mmtok_cli", "models", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "error: standard output could not be written: No space left on device"
    ]


@pytest.mark.parametrize(
    "target",
    [
        ".",
        "kept.xyz",
        "kept",
        "/proc/kept.png",
        "x" * 300 + ".png",
        "photo.png/kept.png",
        f"nowhere/{'x' * 300}/kept.png",
    ],
)
def test_bad_output_writes_nothing(target: str, tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    refused(run("prune", photo, QUESTION, "-m", tiny_directory, "-b", 4, "-o", tmp_path / target), "--output")
    assert sorted(tmp_path.rglob("*")) == before


def test_gain_curve_needs_gains(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    command = ("prune", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--method", "random")
    refused(run(*command, "-o", tmp_path / "a.png", "--gain-curve", tmp_path / "b.png"), "no gains")
    assert not (tmp_path / "a.png").exists()
    command = ("prune", photo, QUESTION, "-m", tiny_directory, "-b", "100%")
    refused(run(*command, "--gain-curve", tmp_path / "b.png"), "everything was kept")


def test_trace_directory_that_cannot_be(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    refused(run("profile", photo, QUESTION, "-m", tiny_directory, "-b", 999, "--trace-dir", tmp_path / "t"), "36")
    assert not (tmp_path / "t").exists()
    refused(run("profile", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--trace-dir", photo), "--trace-dir")


def test_names_that_are_no_text_are_escaped_in_json(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmtok", "a\udcffb"])
    run_dir = tmp_path / "c\udcffd"
    command = ("compare", "-m", tiny_directory, "--limit", 1, "--methods", "none", "--max-new-tokens", 1)
    said = run_json(*command, "--run-dir", run_dir)
    assert said["environment"]["command"] == ["mmtok", r"a\udcffb"]
    assert said["run_directory"] == str(run_dir).replace("\udcff", r"\udcff")
    assert run_json("compare", "--run-dir", run_dir, "--resume") == said
