"""What models with a CLIP encoder have in common, LLaVA-1.5 and LLaVA-NeXT among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from mmtok_cli.budget import rectangle
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import Grid, VisionLanguageModel
from mmtok_cli.models.clip_signals import (
    ATTENTION_SIGNALS,
    MIDDLE_LAYER,
    MIDDLE_SIGNALS,
    SIGNALS,
    TOWER_SIGNALS,
    Encoded,
    inputs_of,
)
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.profiles import known_profiles
from mmtok_cli.stages import Stage
from mmtok_cli.tokens import VisionTokens, all_eligible
from mmtok_cli.video import Visual

CHECK_CONFIG = "compare its config.json with the original"


class ClipEncoded(VisionLanguageModel):
    """A model whose images go through a CLIP tower of fixed size and a projector.

    text_tower: loads the text tower of the CLIP model that the encoder was taken from, in the data type given. It is
        called once, when a method first needs it.

    Raises MMTokError for a model with another encoder.
    """

    signals: ClassVar[tuple[str, ...]] = tuple(SIGNALS)

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        *,
        text_tower: Callable[[torch.dtype], ClipText] | None = None,
    ) -> None:
        super().__init__(name, model, processor)
        self._load_tower = text_tower
        self._tower: ClipText | None = None
        self.require_encoder()
        depth = model.config.vision_config.num_hidden_layers + 1
        if not all(-depth <= layer < depth for layer in self._layers()):
            raise MMTokError(f"{name} takes its features from a layer that its encoder does not have", CHECK_CONFIG)
        if not 0 <= self.image_token_id < model.config.text_config.vocab_size:
            raise MMTokError(f"{name} has an image token outside its vocabulary", CHECK_CONFIG)

    def require_encoder(self) -> None:
        """Raises MMTokError for an encoder, or a part of its output, that is not supported."""
        config = self.model.config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower != "clip_vision_model" or strategy != "default":
            raise MMTokError(
                f"{self.name} has a {tower!r} encoder with the feature strategy {strategy!r}, which is not supported",
                "LLaVA models with a CLIP encoder whose class token is dropped are",
            )

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    @property
    def side(self) -> int:
        """Patches along a side of what the encoder sees at once."""
        return self.image_size // self.patch_size

    def smaller(self, image: Visual, tokens: int) -> Grid:
        return rectangle(tokens, (self.side, self.side), image.height / image.width)

    def first_of(self, pixels: Tensor) -> Tensor:
        """The output of the first block for one picture [3, height, width] of the encoder's size: [patches, dim]."""
        batch = pixels[None].to(self.device, self.dtype)
        return hf.first_block_of_clip(self.model, batch)[0, 1:]

    def resized_pixels(self, image: Image, grid: Grid) -> Tensor:
        """The whole image at so many patches, [3, height, width]: none of the budget goes to padding."""
        size = {"height": grid[0] * self.patch_size, "width": grid[1] * self.patch_size}
        own = self.processor.image_processor
        processor = hf.image_processor_class("clip")(
            size=size, crop_size=size, resample=own.resample, image_mean=own.image_mean, image_std=own.image_std
        )
        return processor(image, return_tensors="pt")["pixel_values"][0]

    def encode_tiles(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        image_ids: Sequence[str],
        signals: Sequence[str],
        stage: Stage,
    ) -> list[VisionTokens]:
        """Vision tokens of pictures of one size, each encoded on its own, all of them eligible.

        pixels: [pictures, 3, height, width]; questions, image_ids: one for each. Work for the signals is spent in
        `stage("select")`. Raises MMTokError for a signal that the model does not offer.
        """
        self.require_signals(signals)
        attention = self._attention() if ATTENTION_SIGNALS.keys() & set(signals) else None
        middle = self._middle_attention() if MIDDLE_SIGNALS.keys() & set(signals) else None
        grid = pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size
        with _watched(attention) as seen, _watched(middle) as seen_in_middle:
            states = hf.clip_hidden_states(
                self.model, pixels, self._layers(), interpolate=grid != (self.side, self.side)
            )
        hidden = torch.cat(states, dim=-1)
        projected = hf.project(self.model, hidden[:, 1:])
        found: dict[str, Any] = {}
        if signals:
            with stage("select"):
                encoded = Encoded(hidden, questions, attention, seen, self._text_tower, middle, seen_in_middle)
                found = {name: SIGNALS[name](encoded) for name in signals}
        eligible = all_eligible(grid[0] * grid[1], pixels.device)
        return [
            VisionTokens(
                projected=projected[row],
                features=hidden[row, 1:],
                grid=grid,
                eligible=eligible,
                image_id=image_id,
                project=self._project,
                signals={name: value[row] for name, value in found.items()},
            )
            for row, image_id in enumerate(image_ids)
        ]

    def _project(self, features: Tensor) -> Tensor:
        return hf.project(self.model, features.to(self.dtype))

    def require_signals(self, signals: Sequence[str]) -> None:
        super().require_signals(signals)
        if self._load_tower is None and TOWER_SIGNALS.keys() & set(signals):
            having = [profile.name for profile in known_profiles().values() if profile.text_tower]
            raise MMTokError(
                f"the method reads the question with CLIP, and {self.name} comes without a CLIP text tower",
                f"use another method, or one of {', '.join(having)}, which have one",
            )

    def _text_tower(self) -> ClipText:
        """The text tower on the model's device, loaded on first use."""
        if self._tower is None:
            assert self._load_tower is not None
            self._tower = self._load_tower(self.dtype)
        weight = self._tower.text_projection.weight
        if (weight.device, weight.dtype) != (self.device, self.dtype):
            self._tower.to(self.device, self.dtype)
        return self._tower

    def _attention(self) -> torch.nn.Module:
        """The attention module inside the layer that the features come from."""
        (layer, *others), depth = self._layers(), self.model.config.vision_config.num_hidden_layers
        index = layer if layer < 0 else layer - 1  # hidden state i is what layer i - 1 gave
        if others or not -depth <= index < depth:
            raise MMTokError(
                f"{self.name} does not take its features from one layer of its encoder, so it has no attention to read",
                "use a method that does not read the encoder's attention",
            )
        return hf.clip_attention(self.model, index)

    def _middle_attention(self) -> torch.nn.Module:
        """The attention module of the ninth layer of 24, and in proportion of encoders of other depths."""
        depth = self.model.config.vision_config.num_hidden_layers
        return hf.clip_attention(self.model, max(0, round(depth * MIDDLE_LAYER) - 1))

    def _layers(self) -> list[int]:
        layers = self.model.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)


def _watched(module: torch.nn.Module | None) -> AbstractContextManager[list[Tensor]]:
    return inputs_of(module) if module else nullcontext([])
