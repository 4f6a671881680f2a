"""A sample, and whether an answer to it is right."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL.Image import Image

from mmtok_cli.data.images import open_image
from mmtok_cli.errors import MMTokError


@dataclass(frozen=True)
class Sample:
    """A question about one image or several.

    image_ids name the images in the same way in every run. answer and kind are known for test questions alone.
    """

    images: tuple[Image, ...]
    question: str
    image_ids: tuple[str, ...]
    answer: str | None = None
    kind: str | None = None

    def is_right(self, answer: str) -> bool:
        """Whether `answer` is the known answer, letter case and punctuation aside."""
        return self.answer is not None and normalise(answer) == normalise(self.answer)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at either end."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def sample_from_file(path: Path | str, question: str) -> Sample:
    """One image file and a question. Raises MMTokError for an unreadable image and for an empty question."""
    if not question.strip():
        raise MMTokError("the question is empty", 'ask something, as in "What is in the image?"')
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise MMTokError("the question is not valid UTF-8", "type it anew") from error
    return Sample((open_image(path),), question, (Path(path).name,))


def demo_samples(limit: int) -> list[Sample]:
    """The first `limit` held-out questions about drawn scenes that the demo model was not trained on."""
    from mmtok_cli.demo.questions import held_out

    questions = held_out(limit)
    pictures = {scene.seed: scene.image() for scene in {q.scene.seed: q.scene for q in questions}.values()}
    return [Sample((pictures[q.scene.seed],), q.text, (f"scene-{q.scene.seed}",), q.answer, q.kind) for q in questions]


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive groups of `size` samples; the last may be smaller."""
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group
