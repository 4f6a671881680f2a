"""Random tokens: the control that a method should beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method, highest, random_scores, require_layers
from mmtok_cli.methods.fastv import FastV
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection, TextTokens, VisionTokens
from mmtok_cli.values import to_device


@dataclass(frozen=True)
class Random(Method):
    """Draws the budget uniformly without replacement from the tokens that are not padding.

    The draw depends only on the seed and the name of the image, so it is the same in any order and batch and on any
    device.
    """

    summary: ClassVar[str] = "tokens drawn at random"
    nested: ClassVar[bool] = True
    per_crop: ClassVar[bool] = True

    seed: int = 0

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        if budget == vision.total:
            return Selection.everything(vision)
        scores = to_device(random_scores(self.seed, vision.image_id, vision.total), vision.projected.device)
        return highest(scores, vision.eligible, budget)


@dataclass(frozen=True)
class RandomInside(Method):
    """Draws as `random` does, but after `layer` decoder layers have seen every token: the control for FastV, at the
    same place and with the same bookkeeping.
    """

    summary: ClassVar[str] = "random, inside the LM"
    positions: ClassVar[Positions] = "keep"

    layer: int = 2
    seed: int = 0

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        return FastV().count(share, total, signals)

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        require_layers("random:inside.layer", (self.layer,), layers)
        return (Cut(self.layer, budget),) if budget < total else ()

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        scores = to_device(random_scores(self.seed, tokens.image_id, len(tokens.eligible)), tokens.hidden.device)
        return highest(scores, tokens.eligible, cut.keep)
