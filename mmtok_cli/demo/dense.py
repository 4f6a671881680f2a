"""Dense pictures: pages of words and numbers, bar charts and fields of dots. `dense_drawing.py` draws them.

Unlike in scenes, what a question asks for may be in any of a hundred patches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmtok_cli.demo.scenes import COLOURS, IMAGE_SIZE, Split, generator

Layout = Literal["page", "chart", "dots"]
LAYOUTS: tuple[Layout, ...] = ("page", "chart", "dots")

WORDS = ("cat", "dog", "sun", "bus", "key", "map", "fox", "hat", "jam", "leg", "nut", "oil", "pen", "tea", "van", "wig")
ROWS = ("one", "two", "three", "four", "five", "six")
SIDES = ("left", "right")

LARGEST_VALUE = 8  # of a bar
_BARS = (5, 6)
_UNIT = 36  # pixels by which a bar of the next value is taller
_SLOTS = 8  # dots stand in a jittered grid of this many rows and columns
_LARGEST_GROUP = (17, 24)  # dots of the most frequent colour
_SHRINK = (0.5, 0.65)  # each further colour has this share of the dots of the one before

_PURPOSES: dict[Layout, int] = {"page": 11, "chart": 12, "dots": 13}


@dataclass(frozen=True)
class Entry:
    """A word with the number beside it. `word_at` is the middle of the word's left edge, `number_at` the middle of the
    number, both (x, y) in pixels; `row` and `side` are indices in `ROWS` and `SIDES`."""

    word: str
    number: int
    row: int
    side: int
    word_at: tuple[int, int]
    number_at: tuple[int, int]


@dataclass(frozen=True)
class Page:
    """Two columns of words, each with a number beside it. `font` is the size of the letters in pixels."""

    seed: int
    split: Split
    entries: tuple[Entry, ...]
    font: int
    size: int = IMAGE_SIZE
    layout: Literal["page"] = "page"


@dataclass(frozen=True)
class Bar:
    """A coloured bar. `box` is (left, top, right, bottom) in pixels."""

    colour: str
    value: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Chart:
    """Bars of different colours and different values on a common base line."""

    seed: int
    split: Split
    bars: tuple[Bar, ...]
    size: int = IMAGE_SIZE
    layout: Literal["chart"] = "chart"


@dataclass(frozen=True)
class Dot:
    """A small disc; `centre` (x, y) and `radius` in pixels."""

    colour: str
    centre: tuple[int, int]
    radius: int


@dataclass(frozen=True)
class Dots:
    """Many dots of few colours, no two of which are equally frequent."""

    seed: int
    split: Split
    dots: tuple[Dot, ...]
    size: int = IMAGE_SIZE
    layout: Literal["dots"] = "dots"

    @property
    def counts(self) -> dict[str, int]:
        """How many dots each colour has, the most frequent first."""
        return dict(Counter(dot.colour for dot in self.dots).most_common())


DensePicture = Page | Chart | Dots


def make_dense(layout: Layout, seed: int, split: Split = "eval") -> DensePicture:
    """The 336 px picture of this layout and seed."""
    rng = generator(split, seed, _PURPOSES[layout])
    if layout == "page":
        return _make_page(rng, seed, split)
    return _make_chart(rng, seed, split) if layout == "chart" else _make_dots(rng, seed, split)


def _make_page(rng: np.random.Generator, seed: int, split: Split) -> Page:
    words = rng.permutation(len(WORDS))
    pitch, top = int(rng.integers(49, 54)), int(rng.integers(28, 40))
    shift = int(rng.integers(-6, 7))
    entries: list[Entry] = []
    for row in range(len(ROWS)):
        for side in range(len(SIDES)):
            left = 20 + 164 * side + shift + int(rng.integers(-3, 4))
            y = top + pitch * row + int(rng.integers(-2, 3))
            word = WORDS[words[len(entries)]]
            number_at = (left + 88 + int(rng.integers(-4, 5)), y)
            entries.append(Entry(word, int(rng.integers(10)), row, side, (left, y), number_at))
    return Page(seed, split, tuple(entries), font=int(rng.integers(22, 26)))


def _make_chart(rng: np.random.Generator, seed: int, split: Split) -> Chart:
    count = int(rng.integers(_BARS[0], _BARS[1] + 1))
    colours = rng.permutation(list(COLOURS))[:count]
    values = 1 + rng.permutation(LARGEST_VALUE)[:count]
    pitch, base = 312 // count, int(rng.integers(313, 320))
    bars = []
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        width = int(rng.integers(28, 37))
        left = 12 + i * pitch + int(rng.integers(2, pitch - width))
        bars.append(Bar(str(colour), int(value), (left, base - int(value) * _UNIT, left + width, base)))
    return Chart(seed, split, tuple(bars))


def _make_dots(rng: np.random.Generator, seed: int, split: Split) -> Dots:
    colours = rng.permutation(list(COLOURS))[: int(rng.integers(3, 5))]
    counts = [int(rng.integers(_LARGEST_GROUP[0], _LARGEST_GROUP[1] + 1))]
    for _ in colours[1:]:
        counts.append(round(counts[-1] * rng.uniform(*_SHRINK)))
    shown = [str(colour) for colour, count in zip(colours, counts, strict=True) for _ in range(count)]
    places = rng.permutation(_SLOTS * _SLOTS)[: len(shown)]
    edge = IMAGE_SIZE // _SLOTS
    dots = []
    for colour, place in zip(shown, places, strict=True):
        radius = int(rng.integers(9, 13))
        x, y = (edge * int(at) + int(rng.integers(radius + 1, edge - radius)) for at in divmod(int(place), _SLOTS))
        dots.append(Dot(colour, (x, y), radius))
    return Dots(seed, split, tuple(dots))
