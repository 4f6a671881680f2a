"""No vision token at all: a lower bound of the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class NoVision(Method):
    """Keeps no vision token.

    The score that a model reaches without the image. Published methods can fall below it (VisionZip at 8 tokens and
    fewer in MMTok's Table 21).
    """

    summary: ClassVar[str] = "no vision token"
    takes_budget: ClassVar[bool] = False

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        import torch

        return Selection(torch.empty(0, dtype=torch.int64, device=vision.projected.device))
