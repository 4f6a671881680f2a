"""A processor for images and text alone: those of transformers that also take videos need torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf


class ImageTextProcessor:
    """An image processor, a tokenizer and a chat template. Subclasses name the image token and the image processor.

    image_token: stands in a prompt for one vision token. image_processor_kind: see `hf.image_processor_class`.
    """

    image_token: ClassVar[str]
    image_processor_kind: ClassVar[str]

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    @classmethod
    def from_pretrained(cls, source: str | Path, *, local_files_only: bool = False) -> Self:
        """Load from a directory or from the hub, the processor's chat template before the tokenizer's.

        Raises MMTokError where there is no chat template or no image token, and OSError for files that are missing.
        """
        tokenizer = hf.load_tokenizer(source, local_files_only=local_files_only)
        image_processor = hf.load_image_processor(cls.image_processor_kind, source, local_files_only=local_files_only)
        template = hf.load_chat_template(source, local_files_only=local_files_only) or tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if not template:
            raise MMTokError(
                f"{source} has no chat template", "download chat_template.jinja or chat_template.json as well"
            )
        if cls.image_token not in tokenizer.get_vocab():
            raise MMTokError(
                f"the vocabulary of {source} has no {cls.image_token}", "compare its tokenizer.json with the original"
            )
        return cls(image_processor, tokenizer, template)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what `from_pretrained` reads, in the hub's format."""
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)
        (Path(directory) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def apply_chat_template(
        self, conversation: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, tokenize: bool = False
    ) -> Any:
        """The prompt as text, with one image token for each image; with `tokenize` as the tokenizer gives it."""
        return self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
        )
