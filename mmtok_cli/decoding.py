"""The stock forward pass over a prompt, then greedy decoding, as two functions so that each can be timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.values import on_host, to_device


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
    return decode_after(Continuation(model, inputs, cache), first_logits, max_new_tokens, ignore_eos=ignore_eos)


def decode_after(
    continuation: Continuation, first_logits: Tensor, max_new_tokens: int, *, ignore_eos: bool = False
) -> Tensor:
    """`decode` from a cache that may hold more than a prompt. The last new token is not read."""
    model = continuation.model
    token = first_logits.argmax(-1)
    ends = to_device(torch.tensor(model.eos_token_ids), token.device)
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
    """Reads tokens after a prompt that is in a KV cache: the new ones one at a time, further text in one piece.

    cache: with everything that was read. length: tokens in it, padding included.
    """

    def __init__(self, model: VisionLanguageModel, inputs: dict[str, Any], cache: Any) -> None:
        self.model = model
        self.cache = cache
        self._mask = inputs["attention_mask"]
        self._is_padded = not bool(on_host(self._mask).all())
        self._takes_step_mask = hf.takes_step_mask(model.model)
        self._position = inputs["position_ids"][..., -1:]  # of one axis or of several

    def read(self, token: Tensor) -> Tensor:
        """Read a token of each row, [batch]: logits of the next one, [batch, vocabulary]."""
        return self.read_text(token[:, None])

    def read_text(self, tokens: Tensor) -> Tensor:
        """Read several tokens of each row, [batch, tokens], in one forward pass: logits of the next one.

        Their positions count on from the last one.
        """
        count = tokens.shape[1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), count)], dim=1)
        positions = self._position + torch.arange(1, count + 1, device=self._position.device)
        self._position = positions[..., -1:]
        # transformers reads a mask, for which the host waits at every token, unless it hides nothing or is prepared.
        mask = self._mask if self._is_padded else None
        if mask is not None and count == 1 and self._takes_step_mask:
            mask = mask.bool()[:, None, None]
        step = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits, self.cache = hf.forward(self.model.model, step, self.cache)
        return logits

    @property
    def length(self) -> int:
        return self._mask.shape[1]


def cache_bytes(cache: Any, missing_layers: int = 0, group: int = 1) -> int:
    """Bytes of the keys and values of all layers, and of the states of those that have linear attention.

    Layers that are not run count as those of the last group that is, of `group` layers.
    """
    layers = hf.cached_bytes(cache)
    return sum(layers) + missing_layers * sum(layers[-group:]) // group
