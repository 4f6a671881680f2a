"""Signals of an encoder without a class token (Qwen), computed next to the stock forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.models import hf

MIDDLE = "middle_attention"
QUERIES_AT_ONCE = 256
Call = tuple[Tensor, tuple[Tensor, Tensor]]  # what the attention module was called with: hidden states and rotary


@contextmanager
def calls_of(attention: torch.nn.Module, *, wanted: bool) -> Iterator[list[Call]]:
    """Collects what the attention module is called with while the context is open, if that is wanted."""
    calls: list[Call] = []
    if not wanted:
        yield calls
        return

    def remember(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(hf.vision_call(args, kwargs))

    handle = attention.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def received_attention(queries: Tensor, keys: Tensor, scale: float, lengths: Sequence[int]) -> Tensor:
    """How much attention each patch receives from the patches of its image: [patches], in float32.

    The mean over the heads, summed over the queries, as in VisionZip's code for Qwen2.5-VL. queries, keys: [heads,
    patches, head dim], after the rotary embedding. lengths: patches of each image.
    """
    images = zip(queries.split(list(lengths), 1), keys.split(list(lengths), 1), strict=True)
    return torch.cat([column_sums(q, k, scale) for q, k in images])


def column_sums(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The attention matrix of one image, averaged over the heads and summed over the queries: [patches], in float32.

    Rows of the matrix are computed some at a time. queries, keys: [heads, patches, head dim].
    """
    total = torch.zeros(keys.shape[1], device=keys.device)
    for rows in queries.float().split(QUERIES_AT_ONCE, 1):
        total += (rows @ keys.float().mT * scale).softmax(-1).mean(0).sum(0)
    return total


def signals_of(attention: Any, call: Call, lengths: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    """The signals of these names. attention, call: the module inside the block, and its call."""
    hidden, rotary = call
    queries, keys = hf.vision_queries_and_keys(attention, hidden, rotary)
    return attention_signals(queries, keys, hf.vision_attention_scale(attention), lengths, names)


def attention_signals(
    queries: Tensor, keys: Tensor, scale: float, lengths: Sequence[int], names: Sequence[str]
) -> dict[str, Tensor]:
    """The signals of these names, each with one row per patch, in the order in which the encoder has them.

    queries, keys, lengths: as in `received_attention`. mean_keys: keys averaged over the heads, [patches, head dim].
    """
    found = {}
    if "received_attention" in names:
        found["received_attention"] = received_attention(queries, keys, scale, lengths)
    if "mean_keys" in names:
        found["mean_keys"] = keys.mean(0)
    return found


SIGNALS = ("received_attention", "mean_keys")
