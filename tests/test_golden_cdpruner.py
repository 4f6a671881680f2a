"""CDPruner against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases

from mmtok_cli.methods.cdpruner import conditional_kernel, greedy_determinant, relevance


def test_cases_are_there() -> None:
    require_cases("cdpruner")


@pytest.mark.parametrize("case", golden_cases("cdpruner"))
def test_selection(case: dict[str, Any]) -> None:
    tensors = golden_tensors("cdpruner", case)
    projected = tensors["image_features"]
    if "projector_weight" in tensors:
        projected = projected @ tensors["projector_weight"].T
    scores = relevance(tensors["image_embeds"], tensors["text_embeds"])
    torch.testing.assert_close(scores, tensors["relevance"], atol=2e-6, rtol=1e-5)
    order, gains = greedy_determinant(conditional_kernel(projected, scores), case["params"]["keep"])
    assert order.tolist() == tensors["expected_pick_order"].tolist()
    assert order.sort(1).values.tolist() == tensors["expected_indices"].tolist()
    torch.testing.assert_close(gains, tensors["expected_gains"], atol=0, rtol=case["tolerance"]["gains_rtol"])
