"""HiPrune against the outputs of the authors' own code and of AngelSlim's port (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.hiprune import HiPrune, hierarchical
from mmtok_cli.models.qwen_signals import column_sums

KINDS = {"llava", "qwen", "angelslim", "degenerate"}


def anchors_of(params: dict[str, Any], k: int) -> int:
    return round(k * params["alpha"] / 5)


def kept_of_crops(case: dict[str, Any], tensors: dict[str, Tensor]) -> list[list[int]]:
    params = case["params"]
    k = params.get("per_crop", params.get("budget"))
    layers = (tensors[name].view(-1, params["n"]) for name in ("middle_attention", "last_attention"))
    found = []
    for number, (middle, last) in enumerate(zip(*layers, strict=True)):
        order = hierarchical(middle[None], last[None], tuple(params["grid"]), k, anchors_of(params, k))[0]
        anchors = tensors.get(f"expected_anchors.{number}", tensors.get("expected_anchors"))
        assert case["kind"] == "degenerate" or set(order[: len(anchors)].tolist()) == set(anchors.tolist())
        found.append(order.sort().values.tolist())
    return found


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("hiprune")
    assert {param.values[0]["kind"] for param in golden_cases("hiprune")} <= KINDS


@pytest.mark.parametrize("case", golden_cases("hiprune", "llava", "qwen"))
def test_selection(case: dict[str, Any]) -> None:
    tensors = golden_tensors("hiprune", case)
    expected = [mask.nonzero().flatten().tolist() for mask in tensors["expected_mask"].view(-1, case["params"]["n"])]
    assert kept_of_crops(case, tensors) == expected
    if "retain" in case["params"]:
        assert HiPrune().count(case["params"]["retain"], case["params"]["n"]) == case["params"]["budget"]
    for layer in ("middle", "last"):
        if f"q_{layer}" in tensors:
            received = received_by_tokens(tensors, layer, case["params"]["n"])
            torch.testing.assert_close(received, tensors[f"{layer}_attention"].view(-1), atol=0, rtol=1e-4)


def received_by_tokens(tensors: dict[str, Tensor], layer: str, n: int) -> Tensor:
    """The attention that each token receives: a class token comes first and is dropped, patches are averaged."""
    q, k = (tensors[f"{name}_{layer}"] for name in "qk")
    crops = zip(q.view(-1, *q.shape[-3:]), k.view(-1, *k.shape[-3:]), strict=True)
    received = torch.stack([column_sums(*crop, q.shape[-1] ** -0.5) for crop in crops])
    if received.shape[1] == n + 1:
        return received[:, 1:].flatten() / (n + 1)
    received = received.view(n, -1).mean(1)
    return received[tensors["reverse_indices"]] if "reverse_indices" in tensors else received


@pytest.mark.parametrize("case", golden_cases("hiprune", "angelslim"))
def test_port(case: dict[str, Any]) -> None:
    """Its scores for Qwen are ours but for a factor, those for LLaVA are the class token's attention. It takes at least
    one anchor of 5 tokens, and may keep too many."""
    tensors, params = golden_tensors("hiprune", case), case["params"]
    k, expected = params["budget"], tensors["expected_indices"].tolist()
    scores = [tensors[f"expected_{layer}_scores"] for layer in ("middle", "last")]
    for layer, expected_scores in zip(("middle", "last"), scores, strict=True):
        if params["model"].startswith("qwen"):
            received, whole = received_by_tokens(tensors, layer, params["n"]), expected_scores.sum()
            torch.testing.assert_close(received / received.sum(), expected_scores / whole, atol=0, rtol=1e-4)
    least = 1 if params["alpha"] > 0 and k >= 5 else 0
    order = hierarchical(*(each[None] for each in scores), tuple(params["grid"]), k, max(least, anchors_of(params, k)))[
        0
    ]
    assert len(order) == min(k, params["n"]) and set(order.tolist()) <= set(expected)
    assert len(expected) > k or order.sort().values.tolist() == sorted(expected)


@pytest.mark.parametrize("case", golden_cases("hiprune", "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    tensors, params = golden_tensors("hiprune", case), case["params"]
    k = params.get("per_crop", params.get("budget"))
    if "middle_attention" not in tensors:  # of the port
        tensors = tensors | {f"{layer}_attention": tensors[f"expected_{layer}_scores"] for layer in ("middle", "last")}
    for kept in kept_of_crops(case, tensors):
        assert len(set(kept)) == k
        if "fixed_indices" in tensors:
            assert kept == tensors["fixed_indices"].tolist()
