"""LLaVA-NeXT: the whole image and up to four crops of it, each through a CLIP tower of fixed size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_cli.budget import Budget, UnmetBudgetError, rectangle
from mmtok_cli.models import hf
from mmtok_cli.models.base import Box, Grid, Panel, Prompt, cells, without_values
from mmtok_cli.models.clip import ClipEncoded
from mmtok_cli.rules import Track
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.tokens import PADDING, Crops, VisionTokens
from mmtok_cli.values import mirrored, to_device
from mmtok_cli.video import Video, Visual


@dataclass(frozen=True)
class Packing:
    """How the tokens of an image's crops are packed into one sequence.

    stitched: (rows, columns) of crops. sources: [total], which of the crops' tokens each packed one is, numbered crop
    by crop, -1 for the ends of lines. places, ranks: [crops, tokens of a crop], see `Crops`.
    """

    stitched: Grid
    sources: Tensor
    places: Tensor
    ranks: Tensor

    def packed(
        self,
        tiles: Sequence[VisionTokens],
        projected: Tensor,
        image_id: str,
        project: Callable[[Tensor], Tensor],
    ) -> VisionTokens:
        """The vision tokens of an image from those of its crops. projected: [total, dim], packed by the model."""
        device = projected.device
        sources = to_device(self.sources, device)
        features = torch.cat([tile.features for tile in tiles])[sources.clamp(min=0)]
        shown = [mirrored(place >= 0, device) for place in self.places]
        crops = Crops(
            tokens=tuple(replace(tile, eligible=each) for tile, each in zip(tiles, shown, strict=True)),
            places=mirrored(self.places, device),
            ranks=to_device(self.ranks, device),
        )
        return VisionTokens(
            projected=projected,
            features=features.masked_fill((sources < 0)[:, None], 0),
            grid=(1, len(sources)),
            eligible=mirrored(self.sources >= 0, device),
            image_id=image_id,
            project=project,
            crops=crops,
        )


class LlavaNext(ClipEncoded):
    """`LlavaNextForConditionalGeneration` with a CLIP tower.

    The image is seen twice: squeezed into a square, and as large as fits into a rectangle of crops, padded there. The
    model drops the padding again, and ends each line of the stitched crops with a token of its own ("newline").

    Budgets: published totals are those of five crops, so on the released track an image of three crops keeps three
    fifths of a budget. On the harmonised track every image keeps the budget. Shares are always of the image's own
    total. A smaller version of an image goes through the encoder in one piece, without crops.
    """

    family: ClassVar[str] = "llava_next"

    def __init__(self, name: str, model: Any, processor: Any, **text_tower: Any) -> None:
        super().__init__(name, model, processor, **text_tower)
        self.packing = lru_cache(maxsize=4096)(self._pack)

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import llava_next_processor

        return llava_next_processor(config, chat_template)

    @property
    def pinpoints(self) -> list[list[int]]:
        """(height, width) in pixels of the rectangles that an image may be cut into."""
        return self.model.config.image_grid_pinpoints

    @property
    def most_crops(self) -> int:
        return 1 + max(height * width for height, width in self.pinpoints) // self.image_size**2

    def total(self, image: Visual) -> int:
        return len(self.packing(image.height, image.width).sources)

    def keep(self, image: Visual, budget: Budget, track: Track) -> int:
        if track == "harmonised" or budget.count is None:
            return super().keep(image, budget, track)
        crops, total = len(self.packing(image.height, image.width).places), self.total(image)
        kept = budget.count * crops // self.most_crops
        if not 1 <= kept <= total:
            lowest, highest = math.ceil(self.most_crops / crops), total * self.most_crops // crops
            raise UnmetBudgetError(
                f"the budget of {budget} for {self.most_crops} crops comes to {kept} tokens of an image that has "
                f"{crops} crops and {total} vision tokens",
                f"choose {lowest} to {highest}, a share such as 10%, or --track harmonised, where it is that of every "
                "image",
                nearest=min(max(kept, 1), total),
            )
        return kept

    def smaller(self, image: Visual, tokens: int) -> Grid:
        rows, columns = self.packing(image.height, image.width).stitched
        return rectangle(tokens, (rows * self.side, columns * self.side), image.height / image.width)

    def whole_grid(self, image: Visual) -> Grid:
        """The part of the stitched crops that is not padding."""
        height, width = self._shown(image)
        return max(1, round(height / self.patch_size)), max(1, round(width / self.patch_size))

    def first_block(self, image: Visual) -> Tensor:
        return self.first_of(self.pixels(image, None)[0])

    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """[crops, 3, height, width], the whole image first; a smaller version alone."""
        if grid is not None:
            return self.resized_pixels(self.as_image(image), grid)[None]
        found = self.processor.image_processor(
            self.as_image(image), image_grid_pinpoints=self.pinpoints, return_tensors="pt"
        )
        return found["pixel_values"][0]

    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(prompt.pixel_values):
            by_size.setdefault(tuple(pixels.shape[2:]), []).append(i)
        tokens: dict[int, VisionTokens] = {}
        for members in by_size.values():
            counts = [len(prompt.pixel_values[i]) for i in members]
            owners = [i for i, count in zip(members, counts, strict=True) for _ in range(count)]
            numbers = [number for count in counts for number in range(count)]
            tiles = self.encode_tiles(
                torch.cat([prompt.pixel_values[i] for i in members]),
                [prompt.questions[prompt.owners[i]] for i in owners],
                [f"{prompt.image_ids[i]}#{number}" for i, number in zip(owners, numbers, strict=True)],
                signals,
                stage,
            )
            for i, count in zip(members, counts, strict=True):
                mine, tiles = tiles[:count], tiles[count:]
                image, image_id = prompt.images[i], prompt.image_ids[i]
                in_parts = prompt.grids[i] is None or isinstance(image, Video)  # crops, or frames
                tokens[i] = self._packed(mine, image, image_id) if in_parts else replace(mine[0], image_id=image_id)
        return [tokens[i] for i in range(len(prompt.images))]

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        whole: Box = (0, 0, *image.size)
        if grid is not None:
            return [Panel("", grid, tuple(range(grid[0] * grid[1])), cells(grid, whole))]
        packing, base = self.packing(image.height, image.width), (self.side, self.side)
        first = self.side**2
        inner = [i for i in range(first, len(packing.sources)) if packing.sources[i] >= 0]
        if not inner:  # of an image so thin, nothing is left of the crops but ends of lines
            return [Panel("whole image", base, tuple(range(first)), cells(base, whole))]
        lines = int((packing.sources < 0).sum())
        columns = (len(packing.sources) - first) // lines
        boxes = cells((packing.stitched[0] * self.side, packing.stitched[1] * self.side), self._area(image))
        ranks = packing.ranks.flatten() - first
        covered = [boxes[int(ranks[packing.sources[i]])] for i in inner]
        return [
            Panel("whole image", base, tuple(range(first)), cells(base, whole)),
            Panel("crops", (lines, columns - 1), tuple(inner), tuple(covered)),
        ]

    def _packed(self, tiles: Sequence[VisionTokens], image: Visual, image_id: str) -> VisionTokens:
        """The vision tokens of an image from those of its crops, as the model itself packs them."""
        packing = self.packing(image.height, image.width)
        stacked = torch.stack([tile.projected for tile in tiles])
        projected = hf.pack_crops(self.model, stacked, image.height, image.width)
        return packing.packed(tiles, projected, image_id, self._project)

    def unencoded(self, image: Visual) -> VisionTokens:
        packing = self.packing(image.height, image.width)
        tile = without_values(torch.ones(self.side**2, dtype=torch.bool), (self.side, self.side))
        return packing.packed([tile] * len(packing.places), torch.empty(len(packing.sources), 0), "", tile.project)

    def _pack(self, height: int, width: int) -> Packing:
        """The model's own packing, applied to numbers in place of features."""
        return self.packing_of(
            height, width, lambda numbers, end: hf.pack_crops(self.model, numbers, height, width, newline=end)
        )

    def packing_of(self, height: int, width: int, pack: Callable[[Tensor, Tensor], Tensor]) -> Packing:
        """The packing of an image. pack: what the model makes of the rows of crops and the row that ends a line."""
        rows, columns = hf.crop_grid(height, width, self.pinpoints, self.image_size)
        crops, tokens = 1 + rows * columns, self.side**2
        numbers = torch.arange(crops * tokens, dtype=torch.float64).view(crops, tokens, 1)
        packed = pack(numbers, torch.tensor([-1.0], dtype=torch.float64))
        sources = packed[:, 0].long()
        places = torch.full((crops * tokens,), PADDING)
        places[sources[sources >= 0]] = (sources >= 0).nonzero().squeeze(1)
        stitched = torch.arange(rows * columns * tokens).view(rows, self.side, columns, self.side).transpose(1, 2)
        ranks = torch.cat([torch.arange(tokens)[None], tokens + stitched.reshape(-1, tokens)])
        return Packing((rows, columns), sources, places.view(crops, tokens), ranks)

    def _shown(self, image: Visual) -> tuple[int, int]:
        """Height and width of the image in the stitched crops, in pixels."""
        rows, columns = self.packing(image.height, image.width).stitched
        height, width = rows * self.image_size, columns * self.image_size
        scale = min(width / image.width, height / image.height)
        return min(math.ceil(image.height * scale), height), min(math.ceil(image.width * scale), width)

    def _area(self, image: Visual) -> Box:
        """What the stitched crops show, in pixels of the image: its margins are padding (see transformers'
        `get_patch_output_size` and `_pad_for_patching`)."""
        rows, columns = self.packing(image.height, image.width).stitched
        height, width = rows * self.image_size, columns * self.image_size
        shown_height, shown_width = self._shown(image)
        top, left = (height - shown_height) // 2, (width - shown_width) // 2
        down, across = image.height / shown_height, image.width / shown_width
        return -left * across, -top * down, (width - left) * across, (height - top) * down
