"""A method as a user of mmtok would add it: tokens that repeat a few pivots are dropped, after arXiv 2502.11494."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmtok_cli.methods.base import Method, highest
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class Unlike(Method):
    """Takes the tokens of largest norm as pivots, then drops the tokens that are most similar to one of them.

    Simplified from the paper, which drops tokens inside the language model.
    """

    summary: ClassVar[str] = "tokens unlike the pivots"
    source: ClassVar[str] = "arXiv 2502.11494"

    pivots: int = 4

    def __post_init__(self) -> None:
        if self.pivots < 1:
            raise ValueError(f"pivots must be 1 or more, not {self.pivots}")

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        tokens = vision.projected.float()
        pivots = highest(tokens.norm(dim=-1), vision.eligible, min(self.pivots, budget)).indices
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        similarity = (unit @ unit[pivots].T).amax(-1)
        return highest((-similarity).index_fill(0, pivots, 2.0), vision.eligible, budget)
