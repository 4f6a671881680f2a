"""PACE's choice of an image's size against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
from golden_cases import golden_cases, golden_json, golden_tensors, require_cases

from mmtok_cli.image_scale import compressed, scores_of_detail
from mmtok_cli.models import hf

TABLES = golden_json("pace", "tables.json") or {}
CELL = 28  # pixels along a side of a vision token of Qwen2.5-VL


def scored(case: dict[str, Any]) -> tuple[float, float, float]:
    given = case["params"]
    return scores_of_detail(
        golden_tensors("pace", case)["features"],
        global_weight=given["global_weight"],
        unusual=given["detail_fraction"],
        most=given["detail_scale"],
        least=given["minimum_retention"],
    )


def test_cases_are_there() -> None:
    require_cases("pace")
    assert golden_cases("pace", "apc_score") and TABLES["compressed_resolution"]["patch"] == CELL


@pytest.mark.parametrize("case", [*golden_cases("pace", "apc_score"), *golden_cases("pace", "degenerate")])
def test_scores(case: dict[str, Any]) -> None:
    if "detail_scale" not in case["params"]:
        pytest.skip("a case of the cut inside the language model")
    features, found = golden_tensors("pace", case)["features"], scored(case)
    if not features.any():  # the release takes nothing for 60 % of the detail
        assert found == (case["params"]["minimum_retention"], 0, 0)
        return
    expected = [case[f"expected_{name}"] for name in ("rho", "global", "detail")]
    assert found == pytest.approx(expected, abs=case["tolerance"]["abs"])
    if size := case.get("resolution"):
        grid = compressed(size["height"], size["width"], found[0], CELL)
        assert [CELL * side for side in grid] == [size["expected_height"], size["expected_width"]]


def test_sizes() -> None:
    for height, width, share, *expected, ratio in TABLES["compressed_resolution"]["rows"]:
        rows, columns = compressed(height, width, share, CELL)
        assert [rows * CELL, columns * CELL] == expected, (height, width, share)
        assert rows * columns / (-(-height // CELL) * -(-width // CELL)) == pytest.approx(ratio)


def test_sizes_of_the_processor() -> None:
    factor = TABLES["smart_resize"]["factor"]
    for height, width, fewest, most, *expected in TABLES["smart_resize"]["rows"]:
        assert list(hf.qwen_size(height, width, factor, fewest, most)) == expected
