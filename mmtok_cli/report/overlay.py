"""Which patches were kept, drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw, ImageEnhance, ImageFont
from PIL.Image import Image

from mmtok_cli.files import write_whole

FRAME = (255, 196, 0)
FIRST_FRAME = (230, 30, 60)
Box = tuple[float, float, float, float]


def overlay(
    image: Image,
    boxes: Sequence[Box],
    kept: Sequence[int],
    order: Sequence[int] | None,
    mark: int = 8,
    merged: Sequence[int] = (),
) -> Image:
    """The image with dropped patches dimmed and kept ones framed; the first `mark` picks carry their rank.

    boxes: pixels of the image that each vision token covers; what lies outside the image is padding. merged: those of
    `kept` that only stand for a token made of several patches; they are framed and stay dim.
    """
    large = enlarged(image)
    scale = large.width // image.width
    faded = ImageEnhance.Brightness(ImageEnhance.Color(large).enhance(0.25)).enhance(0.35)
    for index in kept:
        box = _clip(boxes[index], scale, large)
        if box and index not in merged:
            faded.paste(large.crop(box), box[:2])
    draw = ImageDraw.Draw(faded)
    width = max(1, max(large.size) // 480)
    for index in kept:
        box = _clip(boxes[index], scale, large)
        if box:
            draw.rectangle(_inner(box), outline=FRAME, width=width)
    for rank, index in enumerate(order[:mark] if order else (), start=1):
        box = _clip(boxes[index], scale, large)
        if box:
            _mark(draw, box, str(rank), width)
    return faded


def enlarged(image: Image) -> Image:
    """A copy of the image, a whole number of times as large, in which lines and letters are legible."""
    scale = max(1, round(720 / max(image.size)))
    return image.resize((image.width * scale, image.height * scale), PILImage.Resampling.BICUBIC)


def side_by_side(pictures: Sequence[Image]) -> Image:
    """Pictures of one size in a row, a gap between them."""
    width, height = pictures[0].size
    gap = max(1, width // 60)
    row = PILImage.new("RGB", (len(pictures) * (width + gap) - gap, height), "white")
    for number, picture in enumerate(pictures):
        row.paste(picture, (number * (width + gap), 0))
    return row


def stacked(rows: Sequence[Image]) -> Image:
    """Rows of pictures below each other, a gap between them."""
    gap = max(1, rows[0].height // 30)
    sheet = PILImage.new("RGB", (max(r.width for r in rows), sum(r.height + gap for r in rows) - gap), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


def captioned(picture: Image, caption: str) -> Image:
    """The picture with a caption in its upper left corner."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, picture.height / 14))
    box = draw.textbbox((0, 0), caption, font=font)
    draw.rectangle((0, 0, box[2] + box[3] / 2, box[3] * 1.3), fill="black")
    draw.text((box[3] / 4, 0), caption, fill="white", font=font)
    return picture


def save_image(image: Image, path: Path) -> None:
    """Write a picture in the format of its suffix."""
    kind = PILImage.registered_extensions()[path.suffix.lower()]
    write_whole(path, lambda part: image.save(part, format=kind))


def _clip(box: Box, scale: int, image: Image) -> tuple[int, int, int, int] | None:
    left, top = (max(0, round(v * scale)) for v in box[:2])
    right, bottom = min(image.width, round(box[2] * scale)), min(image.height, round(box[3] * scale))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _inner(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return box[0], box[1], box[2] - 1, box[3] - 1


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str, width: int) -> None:
    draw.rectangle(_inner(box), outline=FIRST_FRAME, width=2 * width)
    font = ImageFont.load_default(max(8, (box[3] - box[1]) * 0.6))
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.text(middle, text, fill="white", font=font, anchor="mm", stroke_width=2, stroke_fill=FIRST_FRAME)
