"""LLaVA-1.5: one grid of vision tokens per image, which is padded to a square."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor

from mmtok_cli.models.base import Grid, Panel, Prompt, cells, without_values
from mmtok_cli.models.clip import ClipEncoded
from mmtok_cli.models.padding import padding_mask
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.tokens import VisionTokens
from mmtok_cli.values import mirrored
from mmtok_cli.video import Visual

LONGEST_SIDE = 8192  # a line of a hundred thousand pixels is small, but the square around it is not


class Llava(ClipEncoded):
    """`LlavaForConditionalGeneration` with a CLIP tower."""

    family: ClassVar[str] = "llava"

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import llava_processor

        return llava_processor(config, chat_template)

    def total(self, image: Visual) -> int:
        return self.side**2

    def whole_grid(self, image: Visual) -> Grid:
        """The part of the square that is not padding."""
        longest = max(image.size)
        return max(1, round(self.side * image.height / longest)), max(1, round(self.side * image.width / longest))

    def first_block(self, image: Visual) -> Tensor:
        return self.first_of(self.pixels(image, None))[self._eligible(image)]

    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """The image padded to a square with the mean colour, as LLaVA-1.5 was trained: [3, height, width].

        transformers' processors crop the middle of an oblong image instead, unless their checkpoint says otherwise.
        """
        if grid is not None:
            return self.resized_pixels(self.as_image(image), grid)
        return self.resized_pixels(self.square(self.as_image(image)), (self.side, self.side))

    def square(self, image: Image) -> Image:
        """The image in the middle of a square of the mean colour."""
        if max(image.size) > LONGEST_SIDE:
            shrink = LONGEST_SIDE / max(image.size)
            image = image.resize((max(1, round(image.width * shrink)), max(1, round(image.height * shrink))))
        side, mean = max(image.size), self.processor.image_processor.image_mean
        square = PILImage.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        by_size: dict[Grid | None, list[int]] = defaultdict(list)
        for i, grid in enumerate(prompt.grids):
            by_size[grid].append(i)
        tokens: dict[int, VisionTokens] = {}
        for grid, members in by_size.items():
            encoded = self.encode_tiles(
                torch.stack([prompt.pixel_values[i] for i in members]),
                [prompt.questions[prompt.owners[i]] for i in members],
                [prompt.image_ids[i] for i in members],
                signals,
                stage,
            )
            for i, vision in zip(members, encoded, strict=True):
                tokens[i] = (
                    vision
                    if grid
                    else replace(vision, eligible=mirrored(self.unencoded(prompt.images[i]).eligible, self.device))
                )
        return [tokens[i] for i in range(len(prompt.images))]

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        area = (-left, -top, side - left, side - top) if grid is None else (0, 0, *image.size)
        grid = grid or (self.side, self.side)
        return [Panel("", grid, tuple(range(grid[0] * grid[1])), cells(grid, area))]

    def unencoded(self, image: Visual) -> VisionTokens:
        padded = padding_mask(image.width, image.height, self.image_size, self.patch_size)
        return without_values(~padded, (self.side, self.side))

    def _eligible(self, image: Visual) -> Tensor:
        return self.unencoded(image).eligible.to(self.device)
