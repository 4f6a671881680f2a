"""Samples: questions about images and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar, overload

from PIL.Image import Resampling

from mmtok_cli.data.images import open_image
from mmtok_cli.data.videos import is_video, open_video
from mmtok_cli.errors import MMTokError
from mmtok_cli.stages import DECODE_VIDEO, Stage
from mmtok_cli.video import USUAL_SAMPLING, Sampling, Video, Visual

Item = TypeVar("Item")


@dataclass(frozen=True)
class ClosedImages(Sequence[Visual]):
    """Images and videos that are read each time they are accessed and not kept, so that thousands of samples fit into
    memory."""

    readers: tuple[Callable[[], Visual], ...]

    def __len__(self) -> int:
        return len(self.readers)

    @property
    def files(self) -> list[Path]:
        """The files and folders that are read: what readers of the kind `partial(open_image, path)` open."""
        paths = (reader.args[0] for reader in self.readers if isinstance(reader, partial) and reader.args)
        return [path for path in paths if isinstance(path, Path)]

    @overload
    def __getitem__(self, index: int) -> Visual: ...
    @overload
    def __getitem__(self, index: slice) -> ClosedImages: ...
    def __getitem__(self, index: int | slice) -> Visual | ClosedImages:
        return ClosedImages(self.readers[index]) if isinstance(index, slice) else self.readers[index]()


@dataclass(frozen=True)
class Turn:
    """A later question of a conversation, with its reference answers; see Sample."""

    question: str
    answer: str | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    kind: str | None = None


@dataclass(frozen=True)
class Sample:
    """A question about one image or several, which may begin a conversation.

    images: PIL images and videos. question: its `<image>` markers, if any, say where they go.
    image_ids: a stable name for each image, from which seeded methods draw. id: a stable name within the dataset.
    answer: the reference answer, if known. answers: several reference answers. choices: the texts of options A, B, …
    of a multiple-choice question, which are in the question as well. kind: the kind of question, for scores by kind.
    place: where it was read, as in "asked.jsonl, line 3". unpadded_question: the question as it was asked, if it was
    padded to a given length. later: the questions after the first one, where the sample is a conversation.
    judge: the score of an answer, 0 to 1, by the rule of the sample's own task. max_new_tokens: the most of an answer
    that is evaluated, where the task sets it.
    """

    images: Sequence[Visual]
    question: str
    image_ids: tuple[str, ...]
    answer: str | None = None
    kind: str | None = None
    id: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    place: str = ""
    unpadded_question: str | None = None
    later: tuple[Turn, ...] = ()
    judge: Callable[[str], float] | None = None
    max_new_tokens: int | None = None

    def open(self) -> Sample:
        """The sample with its images read into memory, and the frames of its videos.

        Raises MMTokError for an image or a video that cannot be read.
        """
        images = tuple(self.images)
        for image in images:
            if isinstance(image, Video):
                _ = image.frames
        return replace(self, images=images)

    def decoded(self) -> Sample:
        """The sample with the frames of its videos decoded again."""
        return replace(self, images=tuple(i.decoded() if isinstance(i, Video) else i for i in self.images))

    @property
    def has_video(self) -> bool:
        return any(isinstance(image, Video) for image in self.images)

    @property
    def frames(self) -> list[int]:
        """How many frames were sampled of each video."""
        return [len(image) for image in self.images if isinstance(image, Video)]

    @property
    def references(self) -> tuple[str, ...]:
        """All reference answers; empty if none is known."""
        return self.answers or (() if self.answer is None else (self.answer,))

    @property
    def turns(self) -> tuple[Sample, ...]:
        """A sample for each question of the conversation, the first one included."""
        return (replace(self, later=()), *(replace(self, later=(), **vars(turn)) for turn in self.later))


def sample_from_file(path: Path | str, question: str, *more: Path | str, sampling: Sampling = USUAL_SAMPLING) -> Sample:
    """A question about one file or several: images, videos and folders of frames. sampling: of the videos' frames.

    Raises MMTokError for a file that cannot be read and for an empty question.
    """
    require_question(question)
    paths = [Path(each) for each in (path, *more)]
    images = tuple(open_visual(each, sampling) for each in paths)
    return Sample(images, question, tuple(visual_name(each.name, sampling, each) for each in paths)).open()


def open_visual(path: Path, sampling: Sampling) -> Visual:
    """The image or the video at a path. Raises MMTokError where it cannot be read."""
    return open_video(path, sampling) if is_video(path) else open_image(path)


def visual_name(name: str, sampling: Sampling, path: Path) -> str:
    """A name for an image or for a video, of which it matters how frames are sampled."""
    return f"{name} ({sampling})" if is_video(path) else name


def require_question(question: str) -> None:
    """Raises MMTokError for an empty or undecodable question."""
    if not question.strip():
        raise MMTokError("the question is empty", 'ask something, as in "What is in the image?"')
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise MMTokError("the question is not valid UTF-8", "enter it again") from error


def demo_samples(limit: int) -> list[Sample]:
    """The first `limit` held-out questions of the demo, about scenes that the demo model was not trained on."""
    from mmtok_cli.demo.drawing import draw
    from mmtok_cli.demo.questions import held_out

    questions = held_out(limit)
    pictures = {scene.seed: draw(scene) for scene in {q.scene.seed: q.scene for q in questions}.values()}
    return [
        Sample((pictures[q.scene.seed],), q.text, (f"scene-{q.scene.seed}",), q.answer, q.kind, id=str(number))
        for number, q in enumerate(questions)
    ]


def demo_dense(limit: int) -> list[Sample]:
    """The first `limit` held-out questions of the demo about pages, bar charts and fields of dots."""
    from mmtok_cli.demo.dense_drawing import draw_dense
    from mmtok_cli.demo.dense_questions import dense_held_out

    questions = dense_held_out(limit)
    named = {f"{q.picture.layout}-{q.picture.seed}": q.picture for q in questions}
    pictures = {name: draw_dense(picture) for name, picture in named.items()}
    samples = []
    for number, question in enumerate(questions):
        name = f"{question.picture.layout}-{question.picture.seed}"
        samples.append(
            Sample((pictures[name],), question.text, (name,), question.answer, question.kind, id=str(number))
        )
    return samples


def demo_conversations(limit: int) -> list[Sample]:
    """The first `limit` held-out scenes of the demo, each with questions about different objects."""
    from mmtok_cli.demo.drawing import draw
    from mmtok_cli.demo.questions import held_out_conversations

    samples = []
    for number, questions in enumerate(held_out_conversations(limit)):
        first, *others = questions
        later = tuple(Turn(question.text, question.answer, kind=question.kind) for question in others)
        image, name = draw(first.scene), f"scene-{first.scene.seed}"
        samples.append(Sample((image,), first.text, (name,), first.answer, first.kind, id=str(number), later=later))
    return samples


def decoded_videos(samples: Sequence[Sample], stage: Stage) -> Sequence[Sample]:
    """The samples with the frames of their videos decoded again, in a stage of its own; as they are without videos."""
    if not any(sample.has_video for sample in samples):
        return samples
    with stage(DECODE_VIDEO):
        return [sample.decoded() for sample in samples]


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """The sample with its images resized to a width and a height in pixels."""
    return replace(
        sample,
        images=tuple(
            image.resized(size) if isinstance(image, Video) else image.resize(size, Resampling.BICUBIC)
            for image in sample.images
        ),
    )


def batches(samples: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive groups of `size` items; the last may be smaller."""
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group
