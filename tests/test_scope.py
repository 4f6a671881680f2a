"""SCOPE: its lazy greedy against the definition, and the method at its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.coverage import greedy_exhaustive, greedy_lazy
from mmtok_cli.methods.scope import salient_coverage
from mmtok_cli.tokens import TextTokens, VisionTokens

TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


def given(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.rand(*shape[:-1], generator=generator)


def by_definition(features: Tensor, saliency: Tensor, k: int, combine: str) -> list[int]:
    """The greedy definition in float64, all gains afresh at each pick."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosines, cover, order = unit @ unit.T, torch.zeros(len(features), dtype=torch.float64), []
    for _ in range(k):
        gains = (cosines - cover[:, None]).clamp(min=0).sum(0)
        scores = gains + saliency if combine == "add" else gains * saliency
        scores[order] = -torch.inf
        order.append(int(scores.argmax()))
        cover = torch.maximum(cover, cosines[:, order[-1]])
    return order


@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_picks_as_defined(combine: str) -> None:
    features, saliency = given(0, 2, 70, 12)
    order, _ = salient_coverage(features, saliency, 25, combine=combine)
    assert order.tolist() == [by_definition(x, s, 25, combine) for x, s in zip(features, saliency, strict=True)]


@pytest.mark.parametrize("name", ["factor", "bonus"])
def test_lazy_equals_exhaustive_with_a_prior_to_the_bit(name: str) -> None:
    features, prior = given(1, 2, 400, 12)
    prior[:, ::5] = 0
    cosines = torch.nn.functional.normalize(features, dim=-1)
    matrix, excluded = (cosines @ cosines.mT).relu(), torch.arange(400).expand(2, -1) % 9 == 0
    lazy = greedy_lazy(matrix, 120, excluded, **{name: prior})
    exhaustive = greedy_exhaustive(matrix, 120, excluded, **{name: prior})
    assert lazy[0].equal(exhaustive[0]) and lazy[1].equal(exhaustive[1])
    assert lazy[2] < 120 * 2 * 400 / 2


def test_once_everything_is_covered_saliency_decides() -> None:
    features = torch.eye(3).repeat(4, 1)  # three directions, four times each
    features[2] = 0
    saliency = torch.tensor([0.1, 0.9, 1.0, 0.2, 0.3, 0.8, 0.7, 0.4, 0.5, 0.0, 0.6, 0.05])
    order, _ = salient_coverage(features[None], saliency[None], 12)
    assert order[0].tolist() == [1, 6, 5, 10, 8, 7, 4, 3, 0, 11, 9, 2]
    smaller, _ = salient_coverage(features[None], saliency[None], 5)
    assert smaller[0].tolist() == order[0, :5].tolist()


def test_what_cannot_be_picked_is_refused() -> None:
    features, saliency = given(2, 1, 10, 4)
    with pytest.raises(MMTokError, match="cannot keep 8 vision tokens: 7 of 10"):
        salient_coverage(features, saliency, 8, excluded=torch.arange(10)[None] < 3)
    with pytest.raises(MMTokError, match="NaN or infinity"):
        salient_coverage(features, saliency.index_fill(1, torch.tensor(4), torch.nan), 2)
    with pytest.raises(MMTokError, match="an exponent of -1"):
        make_method("scope", alpha=-1.0)
    with pytest.raises(MMTokError, match=r"scope\.combine cannot be 'max'"):
        make_method("scope", combine="max")


def test_features_go_with_the_class_token_and_projected_tokens_without() -> None:
    (features, saliency), (projected, _) = given(3, 24, 6), given(4, 24, 8)
    heads = torch.stack([saliency / 4, saliency * 3 / 4])
    eligible = torch.arange(24) >= 4
    signals = ({"class_attention": heads}, {"received_attention": saliency})
    images = [VisionTokens(projected, features, (4, 6), eligible, "image", lambda x: x, signal) for signal in signals]
    kept = [make_method("scope").select(image, TEXT, 7) for image in images]
    for selection, rows in zip(kept, (features, projected), strict=True):
        expected, _ = salient_coverage(rows[None], saliency[None], 7, excluded=~eligible[None])
        assert selection.order is not None and selection.order.tolist() == expected[0].tolist()
        assert bool(eligible[selection.indices].all())
    assert make_method("scope").count(0.29, 100) == 28  # as in the release
    assert make_method("scope").count(0.29, 100, ("received_attention",)) == 29  # as in the port
