"""Where a model and a method meet: sample -> prepare -> encode -> select -> prefill -> decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Prompt, VisionLanguageModel
from mmtok_cli.tokens import Selection, VisionTokens

STAGES = ("prepare", "encode", "select", "prefill", "decode")
Stage = Callable[[str], AbstractContextManager[Any]]


def unwatched(name: str) -> AbstractContextManager[Any]:
    """The stage context of somebody who only wants the answer."""
    return nullcontext()


@dataclass(frozen=True)
class TokenCounts:
    """Vision tokens that the images had and that entered the language model, and the text tokens beside them."""

    total: int
    kept: int
    text: int


@dataclass(frozen=True)
class Reduced:
    """A prompt on its way into the language model.

    inputs: arguments of the model's forward. vision, selections: one for each image. tokens: one for each sample.
    """

    prompt: Prompt
    vision: list[VisionTokens]
    selections: list[Selection]
    inputs: dict[str, Any]
    tokens: list[TokenCounts]


@dataclass(frozen=True)
class Answers:
    """What the model said to a batch of samples.

    texts: one for each sample. token_ids: [batch, steps], padded after the end of each answer. first_logits: [batch,
    vocabulary], those of the first new token. kv_cache_bytes: the keys and values of all layers after the last token.
    """

    texts: list[str]
    token_ids: Tensor
    first_logits: Tensor
    kv_cache_bytes: int
    reduced: Reduced


@torch.inference_mode()
def reduce(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    stage: Stage = unwatched,
) -> Reduced:
    """Encode the samples' images and keep the vision tokens that the method chooses.

    `budget` may be None for methods that take none. Raises MMTokError where a budget cannot be met.
    """
    images = [image for sample in samples for image in sample.images]
    with stage("prepare"):
        grids = [model.grid(image) for image in images]
        totals = [rows * columns for rows, columns in grids]
        keep = [total if budget is None else budget.resolve(total) for total in totals]
        sizes = [
            method.resize(grid, kept, image.height / image.width)
            for grid, kept, image in zip(grids, keep, images, strict=True)
        ]
        prompt = model.prepare(
            [s.question for s in samples], [s.images for s in samples], [s.image_ids for s in samples], sizes
        )
    with stage("encode"):
        vision = model.encode(prompt, method.signals)
    with stage("select"):
        # A method that acts before the encoder has met the budget by now.
        left = [min(kept, v.total) for kept, v in zip(keep, vision, strict=True)]
        selections = method.select_batch(vision, model.text_tokens(prompt), left)
        inputs = model.assemble(prompt, vision, selections)
    return Reduced(prompt, vision, selections, inputs, _count_tokens(prompt, totals, selections, inputs))


@torch.inference_mode()
def answer(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    max_new_tokens: int = 32,
    stage: Stage = unwatched,
) -> Answers:
    """Answer a batch of questions greedily from reduced images.

    Raises MMTokError where a budget cannot be met or the prompt is longer than the model can read.
    """
    reduced = reduce(model, method, samples, budget, stage=stage)
    length = reduced.inputs["input_ids"].shape[1]
    if length + max_new_tokens > model.context_length:
        raise MMTokError(
            f"the prompt of {length} tokens and an answer of up to {max_new_tokens} do not fit into the "
            f"{model.context_length} tokens that {model.name} can read",
            "shorten the question, or lower --budget or --max-new-tokens",
        )
    with stage("prefill"):
        first_logits, cache = prefill(model, reduced.inputs)
    with stage("decode"):
        token_ids = decode(model, reduced.inputs, first_logits, cache, max_new_tokens)
    texts = [text.strip() for text in model.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
    return Answers(texts, token_ids, first_logits, cache_bytes(cache), reduced)


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
    mask, position = inputs["attention_mask"], inputs["position_ids"][:, -1:]
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


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of all layers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def _count_tokens(
    prompt: Prompt, totals: Sequence[int], selections: Sequence[Selection], inputs: dict[str, Any]
) -> list[TokenCounts]:
    lengths = inputs["attention_mask"].sum(1).tolist()
    counts = []
    for row, length in enumerate(lengths):
        mine = [i for i, owner in enumerate(prompt.owners) if owner == row]
        kept = sum(selections[i].kept for i in mine)
        counts.append(TokenCounts(sum(totals[i] for i in mine), kept, length - kept))
    return counts
