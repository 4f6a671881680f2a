"""V2Drop against outputs of the authors' code, recorded before single decoder layers (see golden_cases.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.v2drop import V2Drop, moved
from mmtok_cli.tokens import Cut, LayerTokens

SCHEDULES = {
    "llava": V2Drop(),
    "qwen2_vl": V2Drop(layers=(3, 16, 22), shares=(0.25, 0.05)),
}
LAYERS = {"llava": 32, "qwen2_vl": 28}


def cut_of(case: dict[str, Any]) -> Cut:
    """The cut before the layer of a case, of the image as it arrives there."""
    params, method = case["params"], SCHEDULES[case["variant"]]
    layer, total = params["layer"], params["image_length"]
    if layer not in method.layers:
        return Cut(layer, total, earlier=(layer - 1,))
    place = method.layers.index(layer)
    rest = V2Drop(layers=method.layers[place:], shares=method.shares[place:])
    return next(iter(rest.cuts(total, 1, LAYERS[case["variant"]])), Cut(layer, total, earlier=(layer - 1,)))


def choose(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scores of the image's tokens, and the positions in the whole sequence that are kept."""
    params, tensors = case["params"], golden_tensors("v2drop", case)
    start, end = params["image_start"], params["image_start"] + params["image_length"]
    before, after = (tensors[f"{name}_hidden"][0, start:end] for name in ("previous", "current"))
    cut = cut_of(case)
    tokens = LayerTokens(
        hidden=after,
        attention=None,
        rotary_response=lambda: after,
        eligible=torch.ones(len(after), dtype=torch.bool),
        image_id="image",
        earlier={params["layer"] - 1: before},
    )
    kept = start + SCHEDULES[case["variant"]].choose(tokens, cut).indices
    return moved(before, after), torch.cat([torch.arange(start), kept, torch.arange(end, params["sequence"])])


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("v2drop")
    assert {param.values[0]["kind"] for param in golden_cases("v2drop")} <= {"stage", "degenerate"}


@pytest.mark.parametrize("case", golden_cases("v2drop", "stage"))
def test_stage(case: dict[str, Any]) -> None:
    expected = golden_tensors("v2drop", case)
    scores, kept = choose(case)
    if "expected_scores" in expected:
        torch.testing.assert_close(scores, expected["expected_scores"], atol=0, rtol=case["tolerance"]["scores_rtol"])
    assert cut_of(case).keep == case["params"]["kept"]
    assert kept.equal(expected["expected_kept_positions"])


@pytest.mark.parametrize("case", golden_cases("v2drop", "degenerate"))
def test_of_equal_scores_the_first_tokens_are_kept(case: dict[str, Any]) -> None:
    """`topk` of the authors' code may return any of them."""
    params = case["params"]
    start, kept, end = params["image_start"], params["kept"], params["image_start"] + params["image_length"]
    scores, found = choose(case)
    assert len(found) == len(golden_tensors("v2drop", case)["expected_kept_positions"])
    if len(scores.unique()) == 1:
        first = torch.arange(start + kept)
        assert found.equal(torch.cat([first, torch.arange(end, params["sequence"])]))
