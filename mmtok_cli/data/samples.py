"""A sample, and whether an answer to it is right."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, overload

from PIL.Image import Image

from mmtok_cli.data.images import open_image
from mmtok_cli.errors import MMTokError

Item = TypeVar("Item")


@dataclass(frozen=True)
class ClosedImages(Sequence[Image]):
    """Images that are read whenever they are looked at and not held, so that thousands of samples fit into memory."""

    readers: tuple[Callable[[], Image], ...]

    def __len__(self) -> int:
        return len(self.readers)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> ClosedImages: ...
    def __getitem__(self, index: int | slice) -> Image | ClosedImages:
        return ClosedImages(self.readers[index]) if isinstance(index, slice) else self.readers[index]()


@dataclass(frozen=True)
class Sample:
    """A question about one image or several.

    image_ids name the images, and id the sample within its dataset, in the same way in every run. answer and kind are
    known for test questions alone; answers are what several people said, where they were asked.
    """

    images: Sequence[Image]
    question: str
    image_ids: tuple[str, ...]
    answer: str | None = None
    kind: str | None = None
    id: str = ""
    answers: tuple[str, ...] = ()

    def open(self) -> Sample:
        """The sample with its images in memory: read once here, however often they are looked at.

        Raises MMTokError for an image that cannot be read.
        """
        return replace(self, images=tuple(self.images))

    def is_right(self, answer: str) -> bool:
        """Whether `answer` is the known answer, letter case and punctuation aside."""
        return self.answer is not None and normalise(answer) == normalise(self.answer)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at either end."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def sample_from_file(path: Path | str, question: str, *more: Path | str) -> Sample:
    """A question about one image file, or about several in this order.

    Raises MMTokError for an unreadable image and for an empty question.
    """
    require_question(question)
    paths = (path, *more)
    return Sample(tuple(open_image(each) for each in paths), question, tuple(Path(each).name for each in paths))


def require_question(question: str) -> None:
    """Raises MMTokError for a question that nobody can be asked."""
    if not question.strip():
        raise MMTokError("the question is empty", 'ask something, as in "What is in the image?"')
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise MMTokError("the question is not valid UTF-8", "type it anew") from error


def demo_samples(limit: int) -> list[Sample]:
    """The first `limit` held-out questions about drawn scenes that the demo model was not trained on."""
    from mmtok_cli.demo.questions import held_out

    questions = held_out(limit)
    pictures = {scene.seed: scene.image() for scene in {q.scene.seed: q.scene for q in questions}.values()}
    return [
        Sample((pictures[q.scene.seed],), q.text, (f"scene-{q.scene.seed}",), q.answer, q.kind, id=str(number))
        for number, q in enumerate(questions)
    ]


def batches(samples: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive groups of `size` samples, or of their numbers; the last may be smaller."""
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group
