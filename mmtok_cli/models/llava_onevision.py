"""LLaVA-OneVision: the whole image and up to 36 crops of it through SigLIP, made fewer tokens where they are many; of a
video, each frame as a whole, made a quarter of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_cli.budget import Budget, UnmetBudgetError, rectangle
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import (
    Grid,
    Panel,
    VisionLanguageModel,
    cells,
    slice_panels,
    unmet_by_slices,
    without_values,
)
from mmtok_cli.models.llava_next import LlavaNext, Packing
from mmtok_cli.models.processors import ImageTextProcessor
from mmtok_cli.models.siglip_signals import SIGNALS, averaged, layers_of, signals_of, watched
from mmtok_cli.rules import Track
from mmtok_cli.stages import Stage
from mmtok_cli.tokens import Selection, VisionTokens, all_eligible
from mmtok_cli.values import mirrored
from mmtok_cli.video import Video, Visual

VIDEO_TOKEN = "<video>"
MERGE = 2  # patches along each side of what becomes one vision token of a frame


class OneVisionProcessor(ImageTextProcessor):
    """What transformers' processor for LLaVA-OneVision holds, without its video processor."""

    image_token: ClassVar[str] = "<image>"
    image_processor_kind: ClassVar[str] = "llava_onevision"


class LlavaOneVision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration` with a SigLIP tower and one image, or videos, per question.

    The image is cut up and its crops are packed as by LLaVA-NeXT, and methods see them alike. Where that is more than
    about eleven crops, the model scales the stitched crops down to nine crops' worth of tokens, between which no crop
    can be told any more: methods then choose from the whole sequence, whose features and signals are scaled alike.
    Several images of a question are shown without crops by transformers, which is not supported.

    A frame of a video is squeezed into the square that the encoder sees, without crops, and makes one slice in time.
    Its patches are pooled to a quarter as many vision tokens, and features and signals alike. Smaller frames have
    their own shape. The row that ends a video ("newline") shows nothing of it: like the marks around other models'
    videos it belongs to the prompt, is no vision token and always stays, as VidCom2's release keeps it.
    """

    family: ClassVar[str] = "llava_onevision"
    signals: ClassVar[tuple[str, ...]] = SIGNALS
    sees_videos: ClassVar[bool] = True

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
        tokenizer = qwen_tokenizer(token, number, {VIDEO_TOKEN: config.video_token_index})
        return OneVisionProcessor(image_processor, tokenizer, chat_template)

    @property
    def reserved(self) -> tuple[str, ...]:
        return self.processor.image_token, VIDEO_TOKEN

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return self.image_token_id, self.model.config.video_token_id

    @property
    def frame_side(self) -> int:
        """Vision tokens along each side of a frame of the encoder's size."""
        return math.ceil(self.side / MERGE)

    def expanded(self, text: str, images: Sequence[Visual], counts: Sequence[int]) -> str:
        before, *after = text.split(self.processor.image_token)
        for image, count, part in zip(images, counts, after, strict=True):
            before += VIDEO_TOKEN * (count + 1) if isinstance(image, Video) else self.placeholders(count)
            before += part
        return before

    def placeholders_behind(self, vision: VisionTokens) -> int:
        return int(vision.slices > 0)

    def encoded_images(
        self, rows: list[Tensor], vision: Sequence[VisionTokens], selections: Sequence[Selection]
    ) -> dict[str, Any]:
        videos, end = [bool(v.slices) for v in vision], hf.newline(self.model)[None]
        ended = [torch.cat([r, end.to(r)]) if is_video else r for r, is_video in zip(rows, videos, strict=True)]
        return hf.encoded_images(ended, videos, stacked_videos=True)

    def tokenize(
        self, questions: Sequence[str], images: Sequence[Sequence[Visual]], grids: Sequence[Grid | None]
    ) -> Any:
        """As in the base class. Raises MMTokError for several images of a question."""
        counts = [sum(not isinstance(image, Video) for image in group) for group in images]
        if (most := max(counts, default=0)) > 1:
            raise MMTokError(
                f"a question about {most} images, which LLaVA-OneVision sees without crops, is not supported",
                "ask about one image at a time, or use another model",
            )
        return super().tokenize(questions, images, grids)

    def slices(self, image: Visual) -> int:
        return len(image) if isinstance(image, Video) else 0

    def total(self, image: Visual) -> int:
        if isinstance(image, Video):
            return len(image) * self.frame_side**2
        shrunk = self.shrunk(image.height, image.width)
        return super().total(image) if shrunk is None else len(shrunk)

    def keep(self, image: Visual, budget: Budget, track: Track) -> int:
        return VisionLanguageModel.keep(self, image, budget, track)

    def smaller(self, image: Visual, tokens: int) -> Grid:
        """Of a video, every frame has the same grid, of as many tokens as its share has, or the next lower number."""
        if not isinstance(image, Video):
            return super().smaller(image, tokens)
        if tokens < len(image):
            raise unmet_by_slices(len(image))
        share, whole, aspect = tokens // len(image), (self.frame_side, self.frame_side), image.height / image.width
        try:
            rows, columns = rectangle(share, whole, aspect)
        except UnmetBudgetError as error:
            rows, columns = rectangle(error.nearest, whole, aspect)
        return rows * len(image), columns

    def whole_grid(self, image: Visual) -> Grid:
        if isinstance(image, Video):
            return len(image) * self.frame_side, self.frame_side
        shrunk = self.shrunk(image.height, image.width)
        return super().whole_grid(image) if shrunk is None else self._lines(shrunk)

    def first_block(self, image: Visual) -> Tensor:
        if isinstance(image, Video):
            return torch.cat([self.first_of(frame) for frame in self.pixels(image, None)])
        return super().first_block(image)

    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """As of LLaVA-NeXT; of a video, [frames, 3, height, width], as many patches as are pooled to the grid."""
        if not isinstance(image, Video):
            return super().pixels(image, grid)
        patches = self.side, self.side
        if grid is not None and grid != self.whole_grid(image):
            patches = MERGE * (grid[0] // len(image)), MERGE * grid[1]
        return torch.stack([self.resized_pixels(frame, patches) for frame in image.frames.images])

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
        if isinstance(image, Video):
            eligible = torch.ones(self.total(image), dtype=torch.bool)
            return replace(without_values(eligible, self.whole_grid(image)), slices=len(image))
        shrunk = self.shrunk(image.height, image.width)
        return super().unencoded(image) if shrunk is None else without_values(shrunk, (1, len(shrunk)))

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        if isinstance(image, Video):
            rows, columns = grid or self.whole_grid(image)
            return slice_panels(image, len(image), (rows // len(image), columns))
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
        """The vision tokens of an image from those of its crops, or of a video from those of its frames, as the model
        itself packs them."""
        if isinstance(image, Video):
            return self._pooled(tiles, image_id)
        size = image.height, image.width
        shrunk = self.shrunk(*size)
        projected = hf.pack_onevision(self.model, torch.stack([tile.projected for tile in tiles]), *size)
        if shrunk is None:
            return self.packing(*size).packed(tiles, projected, image_id, self._project)

        def packed(flat: Tensor) -> Tensor:
            return hf.pack_onevision(self.model, flat, *size, newline=flat.new_zeros(flat.shape[-1]))

        return VisionTokens(
            projected=projected,
            features=_joined([tile.features for tile in tiles], packed),
            grid=(1, len(shrunk)),
            eligible=mirrored(shrunk, projected.device),
            image_id=image_id,
            project=self._project,
            signals={name: _joined([tile.signals[name] for tile in tiles], packed) for name in tiles[0].signals},
        )

    def _pooled(self, frames: Sequence[VisionTokens], image_id: str) -> VisionTokens:
        """The vision tokens of a video from those of its frames, whose patches are pooled."""
        whole = (self.side, self.side)
        patches, device = frames[0].grid, frames[0].projected.device
        grid = -(-patches[0] // MERGE), -(-patches[1] // MERGE)

        def pooled(rows: Tensor) -> Tensor:
            # The model pools frames of its own size alone.
            fewer = hf.pool_frames(self.model, rows) if patches == whole else averaged(rows, grid, MERGE)
            return fewer.flatten(0, 1)

        return VisionTokens(
            projected=_joined([frame.projected for frame in frames], pooled),
            features=_joined([frame.features for frame in frames], pooled),
            grid=(len(frames) * grid[0], grid[1]),
            eligible=all_eligible(len(frames) * grid[0] * grid[1], device),
            image_id=image_id,
            project=self._project,
            signals={name: _joined([frame.signals[name] for frame in frames], pooled) for name in frames[0].signals},
            slices=len(frames),
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


def _joined(values: Sequence[Tensor], join: Callable[[Tensor], Tensor]) -> Tensor:
    """What the model makes of values of several pictures, [patches] or [patches, dim] each: [tokens] or [tokens, dim].

    join: from [pictures, patches, dim] to [tokens, dim].
    """
    stacked = torch.stack(list(values))
    return join(stacked) if stacked.dim() == 3 else join(stacked[..., None])[:, 0]
