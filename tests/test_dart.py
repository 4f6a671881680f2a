"""DART against a plain loop written from its description; there are no outputs of the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, rms_norm

from mmtok_cli.methods.dart import DART
from mmtok_cli.tokens import LayerTokens


def at_a_cut(total: int, text: int, eligible: Tensor | None = None) -> LayerTokens:
    draw = torch.Generator().manual_seed(total)
    hidden, words = torch.randn(total, 12, generator=draw), torch.randn(text, 12, generator=draw)
    keys = torch.randn(2, total, 4, generator=draw), torch.randn(2, text, 4, generator=draw)
    weight = torch.rand(12, generator=draw)
    return LayerTokens(
        hidden=hidden,
        attention=None,
        rotary_response=lambda: hidden,
        eligible=torch.ones(total, dtype=torch.bool) if eligible is None else eligible,
        image_id="image",
        text=lambda: words,
        keys=lambda: keys,
        norm=lambda rows: rms_norm(rows, (12,), weight),
    )


def by_loop(tokens: LayerTokens, per_pivot: int) -> list[int]:
    """What 4 + 4 pivots keep, each `per_pivot` tokens, one token at a time."""
    assert tokens.keys and tokens.norm and tokens.text
    of_image, of_text = tokens.keys()
    sizes = [[float(keys[:, i].abs().sum()) for i in range(keys.shape[1])] for keys in (of_image, of_text)]
    largest = [sorted(range(len(size)), key=lambda i: -size[i])[:4] for size in sizes]
    kept, states = set(largest[0]), tokens.norm(tokens.hidden)
    pivots = [*(states[i] for i in largest[0]), *(tokens.norm(tokens.text())[i] for i in largest[1])]
    for pivot in pivots:
        for _ in range(per_pivot):
            left = [i for i in range(len(states)) if i not in kept]
            kept.add(min(left, key=lambda i: float(cosine_similarity(pivot, states[i], dim=0))))
    return sorted(kept)


@pytest.mark.parametrize(("total", "per_pivot"), [(40, 1), (100, 8), (64, 7)])
def test_equals_a_plain_loop(total: int, per_pivot: int) -> None:
    tokens, method = at_a_cut(total, 9), DART()
    (cut,) = method.cuts(total, 8 * per_pivot + 4, 32)
    assert method.choose(tokens, cut).indices.tolist() == by_loop(tokens, per_pivot)


@pytest.mark.parametrize("text", [0, 2, 9])
def test_keeps_what_the_budget_says_of_eligible_tokens(text: int) -> None:
    """With fewer words than pivots, budgets that cannot be shared evenly, and padding."""
    eligible = torch.arange(30) % 3 > 0
    for budget in range(1, 21):
        (cut,) = DART().cuts(30, budget, 32)
        chosen = DART().choose(at_a_cut(30, text, eligible), cut)
        assert len(set(chosen.indices.tolist())) == budget and bool(eligible[chosen.indices].all())
        assert chosen.order is not None and chosen.order.sort().values.equal(chosen.indices)
