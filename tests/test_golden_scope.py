"""SCOPE against the outputs of the authors' own code and of AngelSlim's port (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_json, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.scope import SCOPE, salient_coverage
from mmtok_cli.models.qwen_signals import received_attention

KINDS = {"core", "port_end_to_end", "degenerate"}


def combine_of(case: dict[str, Any]) -> str:
    return {"multi": "multiply", "add": "add"}[case["params"].get("combined", "multi")]


def pick(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    features, params = tensors["features"], case["params"]
    saliency = tensors.get("saliency", torch.ones(features.shape[:2]))
    return salient_coverage(features, saliency, params["k"], alpha=params["alpha"], combine=combine_of(case))


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("scope")
    assert {param.values[0]["kind"] for param in golden_cases("scope")} <= KINDS


@pytest.mark.parametrize("case", golden_cases("scope", "core"))
def test_core(case: dict[str, Any]) -> None:
    tensors = golden_tensors("scope", case)
    order, gains = pick(case, tensors)
    assert order.tolist() == tensors["expected_pick_order"].tolist()
    assert order.sort(1).values.tolist() == tensors["expected_indices"].tolist()
    torch.testing.assert_close(gains, tensors["expected_gains"], atol=0, rtol=case["tolerance"]["gains_rtol"])


@pytest.mark.parametrize("case", golden_cases("scope", "port_end_to_end"))
def test_port(case: dict[str, Any]) -> None:
    tensors, params = golden_tensors("scope", case), case["params"]
    n, k = params["n"], params["k"]
    if params["model"].startswith("qwen"):
        saliency = port_saliency(tensors)
        torch.testing.assert_close(
            saliency, tensors["expected_saliency"], atol=0, rtol=case["tolerance"]["saliency_rtol"]
        )
        assert SCOPE().count(1 - params["drop_ratio"], n, ("received_attention",)) == k
    if k < n:
        order = salient_coverage(
            tensors["features"][None], tensors["expected_saliency"][None], k, alpha=params["alpha"]
        )[0][0]
        assert order.tolist() == tensors["expected_pick_order"].tolist()
        assert order.sort().values.tolist() == tensors["expected_indices"].tolist()
    else:
        assert tensors["expected_indices"].tolist() == list(range(n))


def port_saliency(tensors: dict[str, Tensor]) -> Tensor:
    """The attention that each token's patches receive, in raster order: [n]."""
    q, k = tensors["vit_q"], tensors["vit_k"]
    received = received_attention(q, k, q.shape[2] ** -0.5, [q.shape[1]]).view(-1, 4).sum(1)
    return received[tensors["reverse_indices"]] if "reverse_indices" in tensors else received


def test_counts_of_the_port() -> None:
    for total, dropped, expected in (golden_json("scope", "port_keep_counts.json") or {"rows": []})["rows"]:
        if isinstance(expected, int) and 0 <= dropped < 1:
            assert SCOPE().count(1 - dropped, total, ("received_attention",)) == expected, (total, dropped)


@pytest.mark.parametrize("case", golden_cases("scope", "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    tensors, k = golden_tensors("scope", case), case["params"]["k"]
    features = tensors["features"]
    saliency = tensors.get("saliency", torch.ones(features.shape[:2]))
    if not bool(features.isfinite().all() & saliency.isfinite().all()):
        with pytest.raises(MMTokError, match="NaN"):
            pick(case, tensors)
        return
    order, gains = pick(case, tensors)
    exact, _ = salient_coverage(features.double(), saliency, k, alpha=case["params"]["alpha"], combine=combine_of(case))
    assert order.tolist() == exact.tolist()
    assert all(len(set(picks)) == k for picks in order.tolist()) and bool(gains.isfinite().all())
    for rows, picks in zip(features, order, strict=True):
        zero = (rows[picks] == 0).all(1)
        assert combine_of(case) == "add" or not bool(zero[: k - int(zero.sum())].any())  # those come last
