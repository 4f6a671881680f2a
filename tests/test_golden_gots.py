"""GOTS against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.pivoted_qr import pivoted_rows


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("gots")
    assert {param.values[0]["kind"] for param in golden_cases("gots")} <= {"selection", "degenerate"}


@pytest.mark.parametrize("case", golden_cases("gots", "selection"))
def test_selection(case: dict[str, Any]) -> None:
    tensors = golden_tensors("gots", case)
    features, k = tensors["features"], min(case["params"]["k"], len(tensors["features"]))
    (order,), (energies,) = pivoted_rows([features], k)
    assert order.sort().values.tolist() == tensors["expected_indices"].tolist()
    if not case["passthrough"]:  # nothing is picked there
        assert order.tolist() == tensors["expected_pick_order"].tolist()
        allowed = case["tolerance"]["pick_energy"]
        largest = float(features.float().square().sum(1).max())
        torch.testing.assert_close(
            energies,
            tensors["expected_pick_energy"],
            rtol=allowed["rtol"],
            atol=allowed["atol_rel_to_max_energy"] * largest,
        )


@pytest.mark.parametrize("case", golden_cases("gots", "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    tensors, k = golden_tensors("gots", case), case["params"]["k"]
    features = tensors["features"]
    if not bool(features.isfinite().all()):
        with pytest.raises(MMTokError, match="NaN"):
            pivoted_rows([features], k)
        return
    (order,), (energies,) = pivoted_rows([features], k)
    assert len(set(order.tolist())) == k and bool(energies.isfinite().all()) and bool((energies >= 0).all())
    groups = tensors.get("duplicate_group", torch.arange(len(features)))
    certain = min(case["agrees_with_fp64_for"], case["numerical_rank"], k)
    assert groups[order[:certain]].tolist() == groups[tensors["expected_pick_order"][:certain]].tolist()
    rest = features[order[int((energies > 0).sum()) :]].float().norm(dim=1)
    assert bool((rest[1:] <= rest[:-1] * (1 + 1e-6)).all())  # what follows, follows by descending norm
