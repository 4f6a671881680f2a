"""The public Python interface."""

from __future__ import annotations

import ast
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import run_json
from PIL import Image

import mmtok_cli as mmtok
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import Answers

QUESTION = "What color is the star?"


def test_every_name_is_there_and_documented() -> None:
    assert set(dir(mmtok)) == set(mmtok.__all__)
    for name in mmtok.__all__:
        assert getattr(mmtok, name) is not None
        assert name == "__version__" or getattr(mmtok, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'anser'"):
        mmtok.anser  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(mmtok.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {(alias.asname, node.module) for node in checked.body for alias in node.names}
    assert imported == set(mmtok._MODULES.items())
    assert set(mmtok._MODULES) | {"__version__"} == set(mmtok.__all__)
    assert (Path(mmtok.__file__).parent / "py.typed").is_file()


def test_answer(tiny_sdpa: Llava, photo: Path) -> None:
    sample = mmtok.load_sample(photo, QUESTION)
    result = mmtok.answer(tiny_sdpa, mmtok.make_method("mmtok"), sample, 8, max_new_tokens=3)
    assert len(result.texts) == 1 and result.token_ids.shape[1] <= 3
    assert result.selections[0].kept == result.reduced.tokens[0].kept == 8
    parts = ("prepare", "encode", "select", "prefill")
    assert set(result.seconds) == {*parts, "decode", "ttft", "total"}
    assert result.seconds["ttft"] == pytest.approx(sum(result.seconds[part] for part in parts))
    assert {field.name for field in fields(Answers)} < {field.name for field in fields(result)}


@pytest.mark.parametrize("budget", [9, "9", "25%", mmtok.Budget(count=9)])
def test_budgets_as_they_are_written(budget: mmtok.Budget | int | str, tiny_sdpa: Llava, photo: Path) -> None:
    batch = [mmtok.load_sample(photo, QUESTION), mmtok.load_sample([Image.open(photo)], "How many stars?")]
    result = mmtok.answer(tiny_sdpa, "random", batch, budget, max_new_tokens=1)
    assert [tokens.kept for tokens in result.reduced.tokens] == [9, 9]


def test_what_cannot_be_answered_is_refused(tiny_sdpa: Llava, photo: Path) -> None:
    sample = mmtok.load_sample(photo, QUESTION)
    with pytest.raises(mmtok.MMTokError, match="MMTok needs a budget"):
        mmtok.answer(tiny_sdpa, "mmtok", sample)
    with pytest.raises(mmtok.MMTokError, match=r"'0.5' is not a budget"):
        mmtok.answer(tiny_sdpa, "mmtok", sample, 0.5)  # type: ignore[arg-type]
    assert mmtok.answer(tiny_sdpa, "full", sample, 4, max_new_tokens=1).reduced.tokens[0].kept == 36
    with pytest.raises(mmtok.MMTokError, match="the question is empty"):
        mmtok.load_sample(photo, " ")


def test_several_images_of_both_kinds(photo: Path) -> None:
    array = np.zeros((8, 8, 3), dtype=np.uint8)
    sample = mmtok.load_sample([photo, Image.fromarray(array)], "What differs?")
    assert sample.image_ids == ("photo.png", "image-1") and len(sample.images) == 2


def test_methods_are_configured_as_on_the_command_line(photo: Path) -> None:
    options = ("--methods", "fastv,mmtok,pyramiddrop", "--set", "mmtok.alpha=0.25", "--limit", 1, "--rounds", 1)
    for result in run_json("compare", "-b", 4, *options, "--no-quality")["results"][1:]:
        case = result["case"]
        method = mmtok.make_method(case["method"], "demo", **({"alpha": 0.25} if case["method"] == "mmtok" else {}))
        assert case["parameters"] == json.loads(json.dumps({f.name: getattr(method, f.name) for f in fields(method)}))


def test_parameters_of_a_profile_and_a_seed() -> None:
    assert (mmtok.make_method("fastv", "qwen3-vl-2b").layer, mmtok.make_method("fastv").layer) == (3, 2)
    assert mmtok.make_method("fastv", "qwen3-vl-2b", layer=5).layer == 5
    for model in (None, "demo"):
        assert mmtok.make_method("random", model, seed=7).seed == 7
        assert mmtok.make_method("mmtok", model, seed=7) == mmtok.make_method("mmtok", model)


def test_methods_for_a_loaded_model_follow_its_family(tiny_sdpa: Llava) -> None:
    """A model without a profile of its own has that of a known model of its family."""
    assert mmtok.make_method("mmtok", tiny_sdpa) == mmtok.make_method("mmtok", "llava-1.5-7b")


def test_selection_without_a_model() -> None:
    generator = torch.Generator().manual_seed(0)
    text, projected, features = (torch.randn(n, 8, generator=generator) for n in (3, 20, 20))
    assert mmtok.select_tokens(text, projected, features, 5).indices.shape == (5,)


def test_compare_returns_what_the_command_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"methods": ["mmtok", "random"], "budget": [16], "limit": 2, "rounds": 1, "max_new_tokens": 2}
    comparison = mmtok.compare("demo", run_dir=run, **options)
    assert [str(result.case) for result in comparison.results] == ["full", "mmtok @ 16", "random @ 16"]
    assert comparison.results[1].seconds["prefill"].median > 0 and comparison.results[1].score is not None
    assert run_json("report", run)["results"] == json.loads(comparison.model_dump_json())["results"]
    with pytest.raises(mmtok.MMTokError, match="already contains a run"):
        mmtok.compare("demo", run_dir=run, **options)
    with pytest.raises(mmtok.MMTokError, match="no method 'mmtk'"):
        mmtok.compare("demo", run_dir=tmp_path / "other", methods="mmtk")
