"""Farthest-point selection: equal to the plain loop, never the same token twice, blind to excluded tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.divprune import cosine_distances, farthest_points
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import reduce
from mmtok_cli.rules import Rules

properties = settings(max_examples=150, deadline=None, derandomize=True)


def plain_loop(distance: Tensor, k: int, places: list[int]) -> list[int]:
    """The description word for word, with every minimum taken afresh: the oracle.

    Distances to picks are those of the picks' rows, since rounding may leave the matrix not quite symmetric.
    """
    order: list[int] = []
    for _ in range(k):
        left = [i for i in places if i not in order]
        rows = distance[order].amin(0) if order else distance.clone().fill_diagonal_(torch.inf)[:, places].amin(1)
        gap = {i: float(rows[i]) for i in left}
        order.append(max(left, key=lambda i: gap[i]))  # the first of equals
    return order


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Features [n, d], an exclusion mask, and a feasible k."""
    n, d = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(n, d, generator=g)
    kind = draw(st.sampled_from(["random", "duplicates", "zero rows", "all zero", "all equal"]))
    if kind == "duplicates":
        features = features[torch.randint(min(4, n), (n,), generator=g)]
    elif kind == "zero rows":
        features[torch.rand(n, generator=g) < 0.3] = 0
    elif kind == "all zero":
        features = torch.zeros(n, d)
    elif kind == "all equal":
        features = features[:1].expand(n, d)
    excluded = torch.rand(n, generator=g) < draw(st.sampled_from([0.0, 0.4, 0.9]))
    eligible = int((~excluded).sum())
    return features, excluded, draw(st.sampled_from([eligible, eligible // 2, min(eligible, 3)]))


def left(excluded: Tensor) -> Tensor:
    return (~excluded).nonzero().squeeze(1)[None]


@properties
@given(problem=problems())
def test_equals_the_plain_loop(problem: tuple[Tensor, Tensor, int]) -> None:
    features, excluded, k = problem
    places = (~excluded).nonzero().squeeze(1)
    order = farthest_points([features], k, left(excluded))[0].tolist()
    # Distances among the rows that are left, as the selection sees them, so that ties are ties in both.
    among = plain_loop(cosine_distances(features[places]), k, list(range(len(places))))
    assert order == places[among].tolist()
    assert len(set(order)) == k and not excluded[order].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_rows_are_picked_once(dtype: torch.dtype) -> None:
    features = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(3, 1)
    order = farthest_points([features], 192)[0].tolist()
    assert sorted(order) == list(range(192))
    assert sorted(i % 64 for i in order[:64]) == list(range(64))  # one of each before any comes again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_rows_are_harmless(dtype: torch.dtype) -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    features[[0, 7, 8]] = 0
    assert cosine_distances(features).isfinite().all()
    assert farthest_points([features], 30)[0].sort().values.tolist() == list(range(30))


def test_excluded_rows_might_as_well_not_be_there() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    excluded = torch.arange(50) % 3 == 0
    features[excluded] = -features[1]  # would be the farthest, and the nearest to each other
    places = (~excluded).nonzero().squeeze(1)
    assert farthest_points([features], 20, left(excluded))[0].equal(places[farthest_points([features[places]], 20)[0]])


def test_prefixes_nest_and_nothing_is_nothing() -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    whole = farthest_points([features], 40)[0]
    assert all(farthest_points([features], k)[0].equal(whole[:k]) for k in (0, 1, 17))
    assert farthest_points([features[:0]], 0)[0].tolist() == []
    assert farthest_points([features[:1]], 1)[0].tolist() == [0]


def test_scores_in_the_data_type_given() -> None:
    features = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert cosine_distances(features).dtype == torch.float64
    assert cosine_distances(features.half()).dtype == torch.float16


def test_refusals() -> None:
    features = torch.ones(6, 4)
    with pytest.raises(MMTokError, match="cannot keep 5 vision tokens: 4 of 6 are eligible"):
        farthest_points([features], 5, torch.arange(2, 6)[None])
    with pytest.raises(MMTokError, match="cannot keep -1"):
        farthest_points([features], -1)
    features[4, 1] = torch.nan
    with pytest.raises(MMTokError, match="NaN"):
        farthest_points([features], 2)


def test_padding_competes_on_the_released_track_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    method, wide = make_method("divprune"), [samples[1]]
    released = reduce(tiny_sdpa, method, wide, Budget(count=34))
    eligible = released.vision[0].eligible
    assert 8 < int(eligible.sum()) < 34 and released.selections[0].kept == 34
    harmonised = Rules(track="harmonised")
    kept = reduce(tiny_sdpa, method, wide, Budget(count=8), rules=harmonised).selections[0]
    assert eligible[kept.indices].all()
    most = reduce(tiny_sdpa, method, wide, Budget(count=34), rules=harmonised).selections[0]
    assert most.indices.equal(eligible.nonzero().squeeze(1))
