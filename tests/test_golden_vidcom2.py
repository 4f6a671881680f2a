"""VidCom2 against outputs recorded from vLLM (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_json, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.vidcom2 import VidCom2, frame_budgets, lowest, similarities


def scores(case: dict[str, Any], features: Tensor) -> tuple[Tensor, Tensor]:
    return similarities(features.unflatten(0, (case["params"]["frames"], -1)))


def select(case: dict[str, Any], features: Tensor) -> Tensor:
    params = case["params"]
    of_video, of_frame = scores(case, features)
    budget = VidCom2().video_count(1 - params["q"], params["frames"], params["rows"] * params["cols"])
    assert budget == params["retained"]
    eligible = torch.ones(len(features), dtype=torch.bool)
    return lowest(of_video + of_frame, frame_budgets(of_video, 1 - params["q"]), eligible, budget)


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("vidcom2")
    assert {param.values[0]["kind"] for param in golden_cases("vidcom2")} <= {"mask", "degenerate"}


@pytest.mark.parametrize("case", golden_cases("vidcom2", "mask"))
def test_selection(case: dict[str, Any]) -> None:
    tensors = golden_tensors("vidcom2", case)
    of_video, of_frame = scores(case, tensors["features"])
    tolerance = {"rtol": case["tolerance"]["scores_rtol"], "atol": 0}
    torch.testing.assert_close(of_video.flatten(), tensors["expected_video_score"].flatten(), **tolerance)
    torch.testing.assert_close(of_frame.flatten(), tensors["expected_frame_score"].flatten(), **tolerance)
    budgets = frame_budgets(of_video, 1 - case["params"]["q"])
    assert budgets == tensors["expected_frame_budgets"].tolist()
    found = select(case, tensors["features"])
    assert found.tolist() == tensors["expected_indices"].tolist()
    assert tensors["expected_mask"].flatten().nonzero().squeeze(1).tolist() == found.tolist()


@pytest.mark.parametrize("case", golden_cases("vidcom2", "degenerate"))
def test_degenerate_keeps_the_exact_count(case: dict[str, Any]) -> None:
    found = select(case, golden_tensors("vidcom2", case)["features"])
    assert len(found) == len(set(found.tolist())) == case["params"]["retained"]
    assert found.tolist() == sorted(found.tolist())


def test_equal_scores_keep_the_first_tokens_of_each_frame() -> None:
    found = lowest(torch.zeros(3, 4), [2, 1, 1], torch.ones(12, dtype=torch.bool), 4)
    assert found.tolist() == [0, 1, 4, 8]


def test_counts_are_those_of_the_engine() -> None:
    table = golden_json("vidcom2", "counts.json")
    if table is None:
        pytest.skip("no table of counts")
    wrong = [row for row in table["rows"] if VidCom2().video_count(1 - row[2], row[1], row[0]) != row[3]]
    assert not wrong, f"{len(wrong)} of {len(table['rows'])}: {wrong[:5]}"
