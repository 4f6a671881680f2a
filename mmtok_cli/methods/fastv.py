"""FastV: the last token's attention in an early layer decides what the later layers see (arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method, attention_at, highest, require_layers
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection


@dataclass(frozen=True)
class FastV(Method):
    """Runs `layer` decoder layers (K in the paper) on every token, then keeps the vision tokens to which the last token
    of the prompt attends most in the last of these layers, on average over the heads.

    As released: the attention is that of the last token alone, where the paper's text averages over all; kept tokens
    stay at their positions, padding competes for the budget, and a share of an image's tokens is rounded to the nearest
    whole number, halves to the even one. Not as released: several images each keep a budget of their own (their code
    knows one image), batches are served, and attention runs under any kernel, since the one row is computed by hand.
    The budget is what the layers behind see; the layer average is printed beside it.
    """

    summary: ClassVar[str] = "last token's attention"
    source: ClassVar[str] = "arXiv 2403.06764"
    acts: ClassVar[str] = "inside the language model"
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
