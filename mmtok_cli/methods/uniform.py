"""Evenly spaced tokens: a baseline that ignores the content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import on_host, to_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Uniform(Method):
    """Spreads the budget evenly over the rows, and over the columns of each row, without padding."""

    summary: ClassVar[str] = "an evenly spaced grid"
    per_crop: ClassVar[bool] = True

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        import torch

        if budget == vision.total:
            return Selection.everything(vision)
        columns = vision.grid[1]
        places = on_host(vision.eligible).nonzero().squeeze(1)
        lines = [line for line in places.split(torch.bincount(places // columns).tolist()) if len(line)]
        shortest = min(len(line) for line in lines)
        square = round(math.sqrt(budget * len(lines) / shortest))
        chosen = _spread(min(max(square, math.ceil(budget / shortest), 1), budget, len(lines)), len(lines))
        shares = [(i + 1) * budget // len(chosen) - i * budget // len(chosen) for i in range(len(chosen))]
        picks = [lines[row][_spread(share, len(lines[row]))] for row, share in zip(chosen, shares, strict=True)]
        return Selection(to_device(torch.cat(picks), vision.projected.device))


@dataclass(frozen=True)
class UniformFrames(Method):
    """Sees fewer frames of a video, evenly spaced, each of them whole.

    As many slices in time (frames, or what the model makes of two) as fit into the budget, and at least one. Like
    `resize`, it also saves the time of encoding what is not seen; the frames are decoded all the same.
    """

    summary: ClassVar[str] = "fewer frames"
    exact: ClassVar[bool] = False
    needs_video: ClassVar[bool] = True

    def keep_slices(self, slices: int, tokens: int, budget: int) -> int | None:
        return max(1, budget // tokens)


def _spread(count: int, length: int) -> Tensor:
    """`count` different places, evenly spaced in range(length)."""
    import torch

    return torch.arange(count).mul(2).add(1).mul(length).div(2 * count, rounding_mode="floor")
