"""Reading videos: files, by PyAV, and folders of frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmtok_cli.data.images import in_rgb, open_image, require_file
from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.video import FOLDER_FPS, USUAL_SAMPLING, Frames, Sampling, Video

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"}
FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def is_video(path: Path) -> bool:
    """Whether the name is that of a video: a folder, or a file with the suffix of a video."""
    try:
        return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES
    except (OSError, ValueError):  # a name that no file can have, or a directory that may not be searched
        return False


def open_video(path: Path | str, sampling: Sampling = USUAL_SAMPLING) -> Video:
    """A video file or a folder of frames, which are read when they are first needed.

    Frames of a folder are in the order of their names, frame9.png before frame10.png. Raises MMTokError where PyAV is
    missing; `Video.frames` raises it for what cannot be decoded.
    """
    path = Path(path)
    if path.is_dir():
        return Video(partial(_of_folder, path, sampling))
    require_file(path)
    _pyav()
    return Video(partial(_of_file, path, sampling))


def video_of_arrays(arrays: Any, fps: float = FOLDER_FPS) -> Video:
    """A video of frames as an array [frames, height, width, 3] of 8-bit values, all of which the model sees."""
    import numpy as np
    from PIL import Image as PILImage

    frames = np.asarray(arrays)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise MMTokError(
            f"frames of the shape {list(frames.shape)} and type {frames.dtype} are not a video",
            "give an array [frames, height, width, 3] of 8-bit values",
        )
    images = tuple(PILImage.fromarray(frame) for frame in frames)
    return Video.of(images, tuple(number / fps for number in range(len(images))), fps)


def _of_folder(path: Path, sampling: Sampling) -> Frames:
    files = [file for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES and file.is_file()]
    files.sort(key=_natural)
    if not files:
        raise MMTokError(
            f"there is no image in {path}",
            f"a folder of frames holds files ending in {' '.join(sorted(FRAME_SUFFIXES))}",
        )
    seconds = len(files) / sampling.folder_fps
    places = sampling.places(len(files), seconds)
    images = [open_image(files[place]) for place in places]
    odd = next((place for place, image in zip(places, images, strict=True) if image.size != images[0].size), None)
    if odd is not None:
        raise MMTokError(f"{files[odd]} is of another size than {files[places[0]].name}", "frames must be of one size")
    return Frames(tuple(images), tuple(place / sampling.folder_fps for place in places), len(places) / seconds)


def _natural(file: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their values: frame9.png comes before frame10.png."""
    parts = [*re.split(r"(\d+)", file.name), file.name]  # the name itself tells 1.png and 01.png apart
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _of_file(path: Path, sampling: Sampling) -> Frames:
    """Times are read without decoding. Frames are decoded up to the last one that is sampled, since seeking is not
    exact in all formats; the sampled ones become images."""
    av = _pyav()
    try:
        with av.open(str(path)) as container:
            times = _times(_stream(path, container), container)
        with av.open(str(path)) as container:
            wanted = sampling.places(len(times), _duration(times))
            images = _images(path, _stream(path, container), container, wanted, len(times))
    except MMTokError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MMTokError(
            f"{path} is damaged or not a video: {first_line(error)}", "save or convert it again"
        ) from error
    return Frames(images, tuple(times[place] for place in wanted), len(wanted) / _duration(times))


def _stream(path: Path, container: Any) -> Any:
    """The first stream of pictures."""
    if not container.streams.video:
        raise MMTokError(f"{path} has no pictures", "give a video, not a sound file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _times(stream: Any, container: Any) -> list[float]:
    """The time of each frame in seconds from the first one.

    Frames that are decoded but not shown do not count: a clip that was cut without encoding it again begins with them.
    """
    shown = sorted(
        float(packet.pts * packet.time_base)
        for packet in container.demux(stream)
        if packet.pts is not None and packet.size and not packet.is_discard
    )
    if not shown:
        raise MMTokError(f"{container.name} has no frames", "save or convert it again")
    return [time - shown[0] for time in shown]


def _duration(times: Sequence[float]) -> float:
    """Seconds that frames at these times last, the last one as long as the others on average; 1 if all are at once."""
    return (times[-1] - times[0]) * len(times) / max(1, len(times) - 1) or 1.0


def _images(path: Path, stream: Any, container: Any, wanted: Sequence[int], count: int) -> tuple[Image, ...]:
    """The wanted frames, by their numbers in ascending order; `count` frames should be there."""
    places, images = set(wanted), []
    for number, frame in enumerate(container.decode(stream)):
        if number in places:
            images.append(in_rgb(frame.to_image()).rotate(frame.rotation, expand=True))
        if number == wanted[-1]:
            return tuple(images)
    raise MMTokError(f"{path} is damaged: only a part of its {count} frames can be decoded", "save or convert it again")


def _pyav() -> Any:
    """Raises MMTokError where PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise MMTokError(
            "reading video files needs PyAV, which is not installed",
            "pip install 'mmtok[video]', or give a folder of frames",
        ) from error
    return av
