"""Videos: frames, and when each of them is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias, Union

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FRAMES = 10_000  # that can be asked for
USUAL_FRAMES = 16  # that are sampled of a video where nothing else is asked for
FOLDER_FPS = 24.0  # frames per second of a folder of frames, as transformers assumes


@dataclass(frozen=True)
class Sampling:
    """How frames are sampled of a video.

    frames: how many, evenly spaced from the first to the last one. fps: so many per second of video instead.
    folder_fps: frames per second of a folder of frames. A video that has fewer frames gives all of them.
    """

    frames: int = USUAL_FRAMES
    fps: float | None = None
    folder_fps: float = FOLDER_FPS

    def __str__(self) -> str:
        return f"{self.frames} frames" if self.fps is None else f"{self.fps:g} fps"

    @property
    def described(self) -> str:
        """In words, for reports: "16 frames per video"."""
        if self.fps is not None:
            return f"{self.fps:g} frame{'s' * (self.fps != 1)} per second of video"
        return f"{self.frames} frame{'s' * (self.frames != 1)} per video"

    def places(self, count: int, seconds: float) -> list[int]:
        """Which of `count` frames are sampled of a video of this duration."""
        wanted = self.frames if self.fps is None else round(seconds * self.fps)
        wanted = min(max(wanted, 1), count)
        return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [0]


USUAL_SAMPLING = Sampling()


@dataclass(frozen=True)
class Frames:
    """Frames of a video in their order, RGB and all of one size, and the time of each in seconds from its start.

    fps: how many of them there are for each second of the video.
    Raises ValueError where they are none, of different sizes, or not as many as their times.
    """

    images: tuple[Image, ...]
    times: tuple[float, ...]
    fps: float

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.times):
            raise ValueError(f"{len(self.images)} frames with {len(self.times)} times")
        if len({image.size for image in self.images}) > 1:
            raise ValueError("the frames are of different sizes")

    def title(self, number: int) -> str:
        """The time of a frame, for people: "1.5 s"."""
        return f"{self.times[number]:.1f} s"


@dataclass(frozen=True)
class Video:
    """A video as a model sees it: frames that were sampled of it, read when they are first needed.

    read: decodes the video and samples its frames; it is called again wherever decoding is timed.
    """

    read: Callable[[], Frames]

    @staticmethod
    def of(images: tuple[Image, ...], times: tuple[float, ...], fps: float) -> Video:
        """A video of given frames. Raises ValueError as Frames does."""
        frames = Frames(images, times, fps)
        return Video(lambda: frames)

    @cached_property
    def frames(self) -> Frames:
        return self.read()

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames.images)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        return self.frames.images[0].size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def decoded(self) -> Video:
        """The video with its frames decoded again."""
        video = replace(self)
        _ = video.frames
        return video

    def part(self, frames: Sequence[int]) -> Video:
        """The video with some of its frames, which are spread over its whole duration."""
        whole = self.frames
        images, times = tuple(whole.images[i] for i in frames), tuple(whole.times[i] for i in frames)
        return Video.of(images, times, whole.fps * len(frames) / len(self))

    def resized(self, size: tuple[int, int]) -> Video:
        """The video with frames of this width and height."""
        return Video(partial(_resized, self.read, size))


def _resized(read: Callable[[], Frames], size: tuple[int, int]) -> Frames:
    from PIL.Image import Resampling

    frames = read()
    images = tuple(image.resize(size, Resampling.BICUBIC) for image in frames.images)
    return replace(frames, images=images)


Visual: TypeAlias = Union["Image", Video]  # what a question may be about


def picture_of(image: Visual, frame: int = 0) -> Image:
    """The image, or a frame of the video."""
    return image.frames.images[frame] if isinstance(image, Video) else image
