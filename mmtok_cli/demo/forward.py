"""One training step's forward pass through the modules of the model, many questions per image.

The picture is encoded once. Its questions follow one another in one sequence, but each sees only the
picture and itself, at the positions it would have alone; so training equals single-turn use, at a
fraction of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from transformers import AttentionInterface, CLIPVisionModel, LlavaForConditionalGeneration

from mmtok_cli.demo.architecture import LAYERS, vocabulary
from mmtok_cli.demo.batches import BLOCK, Batch


@dataclass(frozen=True)
class Outputs:
    """`features` and `last` are [batch, 1 + n, dim], `projected` [batch, n, dim], `logits` [batch, q, 2, words], None
    where nothing is asked."""

    features: torch.Tensor
    last: torch.Tensor
    projected: torch.Tensor
    logits: torch.Tensor | None


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Softmax attention in the dtype of its inputs: on a CPU in bfloat16 its backward beats SDPA's by far.

    Query, key and value are [batch, heads, t, head_dim]. A mask is that of the picture alone, [1, 1, p, p];
    the questions that follow it are attended to block by block, which is nearly half of the work saved.
    """
    query = query * scaling
    if attention_mask is None:
        found = (query @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        return found.transpose(1, 2).contiguous(), None
    split = attention_mask.shape[-1]
    questions = _attend_blocks(query[:, :, split:], key, value, split)
    if module.layer_idx == LAYERS - 1:  # nothing reads the picture's last states
        picture = torch.zeros_like(query[:, :, :split])
    else:
        scores = query[:, :, :split] @ key[:, :, :split].transpose(-1, -2) + attention_mask
        picture = scores.softmax(dim=-1) @ value[:, :, :split]
    return torch.cat([picture, questions], dim=2).transpose(1, 2).contiguous(), None


def _attend_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, split: int) -> torch.Tensor:
    """Each block of `BLOCK` queries sees the first `split` keys, and causally itself. [batch, heads, q, head_dim]"""
    blocks = (*query.shape[:2], query.shape[2] // BLOCK, BLOCK, query.shape[3])
    own_key, own_value = (x[:, :, split:].reshape(blocks) for x in (key, value))
    own = query.reshape(blocks) @ own_key.transpose(-1, -2) + causal_mask(BLOCK, query.dtype)[0]
    seen = query @ key[:, :, :split].transpose(-1, -2)
    weights = torch.cat([seen, own.flatten(2, 3)], dim=-1).softmax(dim=-1)
    from_own = weights[..., split:].reshape(own.shape) @ own_value
    return weights[..., :split] @ value[:, :, :split] + from_own.flatten(2, 3)


@lru_cache(maxsize=8)
def causal_mask(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [1, 1, length, length]."""
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


AttentionInterface.register("plain", plain_attention)


def encode(vision: CLIPVisionModel, pixels: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of a picture of any size at any window of the position grid, each [batch, 1 + n, dim]."""
    patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    first = vision.embeddings.class_embedding.expand(len(pixels), 1, -1)
    hidden = torch.cat([first, patches], dim=1) + vision.embeddings.position_embedding(positions)
    states = [vision.pre_layrnorm(hidden)]
    for layer in vision.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    return states


def forward(model: LlavaForConditionalGeneration, batch: Batch, kept: torch.Tensor | None = None) -> Outputs:
    """Encodes the pictures and reads the two tokens after every question.

    `kept` [batch, m], ascending: the vision tokens that the language model is shown, all of them if None.
    """
    dtype = model.lm_head.weight.dtype
    states = encode(model.model.vision_tower, batch.pixels.to(dtype), batch.positions)
    features, last = states[-2], states[-1]
    projected = model.model.multi_modal_projector(features[:, 1:])
    if batch.text.shape[1] == 0:
        return Outputs(features, last, projected, None)

    embed = model.get_input_embeddings()
    opening = embed(_opening()).expand(len(projected), -1, -1)
    shown = projected if kept is None else projected.gather(1, kept[..., None].expand(-1, -1, projected.shape[-1]))
    inputs = torch.cat([opening, shown, embed(batch.text)], dim=1)
    prefix = opening.shape[1] + shown.shape[1]
    index = torch.arange(inputs.shape[1])
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=causal_mask(prefix, dtype),
        position_ids=torch.where(index < prefix, index, prefix + (index - prefix) % BLOCK)[None],
        use_cache=False,
    ).last_hidden_state
    asked = prefix + torch.stack([batch.answer_at, batch.answer_at + 1], dim=-1)
    rows = torch.arange(len(hidden))[:, None, None]
    return Outputs(features, last, projected, model.lm_head(hidden[rows, asked]))


def _opening() -> torch.Tensor:
    names = vocabulary()
    return torch.tensor([[names.index(word) for word in ("<s>", "user", ":")]])
