"""The rules under which methods run, and budgets that mean layer averages."""

from __future__ import annotations

import pytest

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.pipeline import _final_count, layer_average
from mmtok_cli.rules import Rules

BY_AVERAGE = Rules(budget_means="layer-average")


@pytest.mark.parametrize(
    ("layers", "layer", "counts"),
    [(32, 2, (166, 98, 30)), (32, 3, (152, 82, 11)), (40, 2, (172, 104, 37))],  # as published for LLaVA-1.5
)
def test_layer_averages_give_the_published_counts(layers: int, layer: int, counts: tuple[int, ...]) -> None:
    method = make_method("fastv", layer=layer)
    for wanted, expected in zip((192, 128, 64), counts, strict=True):
        found = _final_count(method, wanted, 576, layers, BY_AVERAGE)
        assert found == expected
        average = layer_average(576, method.cuts(576, found, layers), layers)
        assert abs(average - wanted) <= 0.5
        assert _final_count(method, wanted, 576, layers, Rules()) == wanted


def test_layer_average_below_the_first_layers_is_refused() -> None:
    with pytest.raises(MMTokError, match=r"layer average of 36 .* cannot be reached: .* 36\.9") as error:
        _final_count(make_method("fastv", layer=2), 36, 576, 32, BY_AVERAGE)
    assert "choose 37 to 576" in error.value.hint
    assert _final_count(make_method("fastv", layer=2), 37, 576, 32, BY_AVERAGE) == 1


def test_layer_averages_change_nothing_outside_the_language_model() -> None:
    assert _final_count(make_method("mmtok"), 64, 576, 32, BY_AVERAGE) == 64


@pytest.mark.parametrize("bad", [{"track": "paper"}, {"positions": "move"}, {"budget_means": "mean"}])
def test_unknown_rules_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(MMTokError, match=next(iter(bad.values()))) as error:
        Rules(**bad)  # type: ignore[arg-type]
    assert error.value.hint.startswith("choose ")
