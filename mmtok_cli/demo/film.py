"""A short video of moving shapes, about which questions have exact answers.

`python -m mmtok_cli.demo.film DIRECTORY` writes example.mp4 and example_video.jsonl, which are part of the package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmtok_cli.demo.drawing import draw
from mmtok_cli.demo.scenes import Scene, SceneObject

FPS, SECONDS, SIZE = 12, 4, 224
QUESTIONS = (
    ("Which shape moves to the right?", "circle", "motion"),
    ("Which shape moves up?", "square", "motion"),
    ("What color is the shape that does not move?", "green", "colour"),
    ("What digit is on the star that appears for a second?", "7", "event"),
    ("How many shapes are there in the last frame?", "3", "count"),
)


def frame(time: float) -> Image.Image:
    """The picture at a time in seconds: a circle moves right, a square up, a triangle stays, a star is there for a
    second."""
    part = time / SECONDS
    objects = [
        SceneObject("circle", "red", None, (round(30 + 160 * part), 48), 22),
        SceneObject("square", "blue", None, (186, round(190 - 90 * part)), 22),
        SceneObject("triangle", "green", None, (110, 120), 20),
    ]
    if 1.5 <= time < 2.5:
        objects.append(SceneObject("star", "yellow", 7, (46, 172), 30))
    return draw(Scene(seed=7, split="eval", size=SIZE, objects=tuple(objects)))


def frames() -> list[Image.Image]:
    """All frames of the video, in their order."""
    return [frame(number / FPS) for number in range(FPS * SECONDS)]


def write(directory: Path) -> None:
    """Write the video (needs PyAV) and its questions."""
    import av

    with av.open(str(directory / "example.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "26", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for image in frames():
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    lines = [{"video": "example.mp4", "question": q, "answer": answer, "kind": kind} for q, answer, kind in QUESTIONS]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "example_video.jsonl").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    write(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
