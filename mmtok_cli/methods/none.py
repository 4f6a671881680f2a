"""The floor: no vision token at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class NoVision(Method):
    """Keeps no vision token.

    What a model still answers rightly then, it did not need the image for; methods have been published that score
    below this floor (VisionZip at 8 tokens and fewer in MMTok's Table 21).
    """

    summary: ClassVar[str] = "no vision token"
    takes_budget: ClassVar[bool] = False

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        import torch

        return Selection(torch.empty(0, dtype=torch.int64, device=vision.projected.device))
