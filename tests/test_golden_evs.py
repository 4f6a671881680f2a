"""EVS against outputs recorded from vLLM (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_json, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.evs import EVS, FIRST, dissimilarity
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


def video(features: Tensor, params: dict[str, Any]) -> VisionTokens:
    """A case's features as vision tokens of a video."""
    return VisionTokens(
        projected=features,
        features=features,
        grid=(params["frames"] * params["rows"], params["cols"]),
        eligible=torch.ones(len(features), dtype=torch.bool),
        image_id="video",
        project=lambda rows: rows,
        slices=params["frames"],
    )


def select(case: dict[str, Any], features: Tensor) -> Selection:
    params = case["params"]
    tokens = params["rows"] * params["cols"]
    budget = EVS().video_count(1 - params["q"], params["frames"], tokens)
    assert budget == params["retained"]
    return EVS().select(video(features, params), TextTokens("", lambda words: features), budget)


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("evs")
    assert {param.values[0]["kind"] for param in golden_cases("evs")} <= {"mask", "degenerate"}


@pytest.mark.parametrize("case", golden_cases("evs", "mask"))
def test_selection(case: dict[str, Any]) -> None:
    tensors, params = golden_tensors("evs", case), case["params"]
    found = select(case, tensors["features"])
    assert found.indices.tolist() == tensors["expected_indices"].tolist()
    assert tensors["expected_mask"].nonzero().squeeze(1).tolist() == found.indices.tolist()
    changes = dissimilarity(tensors["features"].unflatten(0, (params["frames"], -1)))
    assert bool((changes[0] == FIRST).all())
    tolerance = case["tolerance"]["dissimilarity_atol"]
    if "expected_dissimilarity" in tensors:
        torch.testing.assert_close(changes[1:], tensors["expected_dissimilarity"].float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", golden_cases("evs", "degenerate"))
def test_ties_go_to_the_earliest_token(case: dict[str, Any]) -> None:
    tensors = golden_tensors("evs", case)
    changes = dissimilarity(tensors["features"].unflatten(0, (case["params"]["frames"], -1))).flatten().float()
    found = select(case, tensors["features"]).indices
    kept = torch.zeros(len(changes), dtype=torch.bool).index_fill(0, found, True)
    lowest = changes[kept].min()
    assert int(kept.sum()) == case["params"]["retained"] and bool((changes[~kept] <= lowest).all())
    tied = (changes == lowest).nonzero().squeeze(1)
    assert kept[tied].tolist() == sorted(kept[tied].tolist(), reverse=True)


def test_counts_are_those_of_the_engine() -> None:
    table = golden_json("evs", "counts.json")
    if table is None:
        pytest.skip("no table of counts")
    wrong = [row for row in table["rows"] if EVS().video_count(1 - row[2], row[1], row[0]) != row[3]]
    assert not wrong, f"{len(wrong)} of {len(table['rows'])}: {wrong[:5]}"
