"""How many vision tokens go through each layer, against the published schedules."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import layer_average
from mmtok_cli.methods import make_method
from mmtok_cli.methods.sparsevlm import V1_COUNTS, cluster_and_merge, kept_before_recycling, raters
from mmtok_cli.tokens import Cut, LayerTokens

CUTTING = ("fastv", "random:inside", "pyramiddrop", "sparsevlm", "sparsevlm:v2", "dart", "v2drop", "pace")


@pytest.mark.parametrize(
    ("name", "parameters", "budget", "counts", "average"),
    [
        ("fastv", {"layer": 2}, 166, [166], 191.6),
        ("fastv", {"layer": 2}, 98, [98], 127.9),
        ("fastv", {"layer": 2}, 30, [30], 64.1),
        ("fastv", {"layer": 2}, 288, [288], 306),
        ("fastv", {"layer": 3}, 11, [11], 64.0),
        ("pyramiddrop", {}, 72, [288, 144, 72], 270),
        ("sparsevlm", {}, 113, [309, 204, 113], 206.5),
        ("sparsevlm", {}, 39, [312, 117, 39], 145.4),
        ("sparsevlm", {}, 18, [82, 32, 18], 82.3),
        ("sparsevlm:v2", {}, 118, [300, 200, 118], 206.8),
        ("sparsevlm:v2", {}, 60, [238, 108, 60], 144.1),
        ("sparsevlm:v2", {}, 20, [66, 34, 20], 81.8),
        ("dart", {}, 8 * (192 // 8) + 4, [196], 219.8),
        ("dart", {}, 8 * (64 // 8) + 4, [68], 99.8),
        ("v2drop", {}, 1, [288, 144, 1], 202.8),
        ("v2drop", {"layers": (3, 16, 22), "shares": (0.25, 0.05)}, 1, [144, 7, 1], 114.1),
    ],
)
def test_published_schedules(
    name: str, parameters: dict[str, int], budget: int, counts: list[int], average: float
) -> None:
    cuts = make_method(name, **parameters).cuts(576, budget, 32)
    assert [cut.keep for cut in cuts] == counts
    assert layer_average(576, cuts, 32) == pytest.approx(average, abs=0.06)


@pytest.mark.parametrize(
    ("total", "budget", "counts"),
    [(100, 12, [50, 25, 12]), (61, 7, [30, 15, 7]), (1598, 199, [799, 399, 199]), (100, 13, [51, 26, 13])],
)
def test_pyramiddrop_truncates_each_step_of_the_authors_schedule(total: int, budget: int, counts: list[int]) -> None:
    """Budgets that are no eighth, as the last, are none of its schedule's."""
    assert [cut.keep for cut in make_method("pyramiddrop").cuts(total, budget, 32)] == counts


@pytest.mark.parametrize("row", V1_COUNTS)
def test_counts_before_recycling_are_the_authors(row: tuple[int, ...]) -> None:
    before = 576
    for kept in row:
        recycled = (int((before - kept) * 0.3) + 1) // 10 + 1
        assert kept_before_recycling(before, kept + recycled) == kept
        before = kept + recycled


@pytest.mark.parametrize("total", [4, 36, 576, 2880])
@pytest.mark.parametrize("name", CUTTING)
def test_counts_fall_to_the_budget(name: str, total: int) -> None:
    method = make_method(name)
    for budget in range(1, total, max(1, total // 200)):
        counts = [total, *(cut.keep for cut in method.cuts(total, budget, 32))]
        assert counts[-1] == budget
        assert all(1 <= after <= before for before, after in itertools.pairwise(counts))
        if name == "sparsevlm":
            for before, after in itertools.pairwise(counts):
                assert 0 <= kept_before_recycling(before, after) <= after
    assert method.cuts(total, total, 32) == ()


@pytest.mark.parametrize("keep", range(2, 40))  # forty tokens make two clusters at the least
def test_recycling_keeps_the_count(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    tokens = LayerTokens(
        hidden=torch.randn(40, 8, generator=generator),
        attention=torch.rand(2, 3, 40, generator=generator),
        rotary_response=lambda: torch.ones(3, 40),
        eligible=torch.ones(40, dtype=torch.bool),
        image_id="image",
    )
    chosen = make_method("sparsevlm").choose(tokens, Cut(16, keep, reads=15))
    assert chosen.kept == keep == len(set(chosen.indices.tolist()))
    assert chosen.tokens is not None and chosen.tokens.shape == (keep, 8)


def test_clusters_of_equal_tokens() -> None:
    merged, centres = cluster_and_merge(torch.ones(6, 4), 3)
    assert merged.equal(torch.ones(3, 4)) and len(set(centres.tolist())) == 3


def test_text_tokens_alike_all_rate() -> None:
    assert raters(torch.randn(5, 4), torch.ones(3, 4)).tolist() == [True, True, True]
    assert raters(torch.randn(5, 4), torch.ones(1, 4)).tolist() == [True]


@pytest.mark.parametrize(
    ("parameters", "message"), [({"layers": (2, 6)}, "needs three"), ({"layers": (6, 2, 9)}, "fit")]
)
def test_layers_that_make_no_schedule(parameters: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(MMTokError, match=message):
        make_method("sparsevlm", **parameters).cuts(576, 64, 32)
