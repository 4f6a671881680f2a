"""Gemma 3: each image is squeezed into a square for SigLIP, whose patches are averaged to a grid of vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok_cli.budget import rectangle
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import Grid, Panel, Prompt, VisionLanguageModel, cells
from mmtok_cli.models.processors import ImageTextProcessor
from mmtok_cli.models.siglip_signals import SIGNALS, averaged, layers_of, signals_of, watched
from mmtok_cli.rules import Positions
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.tokens import Selection, VisionTokens, all_eligible
from mmtok_cli.video import Visual

START, END = "<start_of_image>", "<end_of_image>"
PLACEHOLDER = "<image_soft_token>"


class Gemma3Processor(ImageTextProcessor):
    """What transformers' processor for Gemma 3 holds: the token of an image in a prompt is where the image starts."""

    image_token: ClassVar[str] = START
    image_processor_kind: ClassVar[str] = "gemma3"


class Gemma3(VisionLanguageModel):
    """`Gemma3ForConditionalGeneration`, without its crops of long images (pan and scan), which are off by default.

    An image is squeezed into a square. A vision token is the mean of 4 x 4 patches, which are its features; the rest
    of the projector is a norm and a product. The vision tokens of an image attend to each other in both directions
    within the language model, those that are kept alone. A smaller version of an image has the image's own shape.
    """

    family: ClassVar[str] = "gemma3"
    signals: ClassVar[tuple[str, ...]] = SIGNALS

    @classmethod
    def load_processor(cls, source: str, *, local_files_only: bool = False) -> Any:
        return Gemma3Processor.from_pretrained(source, local_files_only=local_files_only)

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import gemma_tokenizer

        side = config.vision_config.image_size
        image_processor = hf.image_processor_class(Gemma3Processor.image_processor_kind)(
            size={"height": side, "width": side}
        )
        special = {START: config.boi_token_index, END: config.eoi_token_index}
        tokenizer = gemma_tokenizer(PLACEHOLDER, config.image_token_id, special)
        return Gemma3Processor(image_processor, tokenizer, chat_template)

    def placeholders(self, count: int) -> str:
        return f"\n\n{START}{PLACEHOLDER * count}{END}\n\n"

    @property
    def reserved(self) -> tuple[str, ...]:
        return START, END, PLACEHOLDER

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    @property
    def side(self) -> int:
        """Vision tokens along a side of an image."""
        return round(self.model.config.mm_tokens_per_image**0.5)

    @property
    def merge(self) -> int:
        """Patches along each side of a vision token."""
        return self.model.config.vision_config.image_size // self.patch_size // self.side

    def total(self, image: Visual) -> int:
        return self.side**2

    def smaller(self, image: Visual, tokens: int) -> Grid:
        return rectangle(tokens, (self.side, self.side), image.height / image.width)

    def whole_grid(self, image: Visual) -> Grid:
        return self.side, self.side

    def first_block(self, image: Visual) -> Tensor:
        pixels = self.pixels(image, None)[None].to(self.device, self.dtype)
        return hf.first_block_of_clip(self.model, pixels)[0]

    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """[3, height, width], the image squeezed to the size of the encoder or of the grid."""
        options: dict[str, Any] = {"do_pan_and_scan": False}
        if grid is not None:
            pixels = self.patch_size * self.merge
            options["size"] = {"height": grid[0] * pixels, "width": grid[1] * pixels}
        return self.processor.image_processor(image, return_tensors="pt", **options)["pixel_values"][0]

    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        self.require_signals(signals)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(prompt.pixel_values):
            by_size.setdefault(tuple(pixels.shape), []).append(i)
        found: dict[int, VisionTokens] = {}
        for members in by_size.values():
            batch = torch.stack([prompt.pixel_values[i] for i in members])
            for i, tokens in zip(members, self._encode(batch, signals, stage), strict=True):
                found[i] = VisionTokens(**tokens, image_id=prompt.image_ids[i])
        return [found[i] for i in range(len(prompt.images))]

    def _encode(self, pixels: Tensor, signals: Sequence[str], stage: Stage) -> list[dict[str, Any]]:
        """The vision tokens of pictures of one size, [pictures, 3, height, width], apart from their names."""
        size = self.patch_size * self.merge
        grid = pixels.shape[2] // size, pixels.shape[3] // size
        whole = grid == (self.side, self.side)
        layers = layers_of(self.model, signals)
        with ExitStack() as stack:
            seen = {name: stack.enter_context(watched(layer)) for name, layer in layers.items()}
            hidden = hf.siglip_features(self.model, pixels, interpolate=not whole)
        features = averaged(hidden, grid, self.merge)
        projected = hf.project(self.model, hidden) if whole else hf.project_gemma(self.model, features)
        values: dict[str, Tensor] = {}
        if signals:
            with stage("select"):
                values = signals_of(layers, seen, signals, grid, self.merge)
        return [
            {
                "projected": projected[i],
                "features": features[i],
                "grid": grid,
                "eligible": all_eligible(grid[0] * grid[1], pixels.device),
                "project": partial(hf.project_gemma, self.model),
                "signals": {name: value[i] for name, value in values.items()},
            }
            for i in range(len(pixels))
        ]

    def assemble(
        self,
        prompt: Prompt,
        vision: Sequence[VisionTokens],
        selections: Sequence[Selection],
        positions: Positions = "renumber",
    ) -> dict[str, Any]:
        """As in the base class; which tokens are an image's says which attend to each other in both directions."""
        inputs = super().assemble(prompt, vision, selections, positions)
        return inputs | hf.bidirectional(inputs["input_ids"] == self.image_token_id)

    def encoded_images(
        self, rows: list[Tensor], vision: Sequence[VisionTokens], selections: Sequence[Selection]
    ) -> dict[str, Any]:
        return hf.encoded_images(rows, stacked=True)

    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        grid = grid or (self.side, self.side)
        return [Panel("", grid, tuple(range(grid[0] * grid[1])), cells(grid, (0, 0, *image.size)))]

    def require_hooks(self) -> None:
        raise MMTokError(
            f"methods inside the language model do not run on {self.name}: its vision tokens attend to each other in "
            "both directions, and most of its layers to a window",
            "use a method that acts before the language model, such as mmtok or visionzip",
        )
