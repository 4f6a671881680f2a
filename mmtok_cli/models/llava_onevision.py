"""LLaVA-OneVision: the whole image and up to 36 crops of it through SigLIP, made fewer tokens where they are many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import Grid, Panel, VisionLanguageModel, cells, without_values
from mmtok_cli.models.llava_next import LlavaNext, Packing
from mmtok_cli.models.processors import ImageTextProcessor
from mmtok_cli.models.siglip_signals import SIGNALS, layers_of, signals_of, watched
from mmtok_cli.rules import Track
from mmtok_cli.stages import Stage
from mmtok_cli.tokens import VisionTokens, all_eligible
from mmtok_cli.values import mirrored
from mmtok_cli.video import Visual


class OneVisionProcessor(ImageTextProcessor):
    """What transformers' processor for LLaVA-OneVision holds, without its video processor."""

    image_token: ClassVar[str] = "<image>"
    image_processor_kind: ClassVar[str] = "llava_onevision"


class LlavaOneVision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration` with a SigLIP tower and one image per question.

    The image is cut up and its crops are packed as by LLaVA-NeXT, and methods see them alike. Where that is more than
    about eleven crops, the model scales the stitched crops down to nine crops' worth of tokens, between which no crop
    can be told any more: methods then choose from the whole sequence, whose features and signals are scaled alike.
    Several images of a question are shown without crops by transformers, which is not supported.
    """

    family: ClassVar[str] = "llava_onevision"
    signals: ClassVar[tuple[str, ...]] = SIGNALS

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__(name, model, processor)
        self.shrunk = lru_cache(maxsize=4096)(self._shrunk)

    def require_encoder(self) -> None:
        config = self.model.config
        tower, layer = config.vision_config.model_type, config.vision_feature_layer
        if (tower, config.vision_feature_select_strategy, layer) != ("siglip_vision_model", "full", -1):
            raise MMTokError(
                f"{self.name} has a {tower!r} encoder with the feature strategy "
                f"{config.vision_feature_select_strategy!r} and features of layer {layer}, which is not supported",
                "LLaVA-OneVision models with all features of a SigLIP encoder's last layer are",
            )

    @classmethod
    def load_processor(cls, source: str, *, local_files_only: bool = False) -> Any:
        return OneVisionProcessor.from_pretrained(source, local_files_only=local_files_only)

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import qwen_tokenizer

        side = config.vision_config.image_size
        image_processor = hf.image_processor_class(OneVisionProcessor.image_processor_kind)(
            size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints
        )
        token, number = OneVisionProcessor.image_token, config.image_token_id
        tokenizer = qwen_tokenizer(token, number, {"<video>": config.video_token_index})
        return OneVisionProcessor(image_processor, tokenizer, chat_template)

    @property
    def reserved(self) -> tuple[str, ...]:
        return self.processor.image_token, "<video>"

    def tokenize(
        self, questions: Sequence[str], images: Sequence[Sequence[Visual]], grids: Sequence[Grid | None]
    ) -> Any:
        """As in the base class. Raises MMTokError for several images of a question."""
        if most := max((len(group) for group in images if len(group) > 1), default=0):
            raise MMTokError(
                f"a question about {most} images, which LLaVA-OneVision sees without crops, is not supported",
                "ask about one image at a time, or use another model",
            )
        return super().tokenize(questions, images, grids)

    def total(self, image: Visual) -> int:
        shrunk = self.shrunk(image.height, image.width)
        return super().total(image) if shrunk is None else len(shrunk)

    def keep(self, image: Visual, budget: Budget, track: Track) -> int:
        return VisionLanguageModel.keep(self, image, budget, track)

    def whole_grid(self, image: Visual) -> Grid:
        shrunk = self.shrunk(image.height, image.width)
        return super().whole_grid(image) if shrunk is None else self._lines(shrunk)

    def first_of(self, pixels: Tensor) -> Tensor:
        return hf.first_block_of_clip(self.model, pixels[None].to(self.device, self.dtype))[0]

    def encode_tiles(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        image_ids: Sequence[str],
        signals: Sequence[str],
        stage: Stage,
    ) -> list[VisionTokens]:
        self.require_signals(signals)
        grid = pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size
        layers = layers_of(self.model, signals)
        with ExitStack() as stack:
            seen = {name: stack.enter_context(watched(layer)) for name, layer in layers.items()}
            (hidden,) = hf.clip_hidden_states(
                self.model, pixels, self._layers(), interpolate=grid != (self.side, self.side)
            )
        projected = hf.project(self.model, hidden)
        values: dict[str, Tensor] = {}
        if signals:
            with stage("select"):
                values = signals_of(layers, seen, signals, grid)
        return [
            VisionTokens(
                projected=projected[row],
                features=hidden[row],
                grid=grid,
                eligible=all_eligible(grid[0] * grid[1], pixels.device),
                image_id=image_id,
                project=self._project,
                signals={name: value[row] for name, value in values.items()},
            )
            for row, image_id in enumerate(image_ids)
        ]

    def unencoded(self, image: Visual) -> VisionTokens:
        shrunk = self.shrunk(image.height, image.width)
        return super().unencoded(image) if shrunk is None else without_values(shrunk, (1, len(shrunk)))

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        shrunk = self.shrunk(image.height, image.width)
        if grid is not None or shrunk is None:
            return super().panels(image, grid)
        base, first = (self.side, self.side), self.side**2
        inner = shrunk[first:].nonzero().squeeze(1) + first
        lines = self._lines(shrunk)
        return [
            Panel("whole image", base, tuple(range(first)), cells(base, (0, 0, *image.size))),
            Panel("crops", lines, tuple(inner.tolist()), cells(lines, self._kept_area(image))),
        ]

    def _packed(self, tiles: Sequence[VisionTokens], image: Visual, image_id: str) -> VisionTokens:
        """The vision tokens of an image from those of its crops, as the model itself packs them."""
        size = image.height, image.width
        shrunk = self.shrunk(*size)
        projected = hf.pack_onevision(self.model, torch.stack([tile.projected for tile in tiles]), *size)
        if shrunk is None:
            return self.packing(*size).packed(tiles, projected, image_id, self._project)

        def packed(values: Sequence[Tensor]) -> Tensor:
            stacked = torch.stack(list(values))
            flat = stacked if stacked.dim() == 3 else stacked[..., None]
            rows = hf.pack_onevision(self.model, flat, *size, newline=flat.new_zeros(flat.shape[-1]))
            return rows if stacked.dim() == 3 else rows[:, 0]

        return VisionTokens(
            projected=projected,
            features=packed([tile.features for tile in tiles]),
            grid=(1, len(shrunk)),
            eligible=mirrored(shrunk, projected.device),
            image_id=image_id,
            project=self._project,
            signals={name: packed([tile.signals[name] for tile in tiles]) for name in tiles[0].signals},
        )

    def _pack(self, height: int, width: int) -> Packing:
        """The model's own packing, applied to numbers in place of features, before anything is scaled down."""
        return self.packing_of(
            height, width, lambda numbers, end: hf.pack_onevision(self.model, numbers, height, width, end, whole=True)
        )

    def _shrunk(self, height: int, width: int) -> Tensor | None:
        """Which vision tokens, [total], of an image whose crops the model scales down are not ends of lines; else
        None."""
        rows, columns = self.packing(height, width).stitched
        ones = torch.ones(1 + rows * columns, self.side**2, 1)
        found = hf.pack_onevision(self.model, ones, height, width, torch.zeros(1))[:, 0] > 0.5
        return None if len(found) == len(self.packing(height, width).sources) else found

    def _lines(self, shrunk: Tensor) -> Grid:
        """Rows and columns of the crops that were scaled down, without the ends of lines."""
        rows = int((~shrunk).sum())
        return rows, int(shrunk[self.side**2 :].sum()) // rows

    def _kept_area(self, image: Visual) -> tuple[float, float, float, float]:
        """What is left of the stitched crops without their padding, in pixels of the image."""
        packing = self.packing(image.height, image.width)
        rows, columns = (side * self.side for side in packing.stitched)
        boxes = cells((rows, columns), self._area(image))
        ranks = packing.ranks.flatten() - self.side**2
        inner = packing.sources[self.side**2 :]
        left = ranks[inner[inner >= 0]]
        first, last = boxes[int(left.min())], boxes[int(left.max())]
        return first[0], first[1], last[2], last[3]
