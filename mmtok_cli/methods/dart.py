"""DART: tokens that repeat others are dropped after a few decoder layers (arXiv 2502.11494, EMNLP 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import DESCRIPTION_ONLY, Method, known, ranking, require_layers
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection

if TYPE_CHECKING:
    from torch import Tensor


MOST_PIVOTS = 10_000


@dataclass(frozen=True)
class DART(Method):
    """Runs `layer` decoder layers on every token. Pivots are the `image_pivots` vision tokens and the `text_pivots`
    tokens of the text after the image whose keys in the last of these layers have the largest sum of absolute values.
    The vision tokens that are pivots stay; each pivot in turn keeps an equal share of the others, those least similar
    to it (cosine of the layer's output behind the model's last norm).

    The authors' setting B keeps 8 floor(B / 8) + 4 tokens with 4 + 4 pivots; here a budget is the number of tokens that
    are kept, and a budget of 68 does what their 64 does. What cannot be shared evenly goes to the first pivots.

    Written from descriptions and copies of the authors' code, without outputs of it to compare with. As released:
    positions are kept and padding can be selected. Not as released: pivots take turns by descending size, vision tokens
    first, where the authors' order is that of a Python set of positions; a budget below the pivots keeps the first of
    them; several images have a budget each, and batches work.
    """

    summary: ClassVar[str] = "tokens unlike the pivots"
    source: ClassVar[str] = "arXiv 2502.11494"
    venue: ClassVar[str] = "EMNLP 2025"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = DESCRIPTION_ONLY
    reads_question: ClassVar[bool] = True
    positions: ClassVar[Positions] = "keep"
    keeps_padding: ClassVar[bool] = True

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.image_pivots <= MOST_PIVOTS or not 0 <= self.text_pivots <= MOST_PIVOTS:
            raise ValueError(f"dart.image_pivots must be 1 to {MOST_PIVOTS}, and dart.text_pivots 0 to {MOST_PIVOTS}")

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        require_layers("dart.layer", (self.layer,), layers)
        return (Cut(self.layer, budget, reads=self.layer - 1, rows="none"),) if budget < total else ()

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        import torch

        of_image, of_text = (keys.float().abs().sum((0, 2)) for keys in known(tokens.keys, "keys")())
        pivots = ranking(of_image, tokens.eligible)[: min(self.image_pivots, cut.keep)]
        words = of_text.argsort(descending=True, stable=True)[: self.text_pivots]
        norm = known(tokens.norm, "norm")
        states, text = norm(tokens.hidden), norm(known(tokens.text, "text")()[words])
        order = unlike(states, torch.cat([states[pivots], text]), pivots, tokens.eligible, cut.keep)
        return Selection(order.sort().values, order=order)


def unlike(tokens: Tensor, pivots: Tensor, kept: Tensor, eligible: Tensor, keep: int) -> Tensor:
    """Indices [keep] of tokens: those `kept` already, then what each pivot in turn is least similar to.

    tokens: [tokens, dim]. pivots: [pivots, dim]. kept: [at most keep]. eligible: [tokens], `keep` or more of them.
    """
    import torch
    from torch.nn.functional import normalize

    likeness = normalize(pivots.float(), dim=-1) @ normalize(tokens.float(), dim=-1).T
    found, free = [kept], eligible.index_fill(0, kept, False)
    for row, share in zip(likeness, shares(keep - len(kept), len(pivots)), strict=True):
        found.append(ranking(-row, free)[:share])
        free = free.index_fill(0, found[-1], False)
    return torch.cat(found)


def shares(count: int, parts: int) -> Sequence[int]:
    """`count` in as many equal parts, the first of them one larger where it is not divisible."""
    return [count // parts + (part < count % parts) for part in range(parts)]
