"""A processor for models whose own files are not at hand: right shapes and prompt lengths, meaningless words."""

from __future__ import annotations

import re
import zlib
from typing import Any

from transformers import PreTrainedTokenizer

LETTERS_PER_TOKEN = 4  # about what vocabularies of 32,000 pieces make of English


class StandInTokenizer(PreTrainedTokenizer):
    """Cuts text into pieces of a few letters and gives each an id by its hash.

    Prompts come out about as long as with the real vocabulary, and equal words get equal ids. Ids cannot be turned back
    into words.
    """

    def __init__(self, size: int, image_token: str, image_token_id: int, bos: int, eos: int) -> None:
        self._size = size
        self._special = {"<unk>": 0, "<s>": bos, "</s>": eos, image_token: image_token_id}
        self._names = {number: piece for piece, number in self._special.items()}
        super().__init__(
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="</s>",
            padding_side="left",
            extra_special_tokens={"image_token": image_token},
        )

    @property
    def vocab_size(self) -> int:
        return self._size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._special)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        words = re.findall(r"\w+|[^\w\s]", text)
        return [word[i : i + LETTERS_PER_TOKEN] for word in words for i in range(0, len(word), LETTERS_PER_TOKEN)]

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._special:
            return self._special[token]
        number = zlib.crc32(token.encode(errors="surrogateescape")) % self._size
        return number if number not in self._names else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._names.get(index, f"<{index}>")


def llava_processor(config: Any, chat_template: str) -> Any:
    """A LLaVA-1.5 processor for a configuration, with a stand-in for the vocabulary."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side, text = config.vision_config.image_size, config.text_config
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=StandInTokenizer(
            text.vocab_size, "<image>", config.image_token_id, text.bos_token_id, text.eos_token_id
        ),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
