"""HiPrune: tokens attended to in the middle of the encoder, their neighbours, and those attended to at its end
(arXiv 2508.00553)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, by_order, ranking, stacked
from mmtok_cli.methods.cosine import without_gradients
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HiPrune(Method):
    """Keeps the tokens that receive most attention in a middle layer of the encoder (anchors), the neighbours of these
    (buffers), and fills the budget with the tokens that receive most attention in the last one (registers).

    As in the authors' code: of k tokens, round(k * alpha / 5) are anchors, halves to even; a token's neighbours are the
    places before and after it in raster order, so that the ends of rows have neighbours in other rows, and those above
    and below; the middle layer is the 9th of CLIP's 24 and the 16th of Qwen2.5-VL's 32, in proportion for encoders of
    other depths (on Qwen2.5-VL the nearest block that sees whole images); "last" is the layer that LLaVA's features
    come from; padding can be selected (not on the harmonised track), and a percentage is rounded to the nearest whole
    number. Corrected: exactly k tokens are kept. The code for Qwen may take an anchor again as a register, and keeps
    fewer then; where anchors and buffers are more than k, it fails. Here the buffers that receive least attention in
    the middle layer are left out. Of equal values the lowest index goes first. InternVL is treated as LLaVA is, but for
    the class token, whose attention does not count.

    alpha: share of the budget for anchors and buffers, if no neighbours coincide.
    """

    summary: ClassVar[str] = "anchors + registers"
    source: ClassVar[str] = "arXiv 2508.00553"
    venue: ClassVar[str] = "AAAI 2026"
    licence: ClassVar[str] = "MIT"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    signals: ClassVar[tuple[str, ...]] = ("middle_attention", "received_attention")
    per_crop: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise MMTokError(f"an alpha of {self.alpha} is not between 0 and 1", "the default is 0.1")

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        return round(share * total)

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        order = hierarchical(
            stacked([image.signals["middle_attention"] for image in vision]),
            stacked([image.signals["received_attention"] for image in vision]),
            vision[0].grid,
            budget,
            round(budget * self.alpha / 5),
            stacked([image.eligible for image in vision]),
        )
        return by_order(order)


@without_gradients
def hierarchical(
    middle: Tensor, last: Tensor, grid: tuple[int, int], k: int, anchors: int, eligible: Tensor | None = None
) -> Tensor:
    """`k` tokens of each grid (rows, columns): [images, k] indices, anchors first, then buffers, then registers.

    middle, last: [images, tokens], attention that each token receives in the two layers. anchors: how many of the
    tokens that `middle` is highest for are kept together with their neighbours, as far as there is room. eligible:
    [images, tokens], False for tokens never to be kept; at least `k` must be eligible.
    """
    import torch

    eligible = torch.ones_like(middle, dtype=torch.bool) if eligible is None else eligible
    tokens = middle.shape[1]
    by_middle, by_last = ranking(torch.stack([middle, last]), eligible)
    found = by_middle[:, : min(anchors, k)]
    near = torch.cat([found + step for step in (-1, 1, -grid[1], grid[1])], 1).clamp(0, tokens - 1)
    # Anchors come first, then buffers, both as the middle layer ranks them, then registers.
    numbers = torch.arange(tokens, device=middle.device).expand_as(by_middle)
    in_middle = torch.empty_like(by_middle).scatter_(1, by_middle, numbers)
    places = torch.empty_like(by_last).scatter_(1, by_last, numbers + tokens)
    places = torch.where(torch.zeros_like(eligible).scatter_(1, near, True), in_middle, places)
    places = places.scatter(1, found, numbers[:, : found.shape[1]] - tokens)
    return places.masked_fill_(~eligible, 2 * tokens).argsort(1)[:, :k]
