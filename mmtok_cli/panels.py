"""A selection laid out over the panels of its image, for pictures and maps of what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from mmtok_cli.models.base import Panel, VisionLanguageModel
from mmtok_cli.pipeline import Reduced
from mmtok_cli.report.overlay import captioned, enlarged, overlay, side_by_side, stacked
from mmtok_cli.tokens import Selection
from mmtok_cli.video import Video, Visual, picture_of

SHEET = 1800  # pixels, width of the frames of a video side by side


@dataclass(frozen=True)
class Shown:
    """Cells of a panel: those that are kept, in the order of the picks where there is one, and those that only stand
    for a merged token."""

    panel: Panel
    kept: list[int]
    order: list[int] | None
    merged: list[int]


def lay_out(model: VisionLanguageModel, reduced: Reduced, selection: Selection) -> list[Shown]:
    """What is kept of the first image of a sample, panel by panel."""
    order = None if selection.order is None else selection.order.tolist()
    merged = [] if selection.merged is None else selection.indices[selection.merged].tolist()
    found = []
    for panel in model.panels(reduced.prompt.images[0], reduced.prompt.grids[0]):
        cell_of = {token: cell for cell, token in enumerate(panel.tokens)}
        kept, picks, hollow = (
            [cell_of[token] for token in tokens if token in cell_of]
            for tokens in (selection.places.tolist(), order or [], merged)
        )
        found.append(Shown(panel, kept, None if order is None else picks, hollow))
    return found


def draw(image: Visual, shown: list[Shown], mark: int = 8) -> Image:
    """The panels drawn over the image, side by side; the first `mark` picks are numbered.

    Of a video, a sheet of its slices in time, over the first frame of each.
    """
    if not isinstance(image, Video):
        return side_by_side([overlay(image, s.panel.boxes, s.kept, s.order, mark, s.merged) for s in shown])
    frames = [overlay(picture_of(image, s.panel.frame), s.panel.boxes, s.kept, None, 0, s.merged) for s in shown]
    return _sheet([captioned(frame, s.panel.title) for frame, s in zip(frames, shown, strict=True)])


def unreduced(image: Visual) -> Image:
    """A copy of the image, or a sheet of all frames of a video with their times."""
    if not isinstance(image, Video):
        return image.copy()
    frames = image.frames
    return _sheet([captioned(enlarged(each), frames.title(number)) for number, each in enumerate(frames.images)])


def _sheet(pictures: Sequence[Image]) -> Image:
    """Pictures of one size in rows, which together are about as wide as high."""
    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures) * height / width))
    most = max(1, SHEET // columns)
    for picture in pictures:
        picture.thumbnail((most, most * height // width))
    return stacked([side_by_side(pictures[first : first + columns]) for first in range(0, len(pictures), columns)])
