"""The greedy loop of MMTok's paper and release over tensors, without a model: what `mmtok:loop` runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mmtok_cli.methods.coverage import released_unit_rows


def plain_matrix(
    text: Tensor | None,
    projected: Tensor,
    features: Tensor | None,
    *,
    alpha: float,
    text_temperature: float,
    vision_temperature: float,
) -> Tensor:
    """How well each vision token covers each target of one image: `[m + n, n]` float32, one row per target.

    text: [m, d], projected: [n, d], features: [n, d_vis].
    """
    tokens, parts = released_unit_rows(projected), []
    if text is not None and len(text):
        parts.append((released_unit_rows(text) @ tokens.T * (1 / text_temperature)).softmax(1) / len(text))
    if features is not None:
        patches = released_unit_rows(features)
        parts.append((patches @ patches.T * (1 / vision_temperature)).softmax(1) / len(tokens) * alpha)
    return torch.cat(parts)


def plain_loop(matrix: Tensor, k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """`k` picks from `[targets, n]`, each of the token that adds most: their order and gains, [k] each.

    excluded: bool [n], True for tokens never to be picked; at least `k` must be left.
    """
    best = torch.zeros(matrix.shape[0], device=matrix.device)
    barred = torch.zeros(matrix.shape[1], device=matrix.device).masked_fill_(excluded, float("-inf"))
    order = torch.zeros(k, dtype=torch.long, device=matrix.device)
    gains = torch.zeros(k, device=matrix.device)
    for i in range(k):
        gain = (matrix - best.unsqueeze(1)).clamp_min_(0).sum(dim=0).add_(barred)
        winner = torch.argmax(gain).view(1)
        order[i] = winner[0]
        gains[i] = gain[winner[0]]
        barred.index_fill_(0, winner, float("-inf"))
        best = torch.maximum(best, matrix.index_select(1, winner).squeeze(1))
    return order, gains


@cache
def compiled_loop() -> Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]:
    """`plain_loop`, compiled by TorchScript on first use."""
    return torch.jit.script(plain_loop)
