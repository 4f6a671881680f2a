"""Qwen2.5-VL: images and videos at their own resolution, four patches merged into one vision token, positions in three
axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import (
    Grid,
    Panel,
    Prompt,
    VisionLanguageModel,
    cells,
    counted,
    slice_panels,
    unmet_by_slices,
)
from mmtok_cli.models.foreign_errors import COMPARE
from mmtok_cli.models.qwen_signals import MIDDLE, SIGNALS, calls_of, signals_of
from mmtok_cli.rules import Positions
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.tokens import Selection, VisionTokens, all_eligible
from mmtok_cli.values import to_device
from mmtok_cli.video import Video, Visual

FULLEST = 0.85  # of a budget that a smaller image takes up at least
VIDEO_TOKEN, START, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
LEAST_OF_FRAME, MOST_OF_FRAME = 128, 768  # vision tokens of a slice, as in qwen-vl-utils
MOST_OF_VIDEO = 115_200  # of all slices: 90 % of a context of 128,000


class QwenVL(VisionLanguageModel):
    """`Qwen2_5_VLForConditionalGeneration`.

    A vision token is what the merger makes of 2x2 patches; its features are the mean of these after the last block,
    as in MMTok's release, in raster order. Positions are those of the whole image (M-RoPE) whatever is dropped.

    Two frames of a video make one slice in time; of an odd number the last one is repeated. Frames are scaled as
    qwen-vl-utils does, by PIL. A grid of a video has the rows of all slices.
    """

    family: ClassVar[str] = "qwen2_5_vl"
    positions: ClassVar[tuple[Positions, ...]] = ("keep",)
    signals: ClassVar[tuple[str, ...]] = (*SIGNALS, MIDDLE)
    any_resolution: ClassVar[bool] = True
    sees_videos: ClassVar[bool] = True
    has_deepstack: ClassVar[bool] = False  # whether the encoder gives the first decoder layers features of their own
    named_blocks: ClassVar[str | None] = "fullatt_block_indexes"  # the field that lists some of the encoder's blocks

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__(name, model, processor)
        vision, text, images = model.config.vision_config, model.config.text_config, processor.image_processor
        for field, encoder, ours in (
            ("patch_size", vision.patch_size, images.patch_size),
            ("spatial_merge_size", vision.spatial_merge_size, images.merge_size),
            ("temporal_patch_size", vision.temporal_patch_size, images.temporal_patch_size),
        ):
            if encoder != ours:
                raise MMTokError(
                    f"{field} of {name} is {encoder} in config.json and {ours} in preprocessor_config.json", COMPARE
                )
        sections, frequencies = hf.rotary_sections(text), hf.rotary_width(text) // 2
        if not sections or len(sections) != 3 or sum(sections) != frequencies:
            raise MMTokError(
                f"text_config.rope_parameters.mrope_section in config.json of {name} is {sections}: not three numbers "
                f"with the sum {frequencies}",
                COMPARE,
            )
        if vision.hidden_size % (4 * vision.num_heads):
            raise MMTokError(
                f"vision_config in config.json of {name} has {vision.num_heads} heads for a width of "
                f"{vision.hidden_size}, which do not share it evenly in quarters",
                COMPARE,
            )
        if self.named_blocks is None:
            return
        blocks = getattr(vision, self.named_blocks)
        if not blocks or not all(0 <= block < vision.depth for block in blocks):
            raise MMTokError(
                f"vision_config.{self.named_blocks} in config.json of {name} is {blocks}, of {vision.depth} blocks",
                COMPARE,
            )

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import qwen_processor

        return qwen_processor(config, chat_template)

    @classmethod
    def load_processor(cls, source: str, *, local_files_only: bool = False) -> Any:
        from mmtok_cli.models.qwen_processor import QwenProcessor

        return QwenProcessor.from_pretrained(source, local_files_only=local_files_only)

    @property
    def image_text(self) -> str:
        return f"{START}{self.processor.image_token}{END}"

    @property
    def reserved(self) -> tuple[str, ...]:
        return self.processor.image_token, VIDEO_TOKEN, START, END

    @property
    def merge(self) -> int:
        """Patches along each side of a vision token."""
        return self.model.config.vision_config.spatial_merge_size

    @property
    def token_size(self) -> int:
        """Pixels along each side of a vision token."""
        return self.merge * self.model.config.vision_config.patch_size

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return self.image_token_id, self.model.config.video_token_id

    def expanded(self, text: str, images: Sequence[Visual], counts: Sequence[int]) -> str:
        before, *after = text.split(self.processor.image_token)
        for image, count, part in zip(images, counts, after, strict=True):
            if isinstance(image, Video):
                before = self._with_video(before, image, count, part)
            else:
                before += self.placeholders(count) + part
        return before

    def _with_video(self, before: str, video: Video, count: int, after: str) -> str:
        """The text before a video, its `count` placeholders and the text after it."""
        return before + VIDEO_TOKEN * count + after

    def total(self, image: Visual) -> int:
        rows, columns = self._grid(image)
        return rows * columns

    def slices(self, image: Visual) -> int:
        pace = self.model.config.vision_config.temporal_patch_size
        return -(-len(image) // pace) if isinstance(image, Video) else 0

    def unencoded(self, image: Visual) -> VisionTokens:
        return replace(super().unencoded(image), grid=self._grid(image), slices=self.slices(image))

    def smaller(self, image: Visual, tokens: int) -> Grid:
        """The grid of `tokens` cells or up to 15 % fewer that distorts least, a missing cell counting a little.

        The processor's own scaling rounds both sides down, and so fills small budgets to 78 % only. Of a video, every
        slice has the same grid; one of fewer tokens than slices cannot be had.
        """
        slices = max(1, self.slices(image))
        if tokens < slices:
            raise unmet_by_slices(slices)
        aspect, best, tokens = image.height / image.width, None, tokens // slices
        for rows in range(1, tokens + 1):
            for columns in range(math.ceil(FULLEST * tokens / rows), tokens // rows + 1):
                cost = abs(math.log(rows / columns / aspect)) + (1 - rows * columns / tokens) / 2
                if columns and (best is None or cost < best[0]):
                    best = cost, (rows * slices, columns)
        assert best is not None  # one row of all cells is a grid
        return best[1]

    def whole_grid(self, image: Visual) -> Grid:
        return self._grid(image)

    def first_block(self, image: Visual) -> Tensor:
        pixels = self.pixels(image, None).to(self.device, self.dtype)
        sizes = torch.tensor([self._size(image, self._grid(image))], device=self.device)
        return hf.first_block_of_qwen(self.model, pixels, sizes)

    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """[patches, values of a patch], cells of 2x2 patches one after another, slice by slice."""
        grid = grid or self._grid(image)
        if not isinstance(image, Video):
            return self._patches(image, grid)
        frames = list(image.frames.images)
        pace = self.model.config.vision_config.temporal_patch_size
        frames += frames[-1:] * (-len(frames) % pace)
        of_frame = grid[0] * pace // len(frames), grid[1]
        # The image processor repeats an image to fill a patch in time: [patches, channels, time, rows, columns].
        shape = 3, pace, -1
        patches = [self._patches(frame, of_frame).unflatten(1, shape) for frame in frames]
        return torch.cat(
            [
                torch.stack([patches[first + t][:, :, t] for t in range(pace)], dim=2).flatten(1)
                for first in range(0, len(frames), pace)
            ]
        )

    def _patches(self, image: Image, grid: Grid) -> Tensor:
        rows, columns = grid
        side = self.token_size
        if image.size != (columns * side, rows * side):
            image = image.resize((columns * side, rows * side), PILImage.Resampling.BICUBIC)
        return self.processor.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]

    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        self.require_signals(signals)
        grids, sizes = self._sizes(prompt)
        counts = [rows * columns for rows, columns in grids]
        slices = [max(1, self.slices(image)) for image in prompt.images]
        last, middle = self._last_attention(), self._middle_attention()
        with (
            calls_of(last, wanted=bool({*signals} - {MIDDLE})) as calls,
            calls_of(middle, wanted=MIDDLE in signals) as middle_calls,
        ):
            out = hf.encode_qwen(
                self.model,
                torch.cat(prompt.pixel_values),
                to_device(sizes, self.device),
                deepstack=self.has_deepstack,
            )
        order = to_device(self._raster_order(sizes), self.device)
        cells_of_patches = out.patches.unflatten(0, (-1, self.merge**2))
        features = cells_of_patches.mean(1)[order].split(counts)
        found: dict[str, Sequence[Tensor]] = {}
        if signals:
            with stage("select"):
                # Patches attend to those of their own slice alone.
                patches = [n * self.merge**2 // k for n, k in zip(counts, slices, strict=True) for _ in range(k)]
                of_patches = signals_of(last, calls[0], patches, signals) if calls else {}
                if middle_calls:
                    received = signals_of(middle, middle_calls[0], patches, ("received_attention",))
                    of_patches[MIDDLE] = received["received_attention"]
                for name, values in of_patches.items():
                    per_token = values.unflatten(0, (-1, self.merge**2)).mean(1)
                    found[name] = per_token[order].split(counts)
        return [
            VisionTokens(
                projected=out.tokens[i],
                features=features[i],
                grid=grid,
                eligible=all_eligible(counts[i], self.device),
                image_id=prompt.image_ids[i],
                project=self._project,
                signals={name: values[i] for name, values in found.items()},
                deepstack=tuple(layer[i] for layer in out.deepstack),
                slices=self.slices(prompt.images[i]),
            )
            for i, grid in enumerate(grids)
        ]

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        rows, columns = grid = grid or self._grid(image)
        if isinstance(image, Video):
            return slice_panels(image, self.slices(image), (rows // self.slices(image), columns))
        return [Panel("", grid, tuple(range(rows * columns)), cells(grid, (0, 0, *image.size)))]

    def released_words(self, question: str) -> tuple[str, ...]:
        """MMTok's code for Qwen covers all words, and the one that it puts in front of them."""
        return tuple(f"Question: {question}".split())

    def position_ids(self, prompt: Prompt, mask: Tensor, positions: Positions, sources: Callable[[], Tensor]) -> Tensor:
        """[4, batch, length]: a count of the tokens, and time, row and column as in the whole prompt."""
        _, sizes = self._sizes(prompt)
        whole = hf.qwen_positions(
            self.model,
            prompt.input_ids,
            prompt.attention_mask,
            self.placeholder_ids,
            sizes,
            [isinstance(image, Video) for image in prompt.images],
            self._seconds(prompt.images),
        )
        of_sources = to_device(pad(whole, (0, 1)), self.device).gather(2, sources().expand(3, -1, -1))
        return torch.cat([to_device(counted(mask), self.device)[None], of_sources])

    def _seconds(self, images: Sequence[Visual]) -> list[float] | None:
        """Seconds from one slice of each video to the next, which its positions depend on; None where they do not."""
        pace = self.model.config.vision_config.temporal_patch_size
        return [pace / image.frames.fps for image in images if isinstance(image, Video)]

    @property
    def _bounds(self) -> tuple[int, int]:
        """The fewest and the most pixels at which the processor leaves an image.

        Both are the same at a fixed resolution, as with min_pixels = max_pixels in papers; the processor's rounding to
        whole tokens leaves a few more or less.
        """
        if self.fixed_tokens is not None:
            return (self.fixed_tokens * self.token_size**2,) * 2
        size = self.processor.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    def _frame_bounds(self, frames: int) -> tuple[int, int]:
        """The fewest and the most pixels of each of the `frames` frames of a video."""
        if self.fixed_tokens is not None:
            return self._bounds
        pace = self.model.config.vision_config.temporal_patch_size
        least, most, all_frames = (n * self.token_size**2 for n in (LEAST_OF_FRAME, MOST_OF_FRAME, MOST_OF_VIDEO))
        return least, int(max(min(most, all_frames / frames * pace), int(least * 1.05)))

    def _grid(self, image: Visual) -> Grid:
        """(rows, columns) of vision tokens as the processor would have them; of a video, the rows of all slices."""
        bounds = self._frame_bounds(len(image)) if isinstance(image, Video) else self._bounds
        try:
            height, width = hf.qwen_size(image.height, image.width, self.token_size, *bounds)
        except ValueError as error:
            raise MMTokError(
                f"{self.name} cannot see an image of {image.width}x{image.height}: {error}", "crop the image, or pad it"
            ) from error
        return max(1, self.slices(image)) * height // self.token_size, width // self.token_size

    def _size(self, image: Visual, grid: Grid) -> tuple[int, int, int]:
        """Time, rows and columns of an image in patches."""
        slices = max(1, self.slices(image))
        return slices, grid[0] // slices * self.merge, grid[1] * self.merge

    def _sizes(self, prompt: Prompt) -> tuple[list[Grid], Tensor]:
        """The grid of each image, and [images, 3], its time, rows and columns in patches, on the host."""
        grids = [grid or self._grid(image) for grid, image in zip(prompt.grids, prompt.images, strict=True)]
        sizes = [self._size(image, grid) for image, grid in zip(prompt.images, grids, strict=True)]
        return grids, torch.tensor(sizes).view(-1, 3)

    def _raster_order(self, sizes: Tensor) -> Tensor:
        """Where each vision token in raster order comes from in the order of the encoder's windows."""
        return hf.qwen_window_order(self.model.config.vision_config, sizes).argsort()

    def _last_attention(self) -> Any:
        """The attention of the last block that sees whole images."""
        return hf.vision_attention(hf.vision_blocks(self.model)[self._whole_image_blocks()[-1]])

    def _middle_attention(self) -> Any:
        """The attention of the block before the middle, of Qwen2.5-VL the nearest one that sees whole images."""
        depth = self.model.config.vision_config.depth
        block = min(self._whole_image_blocks(), key=lambda index: abs(index - (depth // 2 - 1)))
        return hf.vision_attention(hf.vision_blocks(self.model)[block])

    def _whole_image_blocks(self) -> Sequence[int]:
        return sorted(self.model.config.vision_config.fullatt_block_indexes)

    def _project(self, features: Tensor) -> Tensor:
        raise MMTokError(
            f"the merger of {self.name} takes four patches, not one row of features",
            "this is a defect of the method: it must merge projected tokens where there is no class token",
        )


class Qwen35(QwenVL):
    """`Qwen3_5ForConditionalGeneration`: every block of its encoder sees whole images.

    Three of four decoder layers have linear attention: they read the sequence into a state of fixed size and keep no
    keys and values. Methods inside the language model read the others, and the KV cache of those alone shrinks.
    """

    family: ClassVar[str] = "qwen3_5"
    first_cut_reason: ClassVar[str] = "linear attention"
    named_blocks: ClassVar[str | None] = None

    @property
    def first_cut(self) -> int:
        """Behind the first layer that keeps keys and values: by their number transformers counts what was read."""
        return next(i for i in range(self.loaded_layers) if i not in self.linear_layers) + 1

    def _with_video(self, before: str, video: Video, count: int, after: str) -> str:
        """Each slice has its time and marks of its own, in place of those that the chat template puts around all."""
        pace, slices = self.model.config.vision_config.temporal_patch_size, self.slices(video)
        times = [*video.frames.times, *video.frames.times[-1:] * (-len(video) % pace)]
        text = before.removesuffix(START)
        for first in range(0, len(times), pace):
            seconds = (times[first] + times[first + pace - 1]) / 2
            text += f"<{seconds:.1f} seconds>{START}{VIDEO_TOKEN * (count // slices)}{END}"
        return text + after.removeprefix(END)

    def _seconds(self, images: Sequence[Visual]) -> list[float] | None:
        return None  # times are written into the prompt

    def has_text_within(self, image: Visual) -> bool:
        return isinstance(image, Video)

    def assemble(
        self,
        prompt: Prompt,
        vision: Sequence[VisionTokens],
        selections: Sequence[Selection],
        positions: Positions = "renumber",
    ) -> dict[str, Any]:
        """As in every family. Placeholders of a video are in its slices: what is kept of a slice enters there."""
        in_time = [s.by_place() if v.slices else s for v, s in zip(vision, selections, strict=True)]
        return super().assemble(prompt, vision, in_time, positions)

    def _raster_order(self, sizes: Tensor) -> Tensor:
        return torch.arange(int(sizes.prod(-1).sum()) // self.merge**2)

    def _whole_image_blocks(self) -> Sequence[int]:
        return range(self.model.config.vision_config.depth)


class Qwen3VL(Qwen35):
    """`Qwen3VLForConditionalGeneration`: its first decoder layers add features of earlier encoder blocks (DeepStack)
    to the vision tokens, whose rows follow the selection. All of them have full attention."""

    family: ClassVar[str] = "qwen3_vl"
    first_cut_reason: ClassVar[str] = "DeepStack"
    has_deepstack: ClassVar[bool] = True
    named_blocks: ClassVar[str | None] = "deepstack_visual_indexes"

    def encoded_images(
        self, rows: list[Tensor], vision: Sequence[VisionTokens], selections: Sequence[Selection]
    ) -> dict[str, Any]:
        pairs = list(zip(vision, selections, strict=True))
        depth = len(vision[0].deepstack) if vision else 0
        deepstack = [[v.deepstack[layer][s.indices] for v, s in pairs] for layer in range(depth)]
        return hf.encoded_images(rows, [bool(v.slices) for v in vision], deepstack=deepstack)

    @property
    def first_cut(self) -> int:
        return len(self.model.config.vision_config.deepstack_visual_indexes)


class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration`: the same with a mixture of experts in its decoder layers."""

    family: ClassVar[str] = "qwen3_vl_moe"
