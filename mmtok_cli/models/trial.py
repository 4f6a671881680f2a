"""A trial of a loaded model's processor: damage to its files shows here, not in the middle of a comparison."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.foreign_errors import COMPARE, errors_as

QUESTION = "What is in the image?"
TEMPLATE_SECONDS = 10
TEMPLATE_BYTES = 2**30
LONGEST_PROMPT = 100_000  # characters that a chat template may make of the question


def try_processor(model: VisionLanguageModel, *, own_template: bool) -> None:
    """Prepare a prompt about an image, as every answer begins.

    own_template: whether the chat template came with the model's files rather than with mmtok.
    Raises MMTokError for a chat template, tokenizer or image processor that fails, or that does not suit the model.
    """
    name = model.name
    if own_template:
        _require_bounded(model)
    with errors_as(f"the processor of {name} fails on a trial image and question", COMPARE):
        image = Image.new("RGB", (96, 64), "grey")
        prompt = model.prepare([QUESTION], [[image]], [["trial"]], [None])
        expected = model.total(image)
        finite = all(bool(pixels.isfinite().all()) for pixels in prompt.pixel_values)
    if not finite:
        raise MMTokError(f"the image processor of {name} makes NaN or infinity of an image", COMPARE)
    if QUESTION not in model.chat(QUESTION, 1):
        raise MMTokError(f"the chat template of {name} leaves out the question", COMPARE)
    words = model.tokenizer.get_vocab().values()
    if len(set(words)) < len(words):
        raise MMTokError(f"the tokenizer of {name} gives the same number to several words", COMPARE)
    last = model.model.config.text_config.vocab_size - 1
    highest = max([*words, *model.eos_token_ids, model.tokenizer.pad_token_id, int(prompt.input_ids.max())])
    if highest > last:
        raise MMTokError(
            f"the tokenizer or generation_config.json of {name} has a token {highest}, and the vocabulary of "
            f"config.json ends at {last}",
            COMPARE,
        )
    found = int((prompt.input_ids == model.image_token_id).sum())
    if found != expected:
        raise MMTokError(
            f"the prompt of {name} has {found} image tokens with the id {model.image_token_id} for an image of "
            f"{expected} vision tokens: config.json and the tokenizer do not fit together",
            COMPARE,
        )


def _require_bounded(model: VisionLanguageModel) -> None:
    """Refuse a chat template that takes too much time or memory, or writes too much. Raises MMTokError."""
    template = model.processor.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if not isinstance(template, str):
        return  # an error of the trial
    tokens = model.tokenizer.special_tokens_map.items()
    special = tuple(sorted((role, token) for role, token in tokens if isinstance(token, str)))
    with errors_as(f"the chat template of {model.name} cannot be tried", hf.or_tested(COMPARE)):
        length = _rendered_length(template, special)
    if length is None:
        raise MMTokError(f"the chat template of {model.name} takes too much time or memory", COMPARE)
    if length > LONGEST_PROMPT:
        raise MMTokError(f"the chat template of {model.name} makes {length} characters of a short question", COMPARE)


@lru_cache(maxsize=64)
def _rendered_length(template: str, special: tuple[tuple[str, str], ...]) -> int | None:
    """Characters of the longest prompt about no, one or two images; None for a template that exceeds its limits."""
    conversations = [
        [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]}]
        for images in (1, 0, 2)
    ]
    return hf.rendered_length(template, conversations, dict(special), TEMPLATE_SECONDS, TEMPLATE_BYTES)
