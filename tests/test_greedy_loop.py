"""The plain loop of the paper: slow, and otherwise mmtok."""

from __future__ import annotations

import pytest
import torch
from golden_cases import golden_cases, golden_tensors
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method
from mmtok_cli.methods.coverage import ALPHA, TEXT_TEMPERATURE, VISION_TEMPERATURE, coverage_matrix
from mmtok_cli.methods.plain_loop import compiled_loop, plain_loop, plain_matrix
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import reduce
from mmtok_cli.rules import Rules, Track

USUAL = {"alpha": ALPHA, "text_temperature": TEXT_TEMPERATURE, "vision_temperature": VISION_TEMPERATURE}


def given(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, 16, generator=g), torch.randn(n, 16, generator=g), torch.randn(n, 12, generator=g)


@pytest.mark.parametrize("track", ["released", "harmonised"])
def test_keeps_what_mmtok_keeps(track: Track, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    for budget in (Budget(count=8), Budget(percent=40)):
        ours, loop = (
            reduce(vlm, make_method(name), samples, budget, rules=Rules(track)).selections
            for name in ("mmtok", "mmtok:loop")
        )
        for mine, plain in zip(ours, loop, strict=True):
            assert plain.indices.equal(mine.indices)
            if mine.order is not None and plain.order is not None and mine.gains is not None:
                assert plain.order.equal(mine.order)
                torch.testing.assert_close(plain.gains, mine.gains)


@pytest.mark.parametrize("case", golden_cases("mmtok", "selector"))
def test_picks_as_the_release_does(case: dict) -> None:
    tensors, p = golden_tensors("mmtok", case), case["params"]
    excluded = torch.zeros(len(tensors["vision_tokens"]), dtype=torch.bool)
    if "padding_patch_indices" in tensors:
        excluded[tensors["padding_patch_indices"]] = True
    matrix = plain_matrix(
        tensors["text_token_embedding"],
        tensors["vision_tokens"],
        tensors["vision_tokens_clip"],
        alpha=p["alpha"],
        text_temperature=p["tv_temp"],
        vision_temperature=p["vv_temp"],
    )
    order, _ = compiled_loop()(matrix, p["k"], excluded)
    assert order.tolist() == tensors["expected_pick_order"].tolist()


@pytest.mark.parametrize(("text", "features"), [(True, True), (True, False), (False, True)])
def test_the_matrix_is_that_of_coverage(text: bool, features: bool) -> None:
    words, projected, patches = given(3, 40, 5)
    plain = plain_matrix(words if text else None, projected, patches if features else None, **USUAL)
    ours = coverage_matrix(
        words[None] if text else None, projected[None], patches[None] if features else None, **USUAL
    )[0]
    torch.testing.assert_close(plain, ours.T)


def test_compiling_changes_nothing_and_what_is_excluded_stays_out() -> None:
    matrix = plain_matrix(*given(5, 50, 4), **USUAL)
    excluded = torch.arange(50) % 3 == 0
    order, gains = plain_loop(matrix, 30, excluded)
    compiled = compiled_loop()(matrix, 30, excluded)
    assert order.equal(compiled[0]) and gains.equal(compiled[1])
    assert len(set(order.tolist())) == 30 and not excluded[order].any()
    assert bool((gains[1:] <= gains[:-1] + 1e-6).all())
