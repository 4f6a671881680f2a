"""VisPruner against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_json, golden_tensors, require_cases

from mmtok_cli.methods.vispruner import important_and_diverse

KINDS = {"selection", "degenerate"}


def select(case: dict[str, Any]) -> list[list[int]]:
    """What is kept of each crop."""
    params, tensors = case["params"], golden_tensors("vispruner", case)
    crops = zip(tensors["features"].float(), tensors["class_attention"].float(), strict=True)
    return [
        important_and_diverse([features], [attention], params["visual_token_num"], params["important_ratio"])[
            0
        ].tolist()
        for features, attention in crops
    ]


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("vispruner")
    assert {param.values[0]["kind"] for param in golden_cases("vispruner")} <= KINDS


@pytest.mark.parametrize("case", golden_cases("vispruner", "selection"))
def test_selection(case: dict[str, Any]) -> None:
    assert select(case) == golden_tensors("vispruner", case)["expected_indices"].tolist()


@pytest.mark.parametrize("case", golden_cases("vispruner", "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    for kept in select(case):
        assert len(kept) == len(set(kept)) == case["params"]["visual_token_num"]


@pytest.mark.parametrize(
    ("crops", "tokens", "budget", "ratio"),
    [failure[:4] for failure in (golden_json("vispruner", "cases.json") or {}).get("authors_code_fails_on", [])],
)
def test_budgets_on_which_the_released_code_fails(crops: int, tokens: int, budget: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(crops):
        features = torch.randn(tokens, 16, generator=generator)
        kept = important_and_diverse([features], [torch.rand(4, tokens, generator=generator)], budget, ratio)[
            0
        ].tolist()
        assert len(kept) == len(set(kept)) == budget
