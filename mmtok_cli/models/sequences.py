"""Arguments of decoder layers after images of a batch have been cut down: rows, their images, masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.models.hf import Rotary
from mmtok_cli.stages import Stage
from mmtok_cli.tokens import Cut, LayerTokens, Selection, VisionTokens


@dataclass(frozen=True)
class CutImage:
    """One image of a prompt, and how a method cuts it down.

    row, start: where in the prompt its vision tokens stand, side by side. eligible: [total], those that may be kept.
    queries, choose: the method's (see methods/base.py); they get the stage context for the checks of their results.
    vision: the image as it left the encoder. entered: [tokens], which of them these are; None is all.
    """

    row: int
    start: int
    eligible: Tensor
    image_id: str
    cuts: tuple[Cut, ...]
    queries: Callable[[Tensor, Tensor, Stage], Tensor]
    choose: Callable[[LayerTokens, Cut, Stage], Selection]
    vision: VisionTokens | None = None
    entered: Tensor | None = None

    @property
    def asks(self) -> bool:
        """Whether a cut reads the attention of chosen text tokens."""
        return any(cut.reads is not None and cut.rows == "queries" for cut in self.cuts)


@dataclass(frozen=True)
class ImageTokens:
    """An image's tokens in a sequence: where they start in the row, what they stand for, which of them may be kept, and
    which are made of several.

    queries: which text tokens after the image ask for it.
    """

    plan: CutImage
    start: int
    places: Tensor
    eligible: Tensor
    merged: Tensor
    queries: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.places.shape[0]

    def to(self, device: torch.device) -> ImageTokens:
        return replace(
            self,
            places=self.places.to(device),
            eligible=self.eligible.to(device),
            merged=self.merged.to(device),
            queries=None if self.queries is None else self.queries.to(device),
        )


@dataclass(frozen=True)
class Row:
    """One row of a batch: its live tokens, padding left out."""

    length: int
    images: tuple[ImageTokens, ...]

    def text_behind(self, image: ImageTokens, tokens: Tensor) -> Tensor:
        """Of tokens [length, ...] those of the text after an image: a view, if no other image follows it."""
        others = [other for other in self.images if other.start >= image.end]
        starts, ends = [image.end, *(o.end for o in others)], [*(o.start for o in others), self.length]
        parts = [tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class LayerSequence:
    """What the decoder layers between two cuts are called with; rows stand at the right end of `width` slots.

    live: [batch, width], None where every slot is. removed: [batch], tokens fewer than in the prompt. mask_dtype: bool
    for kernels that take a mask of what is visible, a number's for those that add it to the logits.
    """

    rows: list[Row]
    width: int
    live: Tensor | None
    removed: Tensor
    mask: Tensor | None
    mask_dtype: torch.dtype
    position_ids: Tensor | None
    rotary: Rotary

    def to(self, device: torch.device) -> LayerSequence:
        """The sequence on the device of the layers that it is for."""
        if self.rotary[0].device == self.removed.device == device:
            return self
        live, mask, position_ids = (
            part if part is None else part.to(device) for part in (self.live, self.mask, self.position_ids)
        )
        return replace(
            self,
            rows=[replace(row, images=tuple(image.to(device) for image in row.images)) for row in self.rows],
            live=live,
            removed=self.removed.to(device),
            mask=mask,
            position_ids=position_ids,
            rotary=(self.rotary[0].to(device), self.rotary[1].to(device)),
        )


def gather_slots(rows: Tensor, index: Tensor) -> Tensor:
    """rows [batch or 1, slots, dim] at index [batch, fewer slots]."""
    return rows.expand(len(index), -1, -1).gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))


def causal_mask(width: int, live: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The attention mask [batch or 1, 1, width, width] of a sequence that remains, in the kernel's form.

    None is plain causal attention to a fused kernel.

    Padding slots are hidden from all others and see only themselves, so that no softmax is over an empty set.
    """
    if live is None and dtype == torch.bool:
        return None
    visible = torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril()
    if live is not None:
        visible = (visible & live[:, None, None]) | torch.eye(width, dtype=torch.bool, device=device)
    return as_mask(visible, dtype)


def step_mask(sequence: LayerSequence, step: int, after: int, device: torch.device) -> Tensor | None:
    """The attention mask [batch or 1, 1, step, width + after] of `step` tokens that are read after a sequence.

    after: tokens since the sequence was shortened, those of the step included. None where a single token sees all.
    """
    if step == 1 and sequence.live is None:
        return None
    total = sequence.width + after
    visible = torch.ones(1, 1, step, total, dtype=torch.bool, device=device).tril(total - step)
    if sequence.live is not None:
        visible = visible & pad(sequence.live, (0, after), value=True)[:, None, None]
    return as_mask(visible, sequence.mask_dtype)


def as_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the form of the attention kernel: bool, True where visible, or numbers to add to the logits."""
    if dtype == torch.bool:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
