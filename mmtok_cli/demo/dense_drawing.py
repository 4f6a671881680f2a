"""From a dense picture to its pixels, with NumPy and Pillow only."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mmtok_cli.demo.dense import Chart, DensePicture, Dots, Entry, Page
from mmtok_cli.demo.drawing import background, font
from mmtok_cli.demo.scenes import COLOURS, Split, generator

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_SMOOTH = 3  # dots are drawn this much larger and averaged down
_LINE = (16, 16, 16)
_BOLD = 1  # stroke of letters, in pixels beyond the font's


def draw_dense(picture: DensePicture) -> Image.Image:
    """The picture, 336 x 336 RGB."""
    if isinstance(picture, Page):
        return _draw_page(picture)
    image = Image.fromarray(background(picture.split, picture.seed, picture.size))
    return _draw_chart(picture, image) if isinstance(picture, Chart) else _draw_dots(picture, image)


def word_box(page: Page, entry: Entry) -> Box:
    """Where an entry's word is."""
    return _text_box(page, entry.word_at, entry.word.upper(), "lm")


def number_box(page: Page, entry: Entry) -> Box:
    """Where an entry's number is."""
    return _text_box(page, entry.number_at, str(entry.number), "mm")


def _text_box(page: Page, at: tuple[int, int], text: str, anchor: str) -> Box:
    left, top, right, bottom = font(page.font).getbbox(text, anchor=anchor, stroke_width=_BOLD)
    return at[0] + left, at[1] + top, at[0] + right, at[1] + bottom


def paper(split: Split, seed: int, size: int) -> np.ndarray:
    """A light version of the background of this seed, uint8 `[size, size, 3]`."""
    texture = background(split, seed, size).astype(np.float32)
    light = generator(split, seed, purpose=14).uniform(205, 240)
    return np.clip(light + (texture - texture.mean()) * 0.5, 180, 255).astype(np.uint8)


def _draw_page(page: Page) -> Image.Image:
    image = Image.fromarray(paper(page.split, page.seed, page.size))
    canvas = ImageDraw.Draw(image)
    rng = generator(page.split, page.seed, purpose=15)
    red, green, blue = (int(value) for value in rng.integers(0, 60, size=3))
    for entry in page.entries:
        for at, text, anchor in ((entry.word_at, entry.word.upper(), "lm"), (entry.number_at, str(entry.number), "mm")):
            canvas.text(
                at,
                text,
                fill=(red, green, blue),
                font=font(page.font),
                anchor=anchor,
                stroke_width=_BOLD,
                stroke_fill=(red, green, blue),
            )
    return image


def _draw_chart(chart: Chart, image: Image.Image) -> Image.Image:
    canvas = ImageDraw.Draw(image)
    for bar in chart.bars:
        left, top, right, bottom = bar.box
        canvas.rectangle((left, top, right - 1, bottom - 1), fill=COLOURS[bar.colour])
    base = chart.bars[0].box[3]
    canvas.line((4, base, chart.size - 5, base), fill=_LINE, width=3)
    return image


def _draw_dots(picture: Dots, image: Image.Image) -> Image.Image:
    for dot in picture.dots:
        reach = dot.radius + 1
        edge = 2 * reach * _SMOOTH
        mask = Image.new("L", (edge, edge))
        ImageDraw.Draw(mask).ellipse((_SMOOTH, _SMOOTH, edge - _SMOOTH - 1, edge - _SMOOTH - 1), fill=255)
        image.paste(COLOURS[dot.colour], (dot.centre[0] - reach, dot.centre[1] - reach), mask.reduce(_SMOOTH))
    return image
