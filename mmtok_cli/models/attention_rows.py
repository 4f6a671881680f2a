"""Single rows of a decoder layer's attention, computed here because fast kernels never build the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtok_cli.models import hf
from mmtok_cli.models.hf import Rotary

BLOCK = 2**23  # entries of the attention matrix that `mean_attention` holds at once: 32 MiB, and two copies


def attention_rows(layer: Any, hidden: Tensor, rotary: Rotary, queries: Tensor, keys: Tensor | None = None) -> Tensor:
    """Probabilities with which some tokens of a sequence attend to all of it: [heads, queries, tokens].

    layer: a decoder layer of transformers' Llama, Mistral or Qwen kind. hidden: [tokens, dim], its input.
    rotary: cosine and sine of the tokens' positions, [tokens, head dim]. queries: [queries], indices of tokens.
    keys: [KV heads, tokens, head dim], rotated, where the layer's cache holds them already.

    Logits and softmax are float32.
    """
    rows = hf.queries(layer, hidden[queries], (rotary[0][queries], rotary[1][queries]))
    if keys is None:
        keys = hf.keys(layer, hidden, rotary)
    grouped = rows.float().unflatten(0, (keys.shape[0], -1))  # query heads that share a key head
    logits = (grouped @ keys.float().unsqueeze(1).transpose(2, 3)).flatten(0, 1).mul_(hf.attention_scale(layer))
    ahead = torch.arange(hidden.shape[0], device=hidden.device) > queries[:, None]
    return logits.masked_fill_(ahead, float("-inf")).softmax(-1)


def mean_attention(layer: Any, hidden: Tensor, rotary: Rotary, keys: Tensor | None = None) -> Tensor:
    """Probabilities with which the tokens of a sequence attend to each, on average over all of them: [heads, tokens].

    Arguments as in `attention_rows`. The rows of the matrix are computed a block at a time and summed up, so that
    memory grows with the number of tokens, not with its square.
    """
    if keys is None:
        keys = hf.keys(layer, hidden, rotary)
    length, first = hidden.shape[0], (rotary[0][:1], rotary[1][:1])
    total = torch.zeros(hf.queries(layer, hidden[:1], first).shape[0], length, device=hidden.device)
    step = max(1, BLOCK // total.numel())
    for start in range(0, length, step):
        end = min(start + step, length)  # no row sees a later token
        rows = torch.arange(start, end, device=hidden.device)
        seen = (rotary[0][:end], rotary[1][:end])
        total[:, :end] += attention_rows(layer, hidden[:end], seen, rows, keys[:, :end]).sum(1)
    return total / length


def keys_at(
    layer: Any, hidden: Tensor, rotary: Rotary, vision: Tensor, text: Tensor, keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The keys of some tokens of a sequence, twice [KV heads, tokens, head dim].

    vision, text: [tokens], indices of the tokens. The other arguments are those of `attention_rows`.
    """
    if keys is None:
        keys = hf.keys(layer, hidden, rotary)
    return keys[:, vision], keys[:, text]


def rotary_response(layer: Any, rotary: Rotary, queries: Tensor, tokens: Tensor) -> Tensor:
    """Attention logits between tokens whose queries and keys are vectors of ones: [queries, tokens]."""
    cos, sin = (part.float() for part in rotary)
    ones = cos.new_ones(len(cos), hf.attention_width(layer))  # the rotary embedding may turn a part of them only
    rotated = hf.rotate(layer, ones[None], (cos, sin))[0]
    return rotated[queries] @ rotated[tokens].T / ones.shape[1] ** 0.5
