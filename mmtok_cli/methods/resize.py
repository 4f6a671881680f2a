"""A smaller image: the baseline that saves encoder time as well."""

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method


@dataclass(frozen=True)
class Resize(Method):
    """Encodes the image at a lower resolution. VTC-Bench (arXiv 2510.07143) found plain down-sampling ahead of many
    methods.

    An encoder of fixed size interpolates its position embeddings, so that the budget is met exactly, or refused with
    the nearest that makes a rectangle; LLaVA-NeXT sees the image in one piece then. One of native resolution (Qwen)
    gets an image of its own kind: as many tokens as fit under the budget without distorting the image much, 85 % of it
    or more.
    """

    summary: ClassVar[str] = "a smaller image"
    source: ClassVar[str] = "arXiv 2510.07143"
    acts: ClassVar[str] = "before the encoder"

    def resize(self, total: int, budget: int) -> int | None:
        return budget if budget < total else None
