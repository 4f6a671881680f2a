"""Questions about dense pictures, with exact answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from mmtok_cli.demo.dense import (
    LARGEST_VALUE,
    LAYOUTS,
    ROWS,
    SIDES,
    WORDS,
    Chart,
    DensePicture,
    Dots,
    Layout,
    Page,
    make_dense,
)
from mmtok_cli.demo.scenes import COLOURS, generator

DenseKind = Literal["cell", "beside", "value", "extreme", "majority", "comparison"]
Item = TypeVar("Item")
DENSE_KINDS: tuple[DenseKind, ...] = ("cell", "beside", "value", "extreme", "majority", "comparison")
KINDS_OF: dict[Layout, tuple[DenseKind, DenseKind]] = {
    "page": ("cell", "beside"),
    "chart": ("value", "extreme"),
    "dots": ("majority", "comparison"),
}

# The first phrase of each kind is the one that evaluation uses; training uses all of them.
DENSE_PHRASES: dict[DenseKind, tuple[str, ...]] = {
    "cell": (
        "Which word is in row {row} on the {side}?",
        "What word is in row {row} on the {side}?",
        "Which word is on the {side} in row {row}?",
    ),
    "beside": (
        "What number is beside {word}?",
        "Which number is next to {word}?",
        "What number is next to the word {word}?",
    ),
    "value": (
        "What is the value of the {colour} bar?",
        "What value does the {colour} bar have?",
        "How high is the {colour} bar?",
    ),
    "extreme": (
        "Which bar is the {extreme}?",
        "What color is the {extreme} bar?",
        "Which color does the {extreme} bar have?",
    ),
    "majority": (
        "Which color do most dots have?",
        "What color do most of the dots have?",
        "Which color has the most dots?",
    ),
    "comparison": (
        "Are there more {first} or {second} dots?",
        "Are there more {first} dots or {second} dots?",
        "Do you see more {first} or {second} dots?",
    ),
}
EXTREMES = ("tallest", "shortest")
DENSE_CHOICES: dict[DenseKind, tuple[str, ...]] = {
    "cell": WORDS,
    "beside": tuple(str(n) for n in range(10)),
    "value": tuple(str(n) for n in range(1, LARGEST_VALUE + 1)),
    "extreme": tuple(COLOURS),
    "majority": tuple(COLOURS),
    "comparison": tuple(COLOURS),
}


@dataclass(frozen=True)
class DenseQuestion:
    """A question with its one-word answer."""

    picture: DensePicture
    kind: DenseKind
    text: str
    answer: str
    choices: tuple[str, ...]


def dense_held_out(count: int = 600, seed: int = 0) -> list[DenseQuestion]:
    """The first `count` questions of an endless list, two on each picture.

    Any six consecutive questions hold every kind once and show six pictures: two pages, two charts, two fields of dots.
    """
    return list(itertools.islice(_endless(seed), count))


def _endless(seed: int) -> Iterator[DenseQuestion]:
    for block in itertools.count():
        first = (seed * 1_000_003 + block) * 2
        pairs = {layout: tuple(make_dense(layout, first + i) for i in (0, 1)) for layout in LAYOUTS}
        for turn in (0, 1):
            for layout, pictures in pairs.items():
                for place, kind in enumerate(KINDS_OF[layout]):
                    picture = pictures[(turn + place) % 2]
                    rng = generator("eval", picture.seed, purpose=20 + DENSE_KINDS.index(kind))
                    values, answer = ask_dense(picture, kind, rng)
                    text = DENSE_PHRASES[kind][0].format(**values)
                    yield DenseQuestion(picture, kind, text, answer, DENSE_CHOICES[kind])


# The words of a question, and its answer.
Asked = tuple[dict[str, str], str]


def ask_dense(picture: DensePicture, kind: DenseKind, rng: np.random.Generator) -> Asked:
    """A random question of this kind about the picture."""
    return _ASK[kind](picture, rng)


def _cell(page: Page, rng: np.random.Generator) -> Asked:
    entry = _choose(page.entries, rng)
    return {"row": ROWS[entry.row], "side": SIDES[entry.side]}, entry.word


def _beside(page: Page, rng: np.random.Generator) -> Asked:
    """Each number on the page is equally likely, however often it occurs."""
    number = _choose(sorted({entry.number for entry in page.entries}), rng)
    entry = _choose([entry for entry in page.entries if entry.number == number], rng)
    return {"word": entry.word}, str(number)


def _value(chart: Chart, rng: np.random.Generator) -> Asked:
    bar = _choose(chart.bars, rng)
    return {"colour": bar.colour}, str(bar.value)


def _extreme(chart: Chart, rng: np.random.Generator) -> Asked:
    ranked = sorted(chart.bars, key=lambda bar: bar.value)
    extreme = _choose(EXTREMES, rng)
    return {"extreme": extreme}, ranked[-1 if extreme == "tallest" else 0].colour


def _majority(picture: Dots, _: np.random.Generator) -> Asked:
    return {}, next(iter(picture.counts))


def _comparison(picture: Dots, rng: np.random.Generator) -> Asked:
    counts = picture.counts
    first, second = rng.permutation(list(counts))[:2].tolist()
    return {"first": first, "second": second}, max(first, second, key=counts.__getitem__)


def _choose(items: Sequence[Item], rng: np.random.Generator) -> Item:
    return items[int(rng.integers(len(items)))]


_ASK: dict[DenseKind, Callable[..., Asked]] = {
    "cell": _cell,
    "beside": _beside,
    "value": _value,
    "extreme": _extreme,
    "majority": _majority,
    "comparison": _comparison,
}
