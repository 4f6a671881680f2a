"""Processors for models whose own files are not at hand: right shapes and prompt lengths, meaningless words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

from mmtok_cli.models import hf
from mmtok_cli.models.qwen_processor import IMAGE_TOKEN, QwenProcessor

TOKENS = r"\w{1,4}|[^\w\s]"  # about what vocabularies of 32,000 pieces make of English

QWEN_PIECES = 151643  # the special tokens come after them
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the first of these
# Most English words are one piece of 150,000; lines end and numbers are spelled in tokens of their own.
QWEN_TOKENS = r"\n{1,10}|\d|[^\W\d]{1,10}|[^\w\s]"

QWEN_MOST_TOKENS = 16384  # per image, of all checkpoints
QWEN_MODELS = {  # fewest tokens per image, the statistics that pixels are normalised with, pieces of the vocabulary
    "qwen2_5_vl": (4, "OPENAI_CLIP", QWEN_PIECES),
    "qwen3_5": (64, "IMAGENET_STANDARD", 248044),
    "qwen3_vl": (64, "IMAGENET_STANDARD", QWEN_PIECES),
    "qwen3_vl_moe": (64, "IMAGENET_STANDARD", QWEN_PIECES),
}


_Tokenizer: Any = hf.public("PreTrainedTokenizer")


class StandInTokenizer(_Tokenizer):
    """Cuts text into pieces of a few letters and gives each an id below `size` by its hash.

    Prompts are about as long as with the real vocabulary, and equal words get equal ids. Ids cannot be turned back
    into words.

    bos: begins every sequence; None where none does. pad: that of the token at the end unless given.
    special: ids of the special tokens besides the image token, those of Llama's vocabulary unless given.
    pattern: of the pieces, a regular expression.
    """

    def __init__(
        self,
        size: int,
        image_token: str,
        image_token_id: int,
        bos: int | None,
        eos: int,
        *,
        pad: int | None = None,
        special: Mapping[str, int] | None = None,
        pattern: str = TOKENS,
    ) -> None:
        self._size, self.pattern = size, pattern
        if special is None:
            special = {"<unk>": 0, "</s>": eos} | ({} if bos is None else {"<s>": bos})
        self._special = {**special, image_token: image_token_id}
        self._names = {number: piece for piece, number in self._special.items()}
        roles = {
            "bos_token": None if bos is None else self._names[bos],
            "eos_token": self._names[eos],
            "unk_token": "<unk>" if "<unk>" in special else None,
            "pad_token": self._names[eos if pad is None else pad],
        }
        more = {name.strip("<|>") + "_token": name for name in special if name not in roles.values()}
        super().__init__(**roles, padding_side="left", extra_special_tokens={"image_token": image_token, **more})

    @property
    def vocab_size(self) -> int:
        return self._size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._special)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*begin, *token_ids_0, *(token_ids_1 or [])]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return re.findall(self.pattern, text)

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._special:
            return self._special[token]
        number = zlib.crc32(token.encode(errors="surrogateescape")) % self._size
        return number if number not in self._names else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._names.get(index, f"<{index}>")


def llava_processor(config: Any, chat_template: str) -> Any:
    """A LLaVA-1.5 processor for a configuration, with a stand-in for the vocabulary."""
    side = config.vision_config.image_size
    return hf.public("LlavaProcessor")(
        image_processor=hf.image_processor_class("clip")(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=_llama_tokenizer(config),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def llava_next_processor(config: Any, chat_template: str) -> Any:
    """A LLaVA-NeXT processor for a configuration, with a stand-in for the vocabulary."""
    side = config.vision_config.image_size
    return hf.public("LlavaNextProcessor")(
        image_processor=hf.image_processor_class("llava_next")(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer=_llama_tokenizer(config),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def qwen_processor(config: Any, chat_template: str) -> QwenProcessor:
    """A processor for a configuration of a Qwen-VL model, with a stand-in for the vocabulary."""
    vision = config.vision_config
    fewest, statistics, pieces = QWEN_MODELS[config.model_type]
    mean, deviation = hf.pixel_statistics(statistics)
    pixels = (vision.patch_size * vision.spatial_merge_size) ** 2  # of one token
    image_processor = hf.image_processor_class("qwen2_vl")(
        size={"shortest_edge": fewest * pixels, "longest_edge": QWEN_MOST_TOKENS * pixels},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=mean,
        image_std=deviation,
    )
    special = {
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    tokenizer = qwen_tokenizer(IMAGE_TOKEN, config.image_token_id, special, pieces)
    return QwenProcessor(image_processor, tokenizer, chat_template)


def qwen_tokenizer(
    image_token: str, image_token_id: int, special: Mapping[str, int], pieces: int = QWEN_PIECES
) -> StandInTokenizer:
    """A stand-in for the vocabulary of Qwen2.5 and later ones. special: ids of special tokens besides the image token.
    pieces: of words; the special tokens come after them."""
    own = {token: pieces + number for number, token in enumerate(QWEN_SPECIAL)}
    return StandInTokenizer(
        pieces,
        image_token,
        image_token_id,
        bos=None,
        eos=own["<|im_end|>"],
        pad=own["<|endoftext|>"],
        special={**own, **special},
        pattern=QWEN_TOKENS,
    )


def gemma_tokenizer(image_token: str, image_token_id: int, special: Mapping[str, int]) -> StandInTokenizer:
    """A stand-in for the vocabulary of Gemma 3. special: ids of special tokens besides the image token."""
    own = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106}
    return StandInTokenizer(
        min(special.values()),
        image_token,
        image_token_id,
        bos=own["<bos>"],
        eos=own["<eos>"],
        pad=own["<pad>"],
        special={**own, **special},
        pattern=QWEN_TOKENS,
    )


def _llama_tokenizer(config: Any) -> StandInTokenizer:
    text = config.text_config
    return StandInTokenizer(text.vocab_size, "<image>", config.image_token_id, text.bos_token_id, text.eos_token_id)
