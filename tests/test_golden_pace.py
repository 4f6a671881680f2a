"""PACE's cut inside the language model against outputs of the authors' code (see golden_cases.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.pace import PACE, scaled
from mmtok_cli.tokens import LayerTokens, Selection, VisionTokens

DDAE = golden_cases("pace", "ddae")
DEGENERATE = [p for p in golden_cases("pace", "degenerate") if "DDAE" in p.values[0]["official_function"]]


def method_of(case: dict[str, Any]) -> PACE:
    return PACE(temperature=case["params"]["temperature"], last_query_only=case["params"]["last_query_only"])


def attention_of(case: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """What the language model's attention comes to at the cut: [heads, 1, tokens]."""
    start, total = case["params"]["image_start"], case["params"]["image_length"]
    if "attention" not in tensors:
        return tensors["llm_score"][None, None]
    rows = tensors["attention"][0][:, :, start : start + total]
    return rows[:, -1:] if case["params"]["last_query_only"] else rows.mean(1, keepdim=True)


def choose(case: dict[str, Any]) -> Selection:
    tensors, total, method = golden_tensors("pace", case), case["params"]["image_length"], method_of(case)
    nothing, all_of_them = torch.zeros(total, 1), torch.ones(total, dtype=torch.bool)
    signals = {"received_attention": tensors["vision_score"]} if "vision_score" in tensors else {}
    vision = VisionTokens(nothing, nothing, (1, total), all_of_them, "image", lambda rows: rows, signals)
    (cut,) = method.cuts(total + 1, method.count(case["params"]["ratio"], total), 28)
    places = torch.arange(total)
    attention = attention_of(case, tensors)
    return method.choose(
        LayerTokens(nothing, attention, lambda: nothing, all_of_them, "image", vision=vision, places=places), cut
    )


def test_there_are_cases() -> None:
    require_cases("pace")


@pytest.mark.parametrize("case", DDAE)
def test_fused_scores(case: dict[str, Any]) -> None:
    expected, method = golden_tensors("pace", case), method_of(case)
    everything = torch.ones(case["params"]["image_length"], dtype=torch.bool)
    read, atol = attention_of(case, expected).mean((0, 1)), case["tolerance"]["scores_abs"]
    torch.testing.assert_close(read, expected["expected_llm_score"], atol=atol, rtol=0)
    seen = expected.get("vision_score")
    if seen is not None:
        weights = method.weights(torch.stack([scaled(scores, everything) for scores in (read, seen)]))
        assert weights.tolist() == pytest.approx([case["expected_alpha"], case["expected_beta"]], abs=atol)
    fused = method.fused(read, seen, everything)
    torch.testing.assert_close(fused, expected["expected_combined"], atol=atol, rtol=0)


@pytest.mark.parametrize("case", DDAE)
def test_kept_tokens(case: dict[str, Any]) -> None:
    params, expected = case["params"], golden_tensors("pace", case)
    kept = choose(case).indices
    assert len(kept) == params["kept"] and kept.equal(expected["expected_indices"])
    start, end = params["image_start"], params["image_start"] + params["image_length"]
    positions = torch.cat([torch.arange(start), start + kept, torch.arange(end, params["sequence"])])
    assert positions.equal(expected["expected_kept_positions"])


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_scores_are_finite(case: dict[str, Any]) -> None:
    """The authors' code divides the deviation of a single token by nought."""
    expected = golden_tensors("pace", case)
    total = case["params"]["image_length"]
    read = attention_of(case, expected).mean((0, 1))
    fused = method_of(case).fused(read, expected.get("vision_score"), torch.ones(total, dtype=torch.bool))
    assert bool(fused.isfinite().all())
    kept = choose(case).indices
    assert len(kept) == case["params"]["kept"] == len(set(kept.tolist()))
