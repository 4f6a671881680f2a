"""Prompts of a given length, for timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import IMAGE_MARKER, VisionLanguageModel
from mmtok_cli.video import Visual

FILLERS = ("the", "a", "of", "x")  # words of one token each in most vocabularies; the first two ask for nothing
ATTEMPTS = 4  # at the number of words that gives the number of tokens
LONGEST_QUOTE = 60  # characters of a question in a message


def of_prompt_length(model: VisionLanguageModel, sample: Sample, prompt_tokens: int) -> Sample:
    """The sample with neutral words before its question, so that the prompt has exactly `prompt_tokens` text tokens.

    Text tokens are all tokens of the prompt except vision tokens, with those of the chat template. The words follow
    the last image. Methods that read the question read them too, except for those that skip stop words.

    Raises MMTokError for a question that is longer already, and for a tokenizer that cannot make this length.
    """
    images = sample.open().images
    vision = sum(model.total(image) for image in images)
    if prompt_tokens + vision > model.context_length:
        raise MMTokError(
            f"--prompt-tokens {prompt_tokens} and {vision} vision tokens do not fit into the {model.context_length} "
            f"tokens that {model.name} can read",
            f"use --prompt-tokens {max(1, model.context_length - vision)} at most, less the new tokens",
        )
    shortest = _text_tokens(model, images, sample.question)
    if shortest > prompt_tokens:
        raise MMTokError(
            f"the question {_quoted(sample.question)} takes {shortest} text tokens with its chat template, which is "
            f"more than --prompt-tokens {prompt_tokens}",
            f"use --prompt-tokens {shortest} or more",
        )
    if shortest == prompt_tokens:
        return sample
    for word in FILLERS:
        words = prompt_tokens - shortest
        for _ in range(ATTEMPTS):
            question = _with_words(sample.question, [word] * words)
            found = _text_tokens(model, images, question)
            if found == prompt_tokens:
                return replace(sample, question=question, unpadded_question=sample.question)
            words = max(1, words + prompt_tokens - found)
    raise MMTokError(
        f"the tokenizer of {model.name} makes no prompt of exactly {prompt_tokens} text tokens",
        "choose another --prompt-tokens",
    )


def _text_tokens(model: VisionLanguageModel, images: Sequence[Visual], question: str) -> int:
    tokens = model.tokenize([question], [images], [None] * len(images))
    return int(tokens["input_ids"].shape[1]) - sum(model.total(image) for image in images)


def _with_words(question: str, words: Sequence[str]) -> str:
    before, marker, last = question.rpartition(IMAGE_MARKER)
    space = last[: len(last) - len(last.lstrip())]
    return " ".join([f"{before}{marker}{space}{words[0]}", *words[1:], last.lstrip()])


def _quoted(question: str) -> str:
    return repr(question if len(question) <= LONGEST_QUOTE else question[: LONGEST_QUOTE - 1] + "…")
