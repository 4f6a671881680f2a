"""InternVL: an image is cut into tiles of fixed size, followed by a thumbnail of the whole image."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_cli.budget import rectangle
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import Grid, Panel, Prompt, VisionLanguageModel, cells
from mmtok_cli.models.clip_signals import MIDDLE_LAYER, inputs_of
from mmtok_cli.models.processors import ImageTextProcessor
from mmtok_cli.models.qwen_signals import MIDDLE, column_sums
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.tokens import Crops, Selection, VisionTokens, all_eligible
from mmtok_cli.values import mirrored
from mmtok_cli.video import Visual

START, END = "<img>", "</img>"


class InternVLImageTextProcessor(ImageTextProcessor):
    """What transformers' processor for InternVL holds, without its video processor."""

    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    image_processor_kind: ClassVar[str] = "got_ocr2"


class InternVL(VisionLanguageModel):
    """`InternVLForConditionalGeneration`.

    An image is stretched over a rectangle of tiles with nearly its aspect ratio. Where that is more than one tile, a
    thumbnail of the whole image comes last. A vision token is made of 2x2 patches (pixel shuffle); its features are
    these patches side by side. A smaller version of an image goes through the encoder in one piece.
    """

    family: ClassVar[str] = "internvl"
    signals: ClassVar[tuple[str, ...]] = ("class_attention", "received_attention", "mean_keys", MIDDLE)

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__(name, model, processor)
        config = model.config
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            raise MMTokError(
                f"{name} takes its features from layer {config.vision_feature_layer} with the strategy "
                f"{config.vision_feature_select_strategy!r}, which is not supported",
                "InternVL models that use the last layer without its class token are",
            )

    @classmethod
    def load_processor(cls, source: str, *, local_files_only: bool = False) -> Any:
        return InternVLImageTextProcessor.from_pretrained(source, local_files_only=local_files_only)

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import qwen_tokenizer

        height, width = config.vision_config.image_size
        mean, deviation = hf.pixel_statistics("IMAGENET_DEFAULT")
        image_processor = hf.image_processor_class(InternVLImageTextProcessor.image_processor_kind)(
            size={"height": height, "width": width}, image_mean=mean, image_std=deviation
        )
        token, number = InternVLImageTextProcessor.image_token, config.image_token_id
        tokenizer = qwen_tokenizer(token, number, {START: number - 2, END: number - 1})
        return InternVLImageTextProcessor(image_processor, tokenizer, chat_template)

    def placeholders(self, count: int) -> str:
        return f"{START}{super().placeholders(count)}{END}"

    @property
    def reserved(self) -> tuple[str, ...]:
        return self.processor.image_token, START, END

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size[0]

    @property
    def tile_size(self) -> int:
        """Pixels along a side of a tile."""
        return self.model.config.vision_config.image_size[0]

    @property
    def merge(self) -> int:
        """Patches along each side of a vision token."""
        return round(1 / self.model.config.downsample_ratio)

    @property
    def side(self) -> int:
        """Vision tokens along a side of a tile."""
        return self.tile_size // (self.patch_size * self.merge)

    def total(self, image: Visual) -> int:
        rows, columns = self._tiles(image)
        return (rows * columns + (rows * columns > 1)) * self.side**2

    def smaller(self, image: Visual, tokens: int) -> Grid:
        rows, columns = self._tiles(image)
        return rectangle(tokens, (rows * self.side, columns * self.side), image.height / image.width)

    def whole_grid(self, image: Visual) -> Grid:
        """The tiles side by side, over which the image is stretched."""
        rows, columns = self._tiles(image)
        return rows * self.side, columns * self.side

    def first_block(self, image: Visual) -> Tensor:
        whole = self.pixels(image, None)[-1:].to(self.device, self.dtype)
        return hf.first_block_of_internvl(self.model, whole)[0, 1:]

    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """[tiles, 3, height, width], the whole image last; a smaller version alone."""
        options: dict[str, Any] = {"crop_to_patches": True}
        if grid is not None:
            pixels = self.patch_size * self.merge
            size = {"height": grid[0] * pixels, "width": grid[1] * pixels}
            options = {"crop_to_patches": False, "size": size}
        return self.processor.image_processor(self.as_image(image), return_tensors="pt", **options)["pixel_values"]

    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        self.require_signals(signals)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(prompt.pixel_values):
            by_size.setdefault(tuple(pixels.shape[2:]), []).append(i)
        found: dict[int, VisionTokens] = {}
        for members in by_size.values():
            pixels = torch.cat([prompt.pixel_values[i] for i in members])
            tiles = iter(self._encode_tiles(pixels, signals, stage))
            for i in members:
                image_id = prompt.image_ids[i]
                mine = [
                    replace(next(tiles), image_id=f"{image_id}#{number}")
                    for number in range(len(prompt.pixel_values[i]))
                ]
                found[i] = replace(mine[0], image_id=image_id) if len(mine) == 1 else self._joined(mine, image_id)
        return [found[i] for i in range(len(prompt.images))]

    def encoded_images(
        self, rows: list[Tensor], vision: Sequence[VisionTokens], selections: Sequence[Selection]
    ) -> dict[str, Any]:
        return hf.encoded_images(rows, stacked=True)

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        area = (0, 0, *image.size)
        (rows, columns), side = self._tiles(image), self.side
        if grid is not None or (rows, columns) == (1, 1):
            grid = grid or (side, side)
            return [Panel("", grid, tuple(range(grid[0] * grid[1])), cells(grid, area))]
        tiles = torch.arange(rows * columns * side**2)
        stitched = tiles.view(rows, columns, side, side).transpose(1, 2).flatten().tolist()
        thumbnail = tuple(range(len(tiles), len(tiles) + side**2))
        fine = rows * side, columns * side
        return [
            Panel("tiles", fine, tuple(stitched), cells(fine, area)),
            Panel("whole image", (side, side), thumbnail, cells((side, side), area)),
        ]

    def _tiles(self, image: Visual) -> Grid:
        """(rows, columns) of tiles that the image is cut into."""
        own = self.processor.image_processor
        return hf.tile_grid(image.height, image.width, self.tile_size, own.min_patches, own.max_patches)

    def _encode_tiles(self, pixels: Tensor, signals: Sequence[str], stage: Stage) -> list[VisionTokens]:
        """The vision tokens of pictures of one size [pictures, 3, height, width], each by itself."""
        patches = pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size
        grid = patches[0] // self.merge, patches[1] // self.merge
        last, middle = hf.internvl_attention(self.model, -1), hf.internvl_attention(self.model, self._middle_layer)
        with _watched(last, {*signals} - {MIDDLE}) as seen, _watched(middle, {*signals} & {MIDDLE}) as seen_in_middle:
            features, projected = hf.encode_internvl(self.model, pixels, patches)
        eligible = all_eligible(grid[0] * grid[1], pixels.device)
        values: dict[str, Tensor] = {}
        if signals:
            with stage("select"):
                values = {name: self._signal(name, last, seen[0], grid) for name in signals if name != MIDDLE}
                if seen_in_middle:
                    values[MIDDLE] = self._signal("received_attention", middle, seen_in_middle[0], grid)
        return [
            VisionTokens(
                projected=projected[i],
                features=features[i],
                grid=grid,
                eligible=eligible,
                image_id="",
                project=partial(hf.project, self.model),
                signals={name: value[i] for name, value in values.items()},
            )
            for i in range(len(pixels))
        ]

    def _signal(self, name: str, attention: Any, hidden: Tensor, grid: Grid) -> Tensor:
        """A signal of a layer, by picture; the values of the patches of a token are averaged or, where they are
        shares of the class token's attention, added up. hidden: [pictures, 1 + patches, dim]."""
        queries, keys, scale = hf.internvl_queries_and_keys(attention, hidden)
        if name == "mean_keys":
            return self._merged(keys[:, :, 1:].mean(1), grid)
        if name == "class_attention":
            shares = (queries[:, :, :1].float() @ keys.float().mT * scale).softmax(-1)[:, :, 0, 1:]
            return self.merge**2 * self._merged(shares.mT, grid).mT
        received = [column_sums(q[:, 1:], k, scale)[1:] for q, k in zip(queries, keys, strict=True)]
        return self._merged(torch.stack(received)[:, :, None], grid)[:, :, 0]

    @property
    def _middle_layer(self) -> int:
        """The ninth of 24 layers, and in proportion of encoders of other depths, as for CLIP."""
        return max(0, round(self.model.config.vision_config.num_hidden_layers * MIDDLE_LAYER) - 1)

    def _merged(self, values: Tensor, grid: Grid) -> Tensor:
        """The mean over the patches of each token: [pictures, patches, dim] to [pictures, tokens, dim]."""
        return values.unflatten(1, (grid[0], self.merge, grid[1], self.merge)).mean((2, 4)).flatten(1, 2)

    def _joined(self, tiles: Sequence[VisionTokens], image_id: str) -> VisionTokens:
        """The vision tokens of an image from those of its tiles, in the prompt's order."""
        places = mirrored(torch.arange(len(tiles) * self.side**2).view(len(tiles), -1), self.device)
        return VisionTokens(
            projected=torch.cat([tile.projected for tile in tiles]),
            features=torch.cat([tile.features for tile in tiles]),
            grid=(1, places.numel()),
            eligible=all_eligible(places.numel(), self.device),
            image_id=image_id,
            project=tiles[0].project,
            crops=Crops(tokens=tuple(tiles), places=places, ranks=places),
        )


def _watched(attention: Any, signals: Set[str]) -> AbstractContextManager[list[Tensor]]:
    return inputs_of(attention) if signals else nullcontext([])
