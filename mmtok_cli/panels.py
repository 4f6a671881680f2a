"""A selection laid out over the panels of its image, for pictures and maps of what is kept."""

from __future__ import annotations

from dataclasses import dataclass

from PIL.Image import Image

from mmtok_cli.models.base import Panel, VisionLanguageModel
from mmtok_cli.pipeline import Reduced
from mmtok_cli.report.overlay import overlay, side_by_side
from mmtok_cli.tokens import Selection


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


def draw(image: Image, shown: list[Shown], mark: int = 8) -> Image:
    """The panels drawn over the image, side by side; the first `mark` picks are numbered."""
    return side_by_side([overlay(image, s.panel.boxes, s.kept, s.order, mark, s.merged) for s in shown])
