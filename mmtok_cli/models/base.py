"""What the rest of the house knows of a vision-language model, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

Stage = Callable[[str], AbstractContextManager[Any]]


def unwatched(name: str) -> AbstractContextManager[Any]:
    """The stage context of somebody who only wants the answer."""
    return nullcontext()


@dataclass(frozen=True)
class Prompt:
    """A batch of questions about images, as the processor made it.

    input_ids, attention_mask: [batch, length], left-padded, with one placeholder for each vision token.
    pixel_values: one tensor per image, since images may be encoded at different sizes.
    images: the pictures as opened; owners[i] is the row that image i belongs to; grids are their vision tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: tuple[Tensor, ...]
    images: tuple[Image, ...]
    image_ids: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    questions: tuple[str, ...]


class VisionLanguageModel(ABC):
    """A transformers model and its processor, taken apart at the places where vision tokens can be reduced.

    Nothing of the model is changed: encoding and the forward pass are transformers' own, and a shorter prompt is an
    ordinary prompt with fewer placeholders.
    """

    family: ClassVar[str]
    positions: ClassVar[Positions] = "renumber"  # of all methods on the harmonised track
    weights: str = "pretrained"  # or "random"

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def attention(self) -> str:
        """The attention kernel in use: sdpa, eager, flash_attention_2."""
        return self.model.config._attn_implementation

    @property
    def context_length(self) -> int:
        """The longest sequence that the language model was made for, in tokens."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def layer_count(self) -> int:
        """Decoder layers of the language model."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = self.model.generation_config.eos_token_id
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    @classmethod
    @abstractmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        """A processor for models whose own files are not at hand; see models/stand_in.py."""

    @abstractmethod
    def grid(self, image: Image) -> tuple[int, int]:
        """(rows, columns) of vision tokens that the image has when nothing is reduced."""

    @abstractmethod
    def prepare(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Image]],
        image_ids: Sequence[Sequence[str]],
        grids: Sequence[tuple[int, int]],
    ) -> Prompt:
        """Turn questions and their images into a prompt whose images are encoded at `grids` (one for each image)."""

    @abstractmethod
    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        """Run the vision encoder and the projector: the vision tokens of each image.

        What the signals cost beyond that is spent in `stage("select")`. Raises MMTokError for a signal that the
        family does not offer.
        """

    @abstractmethod
    def patch_boxes(self, image: Image, grid: tuple[int, int]) -> list[tuple[float, float, float, float]]:
        """(left, top, right, bottom) in pixels of the image that each vision token covers; padding lies outside."""

    def text_tokens(self, prompt: Prompt) -> list[TextTokens]:
        """The question that goes with each image."""
        return [TextTokens(prompt.questions[owner], self.embed_words) for owner in prompt.owners]

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """Input embeddings of words, [text tokens, dim], without the token that begins every sequence."""
        ids = self.tokenizer(list(words), is_split_into_words=True)["input_ids"]
        if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        return self.model.get_input_embeddings()(torch.tensor(ids, device=self.device))

    def assemble(
        self,
        prompt: Prompt,
        vision: Sequence[VisionTokens],
        selections: Sequence[Selection],
        positions: Positions = "renumber",
    ) -> dict[str, Any]:
        """Arguments of the model's forward for a prompt that holds the selected vision tokens alone.

        A pure function: placeholders of dropped tokens leave the sequence and rows are aligned to the right again.
        Positions are counted anew, or those of the places that the kept tokens stand for in the whole prompt.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        live = prompt.attention_mask.bool()
        places = live.long().cumsum(1) - 1
        starts = self.image_starts(prompt.input_ids, [v.total for v in vision])
        for (row, start), tokens, selection in zip(starts, vision, selections, strict=True):
            end = start + selection.kept  # the first placeholders of the image serve, whichever places they stand for
            live[row, end : start + tokens.total] = False
            places[row, start:end] = places[row, start] + selection.indices.clamp(min=0)

        length = int(live.sum(1).max())
        columns = live.int().argsort(dim=1, stable=True)[:, -length:]
        mask = live.gather(1, columns)
        kept = places.gather(1, columns) if positions == "keep" else mask.long().cumsum(1) - 1
        rows = [
            v.projected[s.indices] if s.tokens is None else s.tokens.to(v.projected.dtype)
            for v, s in zip(vision, selections, strict=True)
        ]
        return {
            "input_ids": prompt.input_ids.gather(1, columns).masked_fill(~mask, self.tokenizer.pad_token_id),
            "attention_mask": mask.long(),
            "position_ids": kept.masked_fill(~mask, 0),
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=rows)},
        }

    def inside(
        self, attention_mask: Tensor, images: Sequence[CutImage], positions: Positions, stage: Stage = unwatched
    ) -> Inside:
        """A context within which prefill and decoding cut images down between decoder layers.

        attention_mask: [batch, length], of the prompt that will be read. Raises MMTokError for an attention kernel
        under which a shorter sequence would be misread.
        """
        if self.attention not in ("sdpa", "eager"):
            raise MMTokError(
                f"methods inside the language model do not run under {self.attention!r} attention",
                "load the model with sdpa attention",
            )
        return Inside(self.model.model.language_model, attention_mask, images, positions, stage)

    def image_starts(self, input_ids: Tensor, totals: Sequence[int]) -> list[tuple[int, int]]:
        """(row, column) of each image's first placeholder; the `totals` placeholders of an image stand side by side.

        An image without any has no place: (-1, -1).
        """
        found = (input_ids == self.image_token_id).nonzero().tolist()
        starts = accumulate(totals, initial=0)
        return [tuple(found[start]) if n else (-1, -1) for start, n in zip(starts, totals, strict=False)]
