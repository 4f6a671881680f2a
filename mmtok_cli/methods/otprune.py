"""OTPrune: tokens whose covariance with all others spans the largest volume (arXiv 2602.20205)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, by_order, eligible_places, stacked
from mmtok_cli.methods.cdpruner import greedy_determinant
from mmtok_cli.methods.cosine import without_gradients
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OTPrune(Method):
    """Keeps the tokens whose kernel has the greatest determinant, built from how each token relates to all others.

    As in the authors' release: the columns of the projected tokens, not the rows, are scaled to length 1; with their
    products G, the kernel is I + gamma G G; tokens are picked greedily; padding can be selected (not on the harmonised
    track), positions are renumbered, and a percentage is rounded to the nearest whole number (halves to even). Where a
    model cuts an image into crops, each crop is reduced by itself. Not as released: everything is float32 in every
    model, where the release keeps the history of its picks in the model's data type; a column that is zero for all
    tokens is left out, instead of turning everything into NaN; no token is picked twice.

    gamma: weight of G G in the kernel.
    """

    summary: ClassVar[str] = "spans the covariance"
    source: ClassVar[str] = "arXiv 2602.20205"
    venue: ClassVar[str] = "CVPR 2026"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    nested: ClassVar[bool] = True
    per_crop: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True
    matrices: ClassVar[float] = 3

    gamma: float = 0.01

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, not {self.gamma}; the default is 0.01")

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        return round(share * total)

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        places = eligible_places(vision)
        pairs = zip(vision, places, strict=True)
        kernel = stacked([covariance_kernel(image.projected[own], self.gamma) for image, own in pairs])
        order, _ = greedy_determinant(kernel, budget)
        return by_order(places.gather(1, order))  # its gains are factors of a determinant, not sums


@without_gradients
def covariance_kernel(features: Tensor, gamma: float) -> Tensor:
    """I + gamma G G, where G holds the products of rows whose columns have length 1: [n, n] float32.

    features: [n, d]; columns of zeros stay zero.
    """
    import torch

    from mmtok_cli.methods.coverage import self_product

    columns = features.float()
    lengths = columns.square().sum(0).sqrt()  # `norm` over the first axis takes ten times as long
    kernel = self_product(self_product(columns / torch.where(lengths > 0, lengths, 1))).mul_(gamma)
    kernel.diagonal().add_(1)
    return kernel
