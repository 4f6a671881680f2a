"""Signals of a CLIP encoder, computed next to the stock forward pass and only those that a method requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.models import hf
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.models.qwen_signals import column_sums

MIDDLE_LAYER = 9 / 24  # of HiPrune for CLIP ViT-L, as a share of the layers


@dataclass(frozen=True)
class Encoded:
    """Input of the signals: encoded images of one size, each with its question.

    hidden: [images, 1 + tokens, dim], output of the layer that the features come from, the class token first.
    attention, seen: the attention module inside that layer, and the hidden states [images, 1 + tokens, dim] that it
        was called with; None and empty unless a signal reads them.
    middle, seen_in_middle: the same of a layer in the middle of the encoder.
    tower: gives the other half of CLIP.
    """

    hidden: Tensor
    questions: Sequence[str]
    attention: Any
    seen: Sequence[Tensor]
    tower: Callable[[], ClipText]
    middle: Any = None
    seen_in_middle: Sequence[Tensor] = ()

    @cached_property
    def keys(self) -> Tensor:
        """Of the attention module, for all signals that read them: [images, heads, 1 + tokens, head dim]."""
        return patch_keys(self.attention, self.seen[0])

    def text_embeds(self) -> list[Tensor]:
        """Each image's question through the tower; images of one question share it."""
        embeds = {question: self.tower().text_embeds(question) for question in dict.fromkeys(self.questions)}
        return [embeds[question] for question in self.questions]


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects the hidden states [batch, tokens, dim] with which a module is called while the context is open."""
    seen: list[Tensor] = []

    def remember(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(hf.hidden_of(args, kwargs))

    handle = module.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def patch_keys(attention: Any, hidden: Tensor) -> Tensor:
    """The attention module's keys: [batch, heads, 1 + patches, head dim]. hidden: its input."""
    return hf.clip_keys(attention, hidden)


def class_attention(attention: Any, hidden: Tensor, keys: Tensor) -> Tensor:
    """Probabilities with which the class token attends to each patch: [batch, heads, patches], in float32.

    hidden: [batch, 1 + patches, dim], what the attention module was called with; keys: of `patch_keys`. The class
    token's own share stays in the softmax, so that rows add up to less than one.
    """
    rows = []
    # Image by image: the last bits of a product depend on its shape, and VisPruner's choice may depend on them.
    for state, key in zip(hidden[:, :1], keys, strict=True):
        query = hf.clip_queries(attention, state[None])[0]
        rows.append(class_probabilities(query, key, hf.clip_attention_scale(attention)))
    return torch.stack(rows)


def class_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """With which the class token attends to each patch: [heads, patches], in float32.

    query: the class token's, [heads, 1, head dim]. key: [heads, 1 + patches, head dim].
    """
    logits = query.float() @ key.float().mT * scale
    return logits.softmax(-1)[:, 0, 1:]


def received_attention(attention: Any, hidden: Tensor, keys: Tensor) -> Tensor:
    """How much attention each patch receives from the class token and all patches: [batch, patches], in float32.

    The mean over the heads, summed over the queries. Arguments as in `class_attention`.
    """
    queries, scale = hf.clip_queries(attention, hidden), hf.clip_attention_scale(attention)
    return torch.stack([column_sums(q, k, scale)[1:] for q, k in zip(queries, keys, strict=True)])


def middle_attention(encoded: Encoded) -> Tensor:
    """`received_attention` of the layer in the middle."""
    (hidden,) = encoded.seen_in_middle
    return received_attention(encoded.middle, hidden, patch_keys(encoded.middle, hidden))


def mean_keys(keys: Tensor) -> Tensor:
    """Keys of each patch, averaged over the heads: [batch, patches, head dim]. keys: of `patch_keys`."""
    return keys[:, :, 1:].mean(1)


# Each gives one tensor per image, of the shape that its comment says.
Signal = Callable[[Encoded], Tensor | list[Tensor]]
ATTENTION_SIGNALS: dict[str, Signal] = {
    "class_attention": lambda e: class_attention(e.attention, e.seen[0], e.keys),  # [heads, tokens]
    "mean_keys": lambda e: mean_keys(e.keys),  # [tokens, head dim]
    "received_attention": lambda e: received_attention(e.attention, e.seen[0], e.keys),  # [tokens]
}
MIDDLE_SIGNALS: dict[str, Signal] = {"middle_attention": middle_attention}  # [tokens]
TOWER_SIGNALS: dict[str, Signal] = {
    "clip_image_embeds": lambda e: e.tower().image_embeds(e.hidden[:, 1:]),  # [tokens, clip dim]
    "clip_text_embeds": Encoded.text_embeds,  # [pieces, clip dim]
}
SIGNALS: dict[str, Signal] = {
    "class_feature": lambda e: e.hidden[:, 0],  # [dim]
    **ATTENTION_SIGNALS,
    **MIDDLE_SIGNALS,
    **TOWER_SIGNALS,
}
