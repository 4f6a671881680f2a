"""The stock forward pass over a prompt, then greedy decoding, as two functions so that each can be timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel


def prefill(model: VisionLanguageModel, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The forward pass over the whole prompt: logits of the next token, [batch, vocabulary], and the KV cache."""
    return hf.forward(model.model, inputs)


def require_finite(model: VisionLanguageModel, logits: Tensor) -> None:
    """Raises MMTokError for logits that are NaN or infinite, of which decoding would make token 0 over and over."""
    if not bool(logits.isfinite().all()):
        raise MMTokError(
            f"{model.name} gives NaN or infinity in place of an answer",
            "float16 may be too narrow for it: use --dtype bfloat16 or float32; or compare its config.json with the "
            "original",
        )


def decode(
    model: VisionLanguageModel,
    inputs: dict[str, Any],
    first_logits: Tensor,
    cache: Any,
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> Tensor:
    """Greedy decoding from a filled KV cache until every answer has ended: [batch, new tokens].

    The first token comes from the prefill's logits; every other one takes a forward pass. Answers that have ended are
    padded. Generates the same tokens as transformers' `generate`. ignore_eos: decode exactly `max_new_tokens` tokens
    for each row, also after a token that ends an answer.
    """
    continuation = Continuation(model, inputs, cache)
    token = first_logits.argmax(-1)
    ends = torch.tensor(model.eos_token_ids, device=token.device)
    tokens = [token]
    ended = torch.isin(token, ends)
    while len(tokens) < max_new_tokens and (ignore_eos or not bool(ended.all())):
        token = continuation.read(token).argmax(-1)
        if not ignore_eos:
            token = torch.where(ended, model.tokenizer.pad_token_id, token)
            ended = ended | torch.isin(token, ends)
        tokens.append(token)
    return torch.stack(tokens, dim=1)


def answer_mask(token_ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """True for the tokens [batch, steps] of each answer up to the first that ends it; the rest is padding."""
    ends = torch.isin(token_ids, torch.tensor(eos_token_ids, dtype=token_ids.dtype, device=token_ids.device))
    return ends.cumsum(1) - ends.long() == 0


class Continuation:
    """Reads tokens after a prompt that is in a KV cache, one at a time."""

    def __init__(self, model: VisionLanguageModel, inputs: dict[str, Any], cache: Any) -> None:
        self._model = model
        self._cache = cache
        self._mask = inputs["attention_mask"]
        self._position = inputs["position_ids"][..., -1:]  # of one axis or of several

    def read(self, token: Tensor) -> Tensor:
        """Read a token of each row, [batch]: logits of the next one, [batch, vocabulary]."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._position = self._position + 1
        step = {"input_ids": token[:, None], "attention_mask": self._mask, "position_ids": self._position}
        logits, self._cache = hf.forward(self._model.model, step, self._cache)
        return logits


def cache_bytes(cache: Any, missing_layers: int = 0) -> int:
    """Bytes of the keys and values of all layers; layers that are not run count as the last one that is."""
    layers = hf.cached_bytes(cache)
    return sum(layers) + missing_layers * layers[-1]
