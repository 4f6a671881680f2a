"""FastV: the last token's attention in an early layer decides what the later layers see (arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, attention_at, highest, require_layers
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection


@dataclass(frozen=True)
class FastV(Method):
    """Runs `layer` decoder layers (K in the paper) on every token, then keeps the vision tokens to which the last token
    of the prompt attends most in the last of these layers, averaged over the heads.

    As released: only the attention of the last token counts, where the paper averages over all; kept tokens keep their
    positions, padding can be selected, and a percentage is rounded to the nearest whole number (halves to even). Not as
    released: several images have a budget each (the authors' code takes one image), batches work, and any attention
    kernel does, because the row of attention is computed separately. The budget is the number of tokens in the later
    layers; the layer average is printed next to it.
    """

    summary: ClassVar[str] = "last token's attention"
    source: ClassVar[str] = "arXiv 2403.06764"
    venue: ClassVar[str] = "ECCV 2024"
    licence: ClassVar[str] = "no licence file"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    positions: ClassVar[Positions] = "keep"
    keeps_padding: ClassVar[bool] = True

    layer: int = 2

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        removed = 1 - share  # what their parameter says; halves fall as they do in their arithmetic
        return round(total * (1 - removed))

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        require_layers("fastv.layer", (self.layer,), layers)
        return (Cut(self.layer, budget, reads=self.layer - 1),) if budget < total else ()

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        return highest(attention_at(tokens).mean((0, 1)), tokens.eligible, cut.keep)
