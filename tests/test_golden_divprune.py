"""DivPrune against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.divprune import DivPrune, cosine_distances, farthest_points


def check_picks(case: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    features = tensors["features"]
    k = DivPrune().count(case["params"]["ratio"], len(features))
    assert k == case["params"]["kept"]
    order = farthest_points([features], k)[0]
    assert order.tolist() == tensors["expected_pick_order"].tolist()
    assert order.sort().values.tolist() == tensors["expected_indices"].tolist()
    return order.sort().values


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("divprune")
    assert {param.values[0]["kind"] for param in golden_cases("divprune")} <= {"selection", "sequence"}


@pytest.mark.parametrize("case", golden_cases("divprune", "selection"))
def test_selection(case: dict[str, Any]) -> None:
    tensors = golden_tensors("divprune", case)
    check_picks(case, tensors)
    if "distance_matrix" in tensors:
        expected = tensors["distance_matrix"]
        torch.testing.assert_close(cosine_distances(tensors["features"]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", golden_cases("divprune", "sequence"))
def test_sequence(case: dict[str, Any]) -> None:
    tensors = golden_tensors("divprune", case)
    kept = tensors["features"][check_picks(case, tensors)]
    found = torch.cat([tensors["prefix_embeds"], kept, tensors["suffix_embeds"]])
    assert torch.equal(found, tensors["expected_inputs_embeds"][0])
