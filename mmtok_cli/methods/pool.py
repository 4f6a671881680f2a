"""Average pooling of the token grid: a smaller image, but after the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.budget import rectangle
from mmtok_cli.methods.base import Method, require_eligible
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class Pool(Method):
    """Averages the projected tokens of the image over a grid of exactly as many cells as the budget.

    Padding is not averaged. The position of a cell is that of its middle token.
    """

    summary: ClassVar[str] = "averages over the grid"
    per_crop: ClassVar[bool] = True

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        import torch
        from torch.nn.functional import adaptive_avg_pool2d

        if budget == vision.total:
            return Selection.everything(vision)
        require_eligible(vision, budget)
        places = vision.eligible.view(vision.grid).nonzero()
        (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
        height, width = bottom - top, right - left
        rows, columns = rectangle(budget, (height, width), height / width)

        content = vision.projected.view(*vision.grid, -1)[top:bottom, left:right]
        cells = adaptive_avg_pool2d(content.permute(2, 0, 1), (rows, columns))
        middle_row = top + (2 * torch.arange(rows) + 1) * height // (2 * rows)
        middle_column = left + (2 * torch.arange(columns) + 1) * width // (2 * columns)
        indices = (middle_row[:, None] * vision.grid[1] + middle_column).flatten()
        indices = indices.to(content.device)
        return Selection(
            indices, tokens=cells.flatten(1).T.contiguous(), merged=torch.ones_like(indices, dtype=torch.bool)
        )
