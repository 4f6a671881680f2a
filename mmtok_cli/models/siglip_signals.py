"""Signals of a SigLIP encoder, which has no class token, computed next to the stock forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.models import hf
from mmtok_cli.models.clip_signals import MIDDLE_LAYER, inputs_of
from mmtok_cli.models.qwen_signals import MIDDLE, attention_signals
from mmtok_cli.models.qwen_signals import SIGNALS as OF_LAST

SIGNALS = (*OF_LAST, MIDDLE)


def layers_of(model: Any, signals: Sequence[str], last: int = -1) -> dict[str, Any]:
    """The attention modules that the signals are read from, by `last` and MIDDLE.

    last: the index of the layer that the features come from. MIDDLE is the ninth of 24 layers, and in proportion of
    encoders of other depths, as for CLIP.
    """
    depth = hf.siglip_depth(model)
    wanted = {"last": last} if {*signals} & {*OF_LAST} else {}
    if MIDDLE in signals:
        wanted[MIDDLE] = max(0, round(depth * MIDDLE_LAYER) - 1)
    return {name: hf.clip_attention(model, index) for name, index in wanted.items()}


def watched(layer: Any) -> AbstractContextManager[list[Tensor]]:
    """Collects what an attention module is called with."""
    return inputs_of(layer)


def signals_of(
    layers: Mapping[str, Any],
    seen: Mapping[str, Sequence[Tensor]],
    names: Sequence[str],
    grid: tuple[int, int],
    merge: int = 1,
) -> dict[str, Tensor]:
    """The signals by name, one row per vision token: [pictures, tokens] or [pictures, tokens, head dim].

    seen: what each layer was called with, [pictures, patches, dim]. merge: patches along each side of a vision token,
    over which values are averaged.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        layer, signal = (MIDDLE, "received_attention") if name == MIDDLE else ("last", name)
        attention, (hidden,) = layers[layer], seen[layer]
        queries, keys = hf.clip_queries(attention, hidden), hf.clip_keys(attention, hidden)
        scale, lengths = hf.clip_attention_scale(attention), (hidden.shape[1],)
        rows = [attention_signals(q, k, scale, lengths, (signal,))[signal] for q, k in zip(queries, keys, strict=True)]
        values = torch.stack(rows)
        flat = values if values.dim() == 3 else values[..., None]
        merged = averaged(flat, grid, merge)
        found[name] = merged if values.dim() == 3 else merged[..., 0]
    return found


def averaged(values: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """The mean over the patches of each vision token: [pictures, patches, dim] to [pictures, tokens, dim]."""
    if merge == 1:
        return values
    return values.unflatten(1, (grid[0], merge, grid[1], merge)).mean((2, 4)).flatten(1, 2)
