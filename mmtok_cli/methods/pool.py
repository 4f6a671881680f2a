"""Average pooling of the token grid: a smaller image, but after the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.budget import UnmetBudgetError, rectangle
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import on_host, to_device


@dataclass(frozen=True)
class Pool(Method):
    """Averages the projected tokens of the image over a grid of as many cells as the budget.

    Padding is not averaged. The position of a cell is that of its middle token. Where the budget forms no grid that
    suits the shape of the image, the next lower number of tokens that does is kept.
    """

    summary: ClassVar[str] = "averages over the grid"
    exact: ClassVar[bool] = False
    per_crop: ClassVar[bool] = True

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        import torch
        from torch.nn.functional import adaptive_avg_pool2d

        if budget == vision.total:
            return Selection.everything(vision)
        places = on_host(vision.eligible).view(vision.grid).nonzero()
        (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
        height, width = bottom - top, right - left
        if len(places) < height * width:
            raise MMTokError(
                f"pooling needs vision tokens that form a rectangle, and those of {vision.image_id} do not",
                "use another method, such as uniform, or a smaller image",
            )
        try:
            rows, columns = rectangle(budget, (height, width), height / width)
        except UnmetBudgetError as error:
            rows, columns = rectangle(error.nearest, (height, width), height / width)

        content = vision.projected.view(*vision.grid, -1)[top:bottom, left:right]
        cells = adaptive_avg_pool2d(content.permute(2, 0, 1), (rows, columns))
        middle_row = top + (2 * torch.arange(rows) + 1) * height // (2 * rows)
        middle_column = left + (2 * torch.arange(columns) + 1) * width // (2 * columns)
        indices = (middle_row[:, None] * vision.grid[1] + middle_column).flatten()
        indices = to_device(indices, content.device)
        return Selection(
            indices, tokens=cells.flatten(1).T.contiguous(), merged=torch.ones_like(indices, dtype=torch.bool)
        )
