"""A smaller image: the baseline that saves encoder time as well."""

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.budget import rectangle
from mmtok_cli.methods.base import Method


@dataclass(frozen=True)
class Resize(Method):
    """Encodes the image at a lower resolution that yields exactly the budget (an encoder of fixed size interpolates
    its position embeddings). VTC-Bench (arXiv 2510.07143) found plain down-sampling ahead of many methods.
    """

    summary: ClassVar[str] = "a smaller image"
    source: ClassVar[str] = "arXiv 2510.07143"
    acts: ClassVar[str] = "before the encoder"

    def resize(self, grid: tuple[int, int], budget: int, aspect: float) -> tuple[int, int]:
        return rectangle(budget, grid, aspect)
