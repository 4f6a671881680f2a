"""LLaVA-1.5: a CLIP tower of fixed size, one grid of vision tokens per image padded to a square."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from PIL.Image import Image

from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import Prompt, Stage, VisionLanguageModel, unwatched
from mmtok_cli.models.clip_signals import ATTENTION_SIGNALS, SIGNALS, TOWER_SIGNALS, Encoded, inputs_of
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.models.padding import padding_mask
from mmtok_cli.profiles import known_profiles
from mmtok_cli.tokens import VisionTokens

CHECK_CONFIG = "compare its config.json with the original"
LONGEST_SIDE = 8192  # a line of a hundred thousand pixels is small, but the square around it is not


class Llava(VisionLanguageModel):
    """`LlavaForConditionalGeneration` with a CLIP tower. Raises MMTokError for one with another encoder.

    text_tower: loads the text tower of the CLIP model that the encoder was taken from, in the data type given. It is
        called once, when a method first asks for what the tower sees.
    """

    family: ClassVar[str] = "llava"

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
        tower, strategy = model.config.vision_config.model_type, model.config.vision_feature_select_strategy
        if tower != "clip_vision_model" or strategy != "default":
            raise MMTokError(
                f"{name} has a {tower!r} encoder with the feature strategy {strategy!r}, which is not supported",
                "LLaVA models with a CLIP encoder whose class token is dropped are",
            )
        depth = model.config.vision_config.num_hidden_layers + 1
        if not all(-depth <= layer < depth for layer in self._layers()):
            raise MMTokError(f"{name} takes its features from a layer that its encoder does not have", CHECK_CONFIG)
        if not 0 <= self.image_token_id < model.config.text_config.vocab_size:
            raise MMTokError(f"{name} has an image token outside its vocabulary", CHECK_CONFIG)

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        from mmtok_cli.models.stand_in import llava_processor

        return llava_processor(config, chat_template)

    @property
    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    def grid(self, image: Image) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    def prepare(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Image]],
        image_ids: Sequence[Sequence[str]],
        grids: Sequence[tuple[int, int]],
    ) -> Prompt:
        flat = [image for group in images for image in group]
        pixels = [self._pixels(image, grid) for image, grid in zip(flat, grids, strict=True)]

        token = self.processor.image_token
        counts = iter(rows * columns for rows, columns in grids)
        texts = []
        for question, group in zip(questions, images, strict=True):
            if token in question:
                raise MMTokError(f"the question contains {token}, which stands for an image", "leave it out")
            before, *after = self._chat(question, len(group)).split(token)
            texts.append(before + "".join(token * next(counts) + part for part in after))
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(
            texts,
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        ).to(self.device)
        return Prompt(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            pixel_values=tuple(p.to(self.device, self.dtype) for p in pixels),
            images=tuple(flat),
            image_ids=tuple(name for group in image_ids for name in group),
            grids=tuple(grids),
            owners=tuple(row for row, group in enumerate(images) for _ in group),
            questions=tuple(questions),
        )

    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        self._check_signals(signals)
        attention = self._attention() if ATTENTION_SIGNALS.keys() & set(signals) else None
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, grid in enumerate(prompt.grids):
            by_size[grid].append(i)
        tokens: dict[int, VisionTokens] = {}
        for grid, members in by_size.items():
            watched: AbstractContextManager[list[torch.Tensor]] = inputs_of(attention) if attention else nullcontext([])
            with watched as seen:
                out = self.model.model.get_image_features(
                    pixel_values=torch.stack([prompt.pixel_values[i] for i in members]),
                    interpolate_pos_encoding=grid != self.grid(prompt.images[members[0]]),
                    return_dict=True,
                )
            hidden = torch.cat([out.hidden_states[layer] for layer in self._layers()], dim=-1)
            found: dict[str, Any] = {}
            if signals:
                with stage("select"):
                    questions = [prompt.questions[prompt.owners[i]] for i in members]
                    encoded = Encoded(hidden, questions, attention, seen, self._text_tower)
                    found = {name: SIGNALS[name](encoded) for name in signals}
            for row, i in enumerate(members):
                tokens[i] = VisionTokens(
                    projected=out.pooler_output[row],
                    features=hidden[row, 1:],
                    grid=grid,
                    eligible=self._eligible(prompt.images[i], grid),
                    image_id=prompt.image_ids[i],
                    project=self._project,
                    signals={name: value[row] for name, value in found.items()},
                )
        return [tokens[i] for i in range(len(prompt.images))]

    def patch_boxes(self, image: Image, grid: tuple[int, int]) -> list[tuple[float, float, float, float]]:
        rows, columns = grid
        if grid == self.grid(image):
            side = max(image.size)
            left, top = (side - image.width) // 2, (side - image.height) // 2
            height, width = side / rows, side / columns
        else:
            left, top = 0, 0
            height, width = image.height / rows, image.width / columns
        return [
            (c * width - left, r * height - top, (c + 1) * width - left, (r + 1) * height - top)
            for r in range(rows)
            for c in range(columns)
        ]

    def _chat(self, question: str, images: int) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    def _pixels(self, image: Image, grid: tuple[int, int]) -> torch.Tensor:
        """Pad to a square with the mean colour, as LLaVA-1.5 was trained, and scale: [3, height, width].

        transformers' processors crop the middle of an oblong image instead, unless their checkpoint says otherwise.
        An image that is encoded at a smaller grid fills it: none of the budget goes to padding.
        """
        processor = self.processor.image_processor
        size = {"height": grid[0] * self.patch_size, "width": grid[1] * self.patch_size}
        if grid != self.grid(image):
            return processor(image, size=size, crop_size=size, return_tensors="pt")["pixel_values"][0]
        if max(image.size) > LONGEST_SIDE:
            shrink = LONGEST_SIDE / max(image.size)
            image = image.resize((max(1, round(image.width * shrink)), max(1, round(image.height * shrink))))
        side = max(image.size)
        square = PILImage.new("RGB", (side, side), tuple(int(channel * 255) for channel in processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return processor(square, size=size, crop_size=size, return_tensors="pt")["pixel_values"][0]

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.model.multi_modal_projector(features.to(self.dtype))

    def _check_signals(self, signals: Sequence[str]) -> None:
        unknown = [name for name in signals if name not in SIGNALS]
        if unknown:
            raise MMTokError(f"the {self.family} family does not offer {', '.join(unknown)}", "use another method")
        if self._load_tower is None and TOWER_SIGNALS.keys() & set(signals):
            having = [profile.name for profile in known_profiles().values() if profile.text_tower]
            raise MMTokError(
                f"the method reads the question with CLIP, and {self.name} comes without a CLIP text tower",
                f"use another method, or one of {', '.join(having)}, which have one",
            )

    def _text_tower(self) -> ClipText:
        """The text tower where the model is now, loaded when it is first asked for."""
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
                "use a method that reads none of the encoder's attention",
            )
        return self.model.model.vision_tower.encoder.layers[index].self_attn

    def _layers(self) -> list[int]:
        layers = self.model.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    def _eligible(self, image: Image, grid: tuple[int, int]) -> torch.Tensor:
        if grid != self.grid(image):
            return torch.ones(grid[0] * grid[1], dtype=torch.bool, device=self.device)
        padded = padding_mask(image.width, image.height, self.image_size, self.patch_size)
        return ~padded.to(self.device)
