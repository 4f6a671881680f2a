"""A trial of a loaded model's processor: damage to its files shows here, not in the middle of a comparison."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.checkpoint import COMPARE, faults_of

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
    with faults_of(f"the processor of {name} fails on a trial image and question", COMPARE):
        image = Image.new("RGB", (96, 64), "grey")
        prompt = model.prepare([QUESTION], [[image]], [["trial"]], [None])
        expected = model.total(image)
        finite = all(bool(pixels.isfinite().all()) for pixels in prompt.pixel_values)
    if not finite:
        raise MMTokError(f"the image processor of {name} makes NaN or infinity of an image", COMPARE)
    rows = model.model.config.text_config.vocab_size
    highest = max(*model.tokenizer.get_vocab().values(), *model.eos_token_ids, model.tokenizer.pad_token_id)
    if highest >= rows:
        raise MMTokError(
            f"the tokenizer or generation_config.json of {name} has a token {highest}, and its vocabulary ends at "
            f"{rows - 1}",
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
    template = model.processor.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    special = tuple(sorted((k, v) for k, v in model.tokenizer.special_tokens_map.items() if isinstance(v, str)))
    if not isinstance(template, str):
        return  # refused with its name when it is used
    with faults_of(f"the chat template of {model.name} cannot be tried", hf.or_tested("")):
        length = _rendered_length(template, special)
    if length is None or length > LONGEST_PROMPT:
        excess = (
            f"makes {length} characters of a short question" if length else "does not end, or needs too much memory"
        )
        raise MMTokError(
            f"the chat template of {model.name} {excess}", "compare it with the original, or download it again"
        )


@lru_cache(maxsize=64)
def _rendered_length(template: str, special: tuple[tuple[str, str], ...]) -> int | None:
    """Characters of the longest prompt about no, one or two images; None for a template that exceeds its limits."""
    conversations = [
        [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]}]
        for images in (1, 0, 2)
    ]
    return hf.rendered_length(template, conversations, dict(special), TEMPLATE_SECONDS, TEMPLATE_BYTES)
