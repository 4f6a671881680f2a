"""Random tokens: the control that a method has to beat."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from mmtok_cli.methods.base import Method, require_eligible
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class Random(Method):
    """Draws the budget uniformly without replacement from the tokens that are not padding.

    The draw depends on the seed and on the image's name alone, so it is the same in any order, batch and device.
    """

    summary: ClassVar[str] = "tokens drawn at random: the control"

    seed: int = 0

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        if budget == vision.total:
            return Selection.everything(vision)
        require_eligible(vision, budget)
        key = f"{self.seed}:{vision.image_id}".encode(errors="surrogateescape")
        generator = torch.Generator().manual_seed(zlib.crc32(key))
        candidates = vision.eligible.nonzero().squeeze(1)
        drawn = torch.randperm(candidates.shape[0], generator=generator)[:budget].to(candidates.device)
        order = candidates[drawn]
        return Selection(order.sort().values, order=order)
