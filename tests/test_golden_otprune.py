"""OTPrune against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.cdpruner import greedy_determinant
from mmtok_cli.methods.otprune import OTPrune, covariance_kernel

DECIDED = 2e-5  # gap above which rounding does not decide


def pick(case: dict[str, Any], features: Tensor) -> tuple[Tensor, Tensor]:
    k = OTPrune().count(case["params"]["ratio"], len(features))
    assert k == case["params"]["k"]
    order, gains = greedy_determinant(covariance_kernel(features, case["params"]["gamma"])[None], k)
    return order[0], gains[0]


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("otprune")
    assert {param.values[0]["kind"] for param in golden_cases("otprune")} <= {"selection", "degenerate"}


@pytest.mark.parametrize("case", golden_cases("otprune", "selection"))
def test_selection(case: dict[str, Any]) -> None:
    tensors = golden_tensors("otprune", case)
    order, gains = pick(case, tensors["features"])
    assert order.tolist() == tensors["expected_pick_order"].tolist()
    assert order.sort().values.tolist() == tensors["expected_indices"].tolist()
    torch.testing.assert_close(gains, tensors["expected_gains"].float(), atol=0, rtol=case["tolerance"]["gains_rtol"])


@pytest.mark.parametrize("case", golden_cases("otprune", "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    features = golden_tensors("otprune", case)["features"]
    if not bool(features.isfinite().all()):
        with pytest.raises(MMTokError, match="NaN"):
            pick(case, features)
        return
    order, gains = pick(case, features)
    assert len(set(order.tolist())) == case["params"]["k"]
    assert bool(gains.isfinite().all()) and bool((gains > 0.99).all())  # the kernel holds the identity
    gap = case["min_rel_gap"]
    if features.dtype == torch.float32 and isinstance(gap, float) and gap > DECIDED:
        assert order.tolist() == golden_tensors("otprune", case)["expected_pick_order"].tolist()
