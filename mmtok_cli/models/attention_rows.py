"""Single rows of a decoder layer's attention, computed by hand beside the fast kernels that never build the matrix."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def attention_rows(layer: Any, hidden: Tensor, rotary: Rotary, queries: Tensor, keys: Tensor | None = None) -> Tensor:
    """Probabilities with which some tokens of a sequence attend to all of it: [heads, queries, tokens].

    layer: a decoder layer of transformers' Llama, Mistral or Qwen kind. hidden: [tokens, dim], what it is called with.
    rotary: cosine and sine of the tokens' positions, [tokens, head dim]. queries: [queries], indices of tokens.
    keys: [KV heads, tokens, head dim], rotated, where the layer's cache holds them already.

    Logits and softmax are float32.
    """
    attention = layer.self_attn
    rows = _heads(attention.q_proj(layer.input_layernorm(hidden[queries])), attention, "q_norm")
    rows = _rotate(attention, rows, (rotary[0][queries], rotary[1][queries]))
    if keys is None:
        keys = _rotate(attention, _heads(attention.k_proj(layer.input_layernorm(hidden)), attention, "k_norm"), rotary)
    grouped = rows.float().unflatten(0, (keys.shape[0], -1))  # query heads that share a key head
    logits = (grouped @ keys.float().unsqueeze(1).transpose(2, 3)).flatten(0, 1) * attention.scaling
    ahead = torch.arange(hidden.shape[0], device=hidden.device) > queries[:, None]
    return logits.masked_fill(ahead, float("-inf")).softmax(-1)


def rotary_response(layer: Any, rotary: Rotary, queries: Tensor, tokens: Tensor) -> Tensor:
    """Attention logits between tokens whose queries and keys are vectors of ones: [queries, tokens]."""
    cos, sin = (part.float() for part in rotary)
    ones = torch.ones_like(cos)
    rotated = _rotate(layer.self_attn, ones[None], (cos, sin))[0]
    return rotated[queries] @ rotated[tokens].T / ones.shape[1] ** 0.5


def _heads(projected: Tensor, attention: Any, norm: str) -> Tensor:
    """[tokens, heads * head dim] -> [heads, tokens, head dim], normalised where the architecture does so."""
    split = projected.unflatten(-1, (-1, attention.head_dim))
    return (getattr(attention, norm)(split) if hasattr(attention, norm) else split).transpose(0, 1)


def _rotate(attention: Any, rows: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position by the architecture's own function. rows: [heads, tokens, head dim]."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return apply(rows[None], rows[None], rotary[0][None], rotary[1][None])[0][0]
