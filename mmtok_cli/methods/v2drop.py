"""V2Drop: tokens that the decoder layers hardly change are dropped (arXiv 2509.01552, CVPR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, highest, require_layers
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class V2Drop(Method):
    """Before each of `layers`, keeps the vision tokens that the layer before it moved farthest: by the Euclidean length
    of the difference between its input and its output. No attention is read, and not the question.

    The authors' schedule is fixed: a half of the tokens, a half of those, and in the end a single token (layers 3, 17
    and 22 of LLaVA-1.5; for Qwen2-VL layers 3, 16 and 22 with shares 0.25 and 0.05). A budget of 1 follows it: 288, 144
    and 1 of 576 tokens, 202.8 on average over 32 layers. A budget is the number of tokens after the last step. With a
    budget of all tokens no step would drop any: between 1 and all, the counts of the steps grow in proportion. `shares`
    is what the steps before the last keep at a budget of 1, each of the tokens that are left.

    As released: counts are rounded down and at least 1, positions are kept, and padding can be selected. Not as
    released: lengths are float32 in every data type, of equal ones the first token is kept, an image is found wherever
    it stands (the LLaVA code takes positions 35 to 610 for it), several images have a budget each, and batches work.
    """

    summary: ClassVar[str] = "tokens that layers move"
    source: ClassVar[str] = "arXiv 2509.01552"
    venue: ClassVar[str] = "CVPR 2026"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    positions: ClassVar[Positions] = "keep"
    keeps_padding: ClassVar[bool] = True

    layers: tuple[int, ...] = (3, 17, 22)
    shares: tuple[float, ...] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"v2drop.shares must be above 0 and up to 1, not {','.join(map(str, self.shares))}")

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        require_layers("v2drop.layers", self.layers, layers)
        if len(self.shares) != len(self.layers) - 1:
            raise MMTokError(
                f"v2drop.shares has {len(self.shares)} values for {len(self.layers)} layers",
                "give one share for each layer but the last, as in --set v2drop.layers=3,17,22 "
                "--set v2drop.shares=0.5,0.5",
            )
        if budget == total:
            return ()
        counts = self._counts(total, budget)
        return tuple(Cut(layer, keep, earlier=(layer - 1,)) for layer, keep in zip(self.layers, counts, strict=True))

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        return highest(moved(tokens.earlier[cut.before - 1], tokens.hidden), tokens.eligible, cut.keep)

    def _counts(self, total: int, budget: int) -> list[int]:
        """Tokens after each step, the last of them `budget`."""
        counts, left = [], total
        for share in self.shares:
            left = max(1, int(left * share))
            counts.append(max(budget, left + round((total - left) * (budget - 1) / (total - 1))))
        return [*counts, budget]


def moved(before: Tensor, after: Tensor) -> Tensor:
    """How far each token moves: [tokens]. before, after: [tokens, dim], what two adjacent layers are called with."""
    return (after.float() - before.float()).norm(dim=-1)
