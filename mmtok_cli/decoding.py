"""The stock forward pass over a prompt, and greedy decoding behind it, apart so that each can be timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtok_cli.models.base import VisionLanguageModel


def prefill(model: VisionLanguageModel, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The forward pass over the whole prompt: logits of the next token, [batch, vocabulary], and the KV cache."""
    out = model.model(**inputs, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def decode(
    model: VisionLanguageModel, inputs: dict[str, Any], first_logits: Tensor, cache: Any, max_new_tokens: int
) -> Tensor:
    """Greedy decoding from a filled KV cache until every answer has ended: [batch, new tokens].

    The first token comes of the prefill's logits; each further one costs a forward pass. Answers that have ended are
    padded. Gives the same tokens as transformers' `generate`, with prefill and decode apart so that each can be timed.
    """
    mask, position = inputs["attention_mask"], inputs["position_ids"][..., -1:]
    ends = torch.tensor(model.eos_token_ids, device=mask.device)
    token = first_logits.argmax(-1)
    tokens = [token]
    ended = torch.isin(token, ends)
    while len(tokens) < max_new_tokens and not bool(ended.all()):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = position + 1
        out = model.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = torch.where(ended, model.tokenizer.pad_token_id, out.logits[:, -1].argmax(-1))
        tokens.append(token)
        ended = ended | torch.isin(token, ends)
    return torch.stack(tokens, dim=1)


def cache_bytes(cache: Any, missing_layers: int = 0) -> int:
    """Bytes of the keys and values of all layers; layers that are not run count as the last one that is."""
    layers = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None]
    return sum(layers) + missing_layers * layers[-1]
