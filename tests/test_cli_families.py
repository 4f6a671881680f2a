"""Every family through the command line, from a directory in the hub's format."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import refused, run, run_json
from tiny_models import FAMILIES

METHODS = "mmtok,visionzip,divprune,fastv,resize"
SETTINGS = ("--set", "fastv.layer=2")


@pytest.fixture(
    scope="module", params=["gemma3", "internvl", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_5", "qwen3_vl"]
)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families") / request.param
    model = FAMILIES[request.param]("sdpa")
    model.model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


@pytest.mark.compat
def test_infer_and_prune(directory: Path, photo: Path, tmp_path: Path) -> None:
    said = run_json("infer", photo, "How many stars?", "-m", directory, "-b", "25%", "--max-new-tokens", 3)
    assert 0 < said["tokens"]["kept"] < said["tokens"]["total"]
    picture = tmp_path / "kept.png"
    (image,) = run_json("prune", photo, "How many?", "-m", directory, "-b", "25%", "-o", picture)["images"]
    assert image["kept"] == said["tokens"]["kept"] and picture.stat().st_size > 0
    assert ("panels" in image) == (directory.name in ("internvl", "llava_next", "llava_onevision"))


@pytest.mark.compat
def test_compare(directory: Path, tmp_path: Path) -> None:
    methods, settings = METHODS, SETTINGS
    if directory.name == "gemma3":  # which runs nothing inside the language model
        methods, settings = METHODS.replace(",fastv", ""), ()
    found = run_json(
        *("compare", "-m", directory, "--limit", 4, "--rounds", 2, "--batch-size", 2, "-b", "25%"),
        *("--methods", methods, *settings, "--max-new-tokens", 3, "--run-dir", tmp_path / "run"),
    )
    assert not found["failures"] and not found["unevaluated"]
    full, *others = found["results"]
    assert [case["case"]["method"] for case in others] == methods.split(",")
    assert all(0 < case["tokens"]["kept"] < full["tokens"]["total"] for case in others)
    assert all(case["fidelity"]["kl"] > 0 and case["score_counts"]["asked"] == 4 for case in others)


def test_smaller_images_and_a_fixed_resolution(directory: Path, photo: Path, tmp_path: Path) -> None:
    options = ("-m", directory, "-b", 4, "--pixels", "fixed:36", "--max-new-tokens", 2)
    if not directory.name.startswith("qwen"):
        refused(run("infer", photo, "How many?", *options), "sees images at a fixed resolution")
        return
    said = run_json("infer", photo, "How many?", *options, "--image-scale", 0.5)
    assert said["pixels"] == "fixed:36" and 30 <= said["tokens"]["total"] <= 42
    assert said["tokens"]["encoded"][0] <= 12 and said["tokens"]["kept"] == 4
    if directory.name in ("qwen3_5", "qwen3_vl"):  # which differs in nothing that follows
        return
    command = ("compare", *options, "--methods", "mmtok", "--image-scale", "1,auto", "--limit", 1, "--rounds", 1)
    shown = run(*command, "--run-dir", tmp_path / "run", "--export", tmp_path / "result.csv")
    assert shown.exit_code == 0 and "mmtok, scale auto" in shown.stdout
    assert "about 36 vision tokens each (fixed:36)" in " ".join(shown.output.split())
    assert ",fixed:36," in (tmp_path / "result.csv").read_text()


def test_a_part_is_profiled(directory: Path, tmp_path: Path) -> None:
    if directory.name in ("gemma3", "qwen3_5"):
        pytest.skip("nothing differs for gemma3, and tests/test_qwen3_5.py does it")
    found = run_json(
        *("profile", "-m", directory, "--layers", 2, "-b", "25%", "--rounds", 2, "--warmup", 0),
        *("--max-new-tokens", 2, "--trace-dir", tmp_path / "traces"),
    )
    assert found["environment"]["layers"] == [2, 4]
    for case in found["cases"]:
        assert case["seconds"]["measured_prefill"]["median"] < case["seconds"]["prefill"]["median"]


def test_an_image_with_fewer_tokens_than_the_budget_is_pointed_out(tiny_directory: Path, photo: Path) -> None:
    """24 of the 36 tokens of the photo are not padding."""
    options = ("-m", tiny_directory, "-b", 30)
    for command in ("infer", "prune"):
        shown = run(command, photo, "What is it?", *options)
        assert shown.exit_code == 0 and "the budget is not met" in shown.stdout
    assert run_json("infer", photo, "What is it?", *options)["tokens"]["kept"] == 24
