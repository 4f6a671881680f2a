"""VisPruner: tokens the class token attends to, and diverse ones of the rest (arXiv 2412.01818, ICCV 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method
from mmtok_cli.methods.cosine import in_float64
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import on_host

if TYPE_CHECKING:
    from torch import Tensor

IMPORTANT_RATIO = 0.5
_DROPPED_AT_ONCE = 8  # the released code's step


@dataclass(frozen=True)
class VisPruner(Method):
    """Keeps the patches that the class token attends to most, and of the others those that differ most.

    As in the authors' code: attention is averaged over the heads, half of the budget (rounded down) is important
    tokens, the rest is reduced round by round until it fits, similarity is that of the features before the projector,
    padding can be selected (not on the harmonised track), and positions are renumbered.
    Corrected: the released code fails where the rest is odd in number (58 of 576), or where a round would drop more
    than there are. Here the half that is reduced takes the odd one, and no round drops more than that half has.

    Each round ranks cosines that may differ by no more than 1e-8, and this order decides which tokens the next round
    compares. In images without detail the choice therefore depends on the last bits of the features: the released code
    gives other tokens in float32 than in float64. Here scores are float64 in every model, and of equal scores the token
    with the lowest index goes first. The choice is the same in any batch if the encoder's features are bit-identical
    there, as those of CLIP ViT-L are in float32 on a CPU; on a GPU they may depend on the batch size.

    important_ratio: share of the budget that goes to important tokens.
    """

    summary: ClassVar[str] = "important + diverse ones"
    source: ClassVar[str] = "arXiv 2412.01818"
    venue: ClassVar[str] = "ICCV 2025"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    signals: ClassVar[tuple[str, ...]] = ("class_attention",)
    per_crop: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True
    matrices: ClassVar[float] = 2.5

    important_ratio: float = IMPORTANT_RATIO

    def __post_init__(self) -> None:
        if not 0 <= self.important_ratio <= 1:
            raise MMTokError(
                f"an important ratio of {self.important_ratio} is not between 0 and 1", "the default is 0.5"
            )

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        found = important_and_diverse(
            [image.features for image in vision],
            [image.signals["class_attention"] for image in vision],
            budget,
            self.important_ratio,
            eligible=[image.eligible for image in vision],
        )
        return [Selection(indices) for indices in found]


def important_and_diverse(
    features: Sequence[Tensor],
    class_attention: Sequence[Tensor],
    k: int,
    important_ratio: float = IMPORTANT_RATIO,
    *,
    eligible: Sequence[Tensor] | None = None,
) -> Tensor:
    """Select `k` of the n patches of each image: [images, k] indices, ascending.

    features: [n, dim] of each image, before the projector. class_attention: [heads, n], probabilities with which the
    class token attends to each patch. eligible: [n], False for patches never to be selected; in each image equally
    many must be eligible, at least `k`.
    """
    import torch

    attention, count = torch.stack([in_float64(each).mean(0) for each in class_attention]), len(features[0])
    if eligible is not None:
        attention = attention.masked_fill(~torch.stack(list(eligible)).to(attention.device), -torch.inf)
        count = int(on_host(eligible[0]).sum())
    ranking = attention.argsort(dim=1, descending=True, stable=True)[:, :count]
    important = int(k * important_ratio)
    diverse = _thin_out(ranking[:, important:], features, k - important)
    return torch.cat([ranking[:, :important], diverse], 1).sort(1).values.to(features[0].device)


def _thin_out(pool: Tensor, features: Sequence[Tensor], k: int) -> Tensor:
    """The `k` tokens of each image's pool, [images, tokens], that are left when those that resemble others most have
    gone.

    Of a pool in descending order of attention, every second token from the first on is compared with those between.
    The ones most similar to any of these go, the surviving ones move to the front, most similar first, and the next
    round begins.
    """
    import torch
    from torch.nn.functional import normalize

    if k == 0:
        return pool[:, :0]
    similarity = torch.empty(*pool.shape, pool.shape[1], dtype=torch.float64, device=pool.device)
    for rows, own, out in zip(features, pool, similarity, strict=True):  # batched products round differently
        directions = normalize(in_float64(rows)[own], dim=-1)
        torch.mm(directions, directions.T, out=out)
    image = torch.arange(len(pool), device=pool.device)[:, None, None]
    line = torch.arange(pool.shape[1], device=pool.device).repeat(len(pool), 1)  # rows of `similarity`
    while line.shape[1] > k:
        thinned, compared = line[:, ::2], line[:, 1::2]
        drop = min(_DROPPED_AT_ONCE, line.shape[1] - k, thinned.shape[1])
        closest = similarity[image, thinned[:, :, None], compared[:, None]].amax(2)
        survivors = closest.argsort(dim=1, descending=True, stable=True)[:, drop:]
        line = torch.cat([thinned.gather(1, survivors), compared], 1)
    return pool.gather(1, line)
