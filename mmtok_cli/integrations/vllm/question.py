"""Which part of a prompt is the question: what the chat template put around it is taken off again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import VisionLanguageModel

QUESTION, ANSWER, LATER = "mmtokquestion", "mmtokanswer", "mmtoklater"  # words that no template contains


def last_question(model: VisionLanguageModel, prompt: Sequence[int]) -> str:
    """The user's last question in a prompt, without the tokens that mark images.

    prompt: token ids, with one placeholder for each image. A tokenizer that changes text, to lower case for instance,
    gives the question as it decodes it. Raises MMTokError for a prompt that was not made with the model's chat
    template.
    """
    rendered = model.conversation([QUESTION, LATER], 0, ANSWER)
    before, rest = rendered.split(QUESTION)
    between, after = rest.split(ANSWER)[1].split(LATER)
    openings = [_as_decoded(model, text) for text in (before, between)]
    text, closing = _plain(model.tokenizer.decode(list(prompt))), _as_decoded(model, after)
    starts = [text.rfind(opening) + len(opening) for opening in openings if opening and opening in text]
    if not text.endswith(closing) or not starts:
        raise MMTokError(
            f"the prompt does not follow the chat template of {model.name}, so that the question is not known",
            'add "question": "..." to mm_processor_kwargs, or choose a method that does not read the question',
        )
    question = text[max(starts) : len(text) - len(closing)]
    for mark in (model.image_text, model.processor.image_token):
        question = question.replace(_plain(mark), " ")
    return _plain(question)


def _as_decoded(model: VisionLanguageModel, text: str) -> str:
    """A part of the template as it looks in a decoded prompt."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return _plain(model.tokenizer.decode(ids))


def _plain(text: str) -> str:
    """Text with one space wherever there is any, as tokenizers and templates differ in spaces."""
    return re.sub(r"\s+", " ", text).strip()
