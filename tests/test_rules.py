"""The rules under which methods run, and budgets that mean layer averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import build_tiny_llava

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import final_count, layer_average
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import check_budget, reduce
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@pytest.mark.parametrize(
    ("layers", "layer", "counts"),
    [(32, 2, (166, 98, 30)), (32, 3, (152, 82, 11)), (40, 2, (172, 104, 37))],  # as published for LLaVA-1.5
)
def test_layer_averages_give_the_published_counts(layers: int, layer: int, counts: tuple[int, ...]) -> None:
    method = make_method("fastv", layer=layer)
    for wanted, expected in zip((192, 128, 64), counts, strict=True):
        found = final_count(method, wanted, 576, layers)
        assert found == expected
        average = layer_average(576, method.cuts(576, found, layers), layers)
        assert abs(average - wanted) <= 0.5


def test_layer_average_below_the_first_layers_is_refused() -> None:
    with pytest.raises(MMTokError, match=r"layer average of 36 .* cannot be reached: .* 36\.9") as error:
        final_count(make_method("fastv", layer=2), 36, 576, 32)
    assert "choose 37 to 576" in error.value.hint
    assert final_count(make_method("fastv", layer=2), 37, 576, 32) == 1


def test_layer_averages_change_nothing_outside_the_language_model() -> None:
    assert final_count(make_method("mmtok"), 64, 576, 32) == 64


def test_what_methods_see_on_each_track(samples: list[Sample]) -> None:
    model = Llava("tiny", *build_tiny_llava())
    model.model.to(torch.bfloat16)
    seen: dict[str, VisionTokens] = {}

    @dataclass(frozen=True)
    class Looking(Method):
        track: str
        signals: ClassVar[tuple[str, ...]] = ("mean_keys",)
        keeps_padding: ClassVar[bool] = True
        takes_budget: ClassVar[bool] = False

        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            seen[self.track] = vision
            return Selection.everything(vision)

    for track in ("released", "harmonised"):
        reduce(model, Looking(track), samples[1:2], None, rules=Rules(track))  # type: ignore[arg-type]
    released, harmonised = seen["released"], seen["harmonised"]
    for name in ("projected", "features"):
        assert getattr(released, name).dtype == torch.bfloat16 and getattr(harmonised, name).dtype == torch.float32
    assert harmonised.signals["mean_keys"].dtype == torch.float32
    assert bool(released.eligible.all()) and int(harmonised.eligible.sum()) == 24


def test_infeasible_budgets_are_found_beforehand(samples: list[Sample], tiny_sdpa: Llava) -> None:
    check_budget(tiny_sdpa, make_method("resize"), samples, Budget(count=8))
    for name, parameters, budget, rules in (
        ("resize", {}, 5, Rules()),
        ("mmtok", {}, 37, Rules()),
        ("fastv", {"layer": 4}, 8, Rules()),
        ("fastv", {"layer": 1}, 9, Rules(budget_means="layer-average")),
    ):
        with pytest.raises(MMTokError):
            check_budget(tiny_sdpa, make_method(name, **parameters), samples, Budget(count=budget), rules)


def test_lists_of_parameters_become_tuples() -> None:
    assert make_method("sparsevlm", layers=[0, 1, 2]) == make_method("sparsevlm", layers=(0, 1, 2))


@pytest.mark.parametrize("bad", [{"track": "paper"}, {"positions": "move"}, {"budget_means": "mean"}])
def test_unknown_rules_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(MMTokError, match=next(iter(bad.values()))) as error:
        Rules(**bad)  # type: ignore[arg-type]
    assert error.value.hint.startswith("choose ")
