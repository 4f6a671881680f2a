"""PyramidDrop: vision tokens are dropped in several steps, layer by layer (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, attention_at, highest, require_layers
from mmtok_cli.tokens import Cut, LayerTokens, Selection


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Before each of `layers`, keeps the vision tokens to which the last token of the prompt attends most in that
    layer, averaged over the heads. The authors keep a half of all vision tokens, then a quarter, then an eighth, each
    rounded down; a budget of an eighth does the same: 50, 25 and 12 of 100 tokens. Other budgets are reached in steps
    that keep equal shares.

    As released: the attention is that of the layer about to run (its norm, queries, keys and positions applied to its
    input), each shorter sequence is renumbered and decoding continues from its end, and padding can be selected. Not as
    released: budgets other than an eighth, and batches. The authors also train with it; here it is used for inference
    only.
    """

    summary: ClassVar[str] = "fastv in three steps"
    source: ClassVar[str] = "arXiv 2410.17247"
    venue: ClassVar[str] = "CVPR 2025"
    licence: ClassVar[str] = "MIT"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True

    layers: tuple[int, ...] = (8, 16, 24)

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        require_layers("pyramiddrop.layers", self.layers, layers)
        if budget == total:
            return ()
        steps = len(self.layers)
        counts = [int(total * 0.5**step) for step in range(1, steps + 1)]
        if counts[-1] != budget:
            share = (budget / total) ** (1 / steps)
            counts = [*(round(total * share**step) for step in range(1, steps)), budget]
        return tuple(Cut(layer, keep, reads=layer) for layer, keep in zip(self.layers, counts, strict=True))

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        return highest(attention_at(tokens).mean((0, 1)), tokens.eligible, cut.keep)
