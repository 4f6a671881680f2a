"""The plain objects that pass between a model and a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisionTokens:
    """The vision tokens of one image, as the encoder left them.

    projected: [tokens, dim], what would enter the language model.
    features: [tokens, vision_dim], the same tokens before the projector.
    grid: (rows, columns); token i lies in row i // columns, column i % columns.
    eligible: [tokens], False where a patch shows nothing but padding.
    image_id: names the image in the same way in every run; seeded methods draw from it.
    signals: what else the method asked to see of the encoder.
    """

    projected: Tensor
    features: Tensor
    grid: tuple[int, int]
    eligible: Tensor
    image_id: str
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.projected.shape[0]


@dataclass(frozen=True)
class TextTokens:
    """The question that goes with an image.

    embed: turns words into the language model's input embeddings, [text tokens, dim].
    """

    question: str
    embed: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Selection:
    """What a method keeps of one image.

    indices: [kept], ascending; the places in the image that the kept tokens stand for.
    order: [kept], the same indices in the order in which they were picked, where there is one.
    gains: [kept], what each pick added to the method's objective, in the order of the picks.
    tokens: [kept, dim], rows that stand in for `projected[indices]` where the method merges or pools.
    """

    indices: Tensor
    order: Tensor | None = None
    gains: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def kept(self) -> int:
        return self.indices.shape[0]

    @staticmethod
    def everything(vision: VisionTokens) -> Selection:
        return Selection(torch.arange(vision.total, device=vision.projected.device))
