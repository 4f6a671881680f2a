"""What the patches of training pictures show."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw

from mmtok_cli.demo.architecture import GRID, PATCH_SIZE
from mmtok_cli.demo.dense import WORDS, Chart, DensePicture, Dots, Page
from mmtok_cli.demo.dense_drawing import Box, number_box, word_box
from mmtok_cli.demo.drawing import digit_box, outline
from mmtok_cli.demo.scenes import COLOURS, PAIRS, SHAPES, Scene

IGNORE = -100
ATTRIBUTES = (*COLOURS, *SHAPES)
GROUPS = (len(COLOURS) + 1) * (len(SHAPES) + 1)  # of patches that show the same; one more for those that are unsure

_COLOUR_INDEX = {name: i + 1 for i, name in enumerate(COLOURS)}
_SHAPE_INDEX = {name: i + 1 for i, name in enumerate(SHAPES)}


@dataclass
class Labels:
    """What the patches of one picture show, arrays `[n]` named as in `Batch`; at first, a picture without anything."""

    colours: np.ndarray
    shapes: np.ndarray
    digits: np.ndarray
    words: np.ndarray
    rows: np.ndarray
    sides: np.ndarray
    groups: np.ndarray
    centres: np.ndarray
    present: np.ndarray

    @classmethod
    def empty(cls, patches: int) -> Labels:
        background, unknown = np.zeros(patches, dtype=np.int64), np.full(patches, IGNORE, dtype=np.int64)
        return cls(
            colours=background.copy(),
            shapes=background.copy(),
            digits=unknown.copy(),
            words=background.copy(),
            rows=unknown.copy(),
            sides=unknown.copy(),
            groups=background.copy(),
            centres=np.zeros(patches, dtype=np.float32),
            present=np.zeros(len(ATTRIBUTES) + len(PAIRS) + len(WORDS), dtype=np.float32),
        )

    def part(self, window: np.ndarray) -> Labels:
        """Those of some patches of a page; of its words, only theirs are present."""
        found = {field.name: getattr(self, field.name)[window] for field in fields(self) if field.name != "present"}
        present = np.zeros_like(self.present)
        words = found["words"]
        present[len(ATTRIBUTES) + len(PAIRS) - 1 + np.unique(words[words > 0])] = 1
        return Labels(**found, present=present)

    def contain(self, colour: str, shape: str | None = None) -> None:
        """Notes that the picture contains a colour, or an object of a colour and a shape."""
        self.present[ATTRIBUTES.index(colour)] = 1
        if shape is not None:
            self.present[ATTRIBUTES.index(shape)] = 1
            self.present[len(ATTRIBUTES) + PAIRS.index((colour, shape))] = 1


def scene_labels(scene: Scene, grid: int) -> Labels:
    """What the patches of a scene show. A patch barely touched is ignored, and so is what words objects could be."""
    owners = Image.new("L", (scene.size, scene.size))
    canvas = ImageDraw.Draw(owners)
    for i, item in enumerate(scene.objects):
        canvas.polygon(outline(item), fill=i + 1)
    cells = np.asarray(owners).reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).swapaxes(1, 2).reshape(grid * grid, -1)
    slots = len(scene.objects) + 1
    counts = np.bincount((np.arange(grid * grid)[:, None] * slots + cells).ravel(), minlength=grid * grid * slots)
    share = counts.reshape(grid * grid, slots)[:, 1:] / PATCH_SIZE**2
    owner, largest = share.argmax(1), share.max(1)
    known, touched = largest >= 0.3, largest > 0.02

    def spread(values: list[int]) -> np.ndarray:
        return np.where(known, np.array(values)[owner], np.where(touched, IGNORE, 0))

    labels = Labels.empty(grid * grid)
    digits = labels.digits.reshape(grid, grid)
    for item in scene.objects:
        x, y = (value // PATCH_SIZE for value in item.centre)
        labels.centres[y * grid + x] = 1
        labels.contain(item.colour, item.shape)
        if item.digit is not None:
            left, top, right, bottom = (round(value / PATCH_SIZE) for value in digit_box(item))
            digits[top : max(bottom, top + 1), left : max(right, left + 1)] = item.digit
    labels.colours = spread([_COLOUR_INDEX[item.colour] for item in scene.objects])
    labels.shapes = spread([_SHAPE_INDEX[item.shape] for item in scene.objects])
    labels.words = np.where(labels.colours == 0, 0, IGNORE)
    # One group for the background, one for each object, and the last for patches whose label is unsure.
    unsure = labels.colours == IGNORE
    labels.groups = np.where(unsure, GROUPS, labels.colours * (len(SHAPES) + 1) + labels.shapes)
    return labels


def dense_labels(picture: DensePicture) -> Labels:
    labels = Labels.empty(GRID * GRID)
    if isinstance(picture, Page):
        _label_page(picture, labels)
    elif isinstance(picture, Chart):
        _label_chart(picture, labels)
    else:
        _label_dots(picture, labels)
    return labels


def _label_page(page: Page, labels: Labels) -> None:
    """Words and numbers by their boxes. The patches of a number are also labelled with the word that it is beside."""
    for i, entry in enumerate(page.entries):
        for j, box in enumerate((word_box(page, entry), number_box(page, entry))):
            known = _cover(labels, box, group=1 + 2 * i + j, least=0.25)
            labels.colours[known] = labels.shapes[known] = IGNORE
            labels.words[known] = 1 + WORDS.index(entry.word)
            labels.rows[known], labels.sides[known] = entry.row, entry.side
            if j:
                labels.digits[known] = entry.number
        labels.present[len(ATTRIBUTES) + len(PAIRS) + WORDS.index(entry.word)] = 1


def _label_chart(chart: Chart, labels: Labels) -> None:
    """Bars have a colour and no shape; the upper end of a bar is labelled with its value."""
    for i, bar in enumerate(chart.bars):
        known = _cover(labels, bar.box, group=1 + i, least=0.3)
        labels.colours[known], labels.shapes[known] = _COLOUR_INDEX[bar.colour], IGNORE
        rows = np.flatnonzero(known) // GRID
        labels.digits[np.flatnonzero(known)[rows == rows.min()]] = bar.value
        labels.contain(bar.colour)


def _label_dots(picture: Dots, labels: Labels) -> None:
    """Dots are circles, all of them in one group."""
    for dot in picture.dots:
        (x, y), reach = dot.centre, dot.radius * 0.89  # the square of the same area
        known = _cover(labels, (x - reach, y - reach, x + reach, y + reach), group=1, least=0.3)
        labels.colours[known], labels.shapes[known] = _COLOUR_INDEX[dot.colour], _SHAPE_INDEX["circle"]
        labels.centres[y // PATCH_SIZE * GRID + x // PATCH_SIZE] = 1
        labels.contain(dot.colour, "circle")


def _cover(labels: Labels, box: Box, group: int, least: float) -> np.ndarray:
    """Which patches show the box in at least a share `least` of their area, bool `[n]`; they join the group. Patches
    that it barely touches are left out of all labels."""
    edges = np.arange(GRID + 1) * PATCH_SIZE
    left, top, right, bottom = box
    columns = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None)
    rows = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None)
    share = np.outer(rows, columns).ravel() / PATCH_SIZE**2
    known = share >= least
    touched = ~known & (share > 0.02) & ((labels.groups == 0) | (labels.groups == GROUPS))
    labels.groups[known], labels.groups[touched] = group, GROUPS
    for array in (labels.colours, labels.shapes, labels.words):
        array[touched] = IGNORE
    labels.words[known] = IGNORE
    return known
