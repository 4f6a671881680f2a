"""StackTok against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.gated_coverage import CropCoverage, gated_coverage

SWAP = {"auto": "auto", "true": "always", "false": "never"}


def tensors_of_crops(case: dict[str, Any], tensors: dict[str, Tensor], name: str) -> list[Tensor | None]:
    crops = case["params"]["crops"]
    return [tensors.get(f"{name}.{crop}", tensors.get(name) if crops == 1 else None) for crop in range(crops)]


def pick(case: dict[str, Any], tensors: dict[str, Tensor]) -> list[CropCoverage]:
    params = case["params"]
    projected, features = (tensors_of_crops(case, tensors, name) for name in ("vision_tokens", "vision_tokens_clip"))
    excluded = []
    for rows, padding in zip(projected, tensors_of_crops(case, tensors, "padding_patch_indices"), strict=True):
        excluded.append(torch.zeros(len(rows), dtype=torch.bool))
        if padding is not None:
            excluded[-1][padding[(padding >= 0) & (padding < len(rows))]] = True
    return gated_coverage(
        tensors["text_token_embedding"],
        projected,
        features,
        min(params["k"], sum(int((~mask).sum()) for mask in excluded)),
        excluded=excluded,
        text_temperature=params["tv_temp"],
        vision_temperature=params["vv_temp"],
        beta=(params["beta_min"], params["beta_max"]),
        swap=SWAP[str(params["swap_mode"]).lower()],
    )


def check(case: dict[str, Any]) -> None:
    tensors = golden_tensors("stacktok", case)
    found = pick(case, tensors)
    names = ("pick_order", "after_swap", "indices", "reference_curve")
    expected = zip(*(tensors_of_crops(case, tensors, f"expected_{name}") for name in names), strict=True)
    for crop, (order, after, indices, curve), beta in zip(found, expected, case["expected_beta"], strict=True):
        assert crop.picked.tolist() == order.tolist()
        assert crop.order.tolist() == after.tolist()
        assert crop.order.sort().values.tolist() == indices.tolist()
        assert float(crop.beta) == pytest.approx(beta, rel=1e-5)
        steps = min(len(curve), len(crop.curve))
        torch.testing.assert_close(crop.curve[:steps], curve[:steps], atol=1e-7, rtol=1e-5)


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("stacktok")
    assert {param.values[0]["kind"] for param in golden_cases("stacktok")} <= {"single", "multicrop", "degenerate"}


@pytest.mark.parametrize("case", golden_cases("stacktok", "single", "multicrop"))
def test_selection(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.parametrize("case", golden_cases("stacktok", "degenerate"))
def test_degenerate(case: dict[str, Any]) -> None:
    found = pick(case, golden_tensors("stacktok", case))
    assert all(len(set(crop.order.tolist())) == len(crop.order) for crop in found)
    assert [len(crop.order) for crop in found] == case["picks"]
