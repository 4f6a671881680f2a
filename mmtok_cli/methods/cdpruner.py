"""CDPruner: conditional diversity, by a determinant that the question weighs (arXiv 2506.10967, NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, by_order, eligible_places, stacked
from mmtok_cli.methods.cosine import aligned_empty, unit_rows, without_gradients
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import require

if TYPE_CHECKING:
    from torch import Tensor

RELEVANCE_FLOOR = 1e-6
RELEVANCE = "relevance"  # among the signals: of each eligible token, scaled over all crops of the image


@dataclass(frozen=True)
class CDPruner(Method):
    """Keeps tokens that differ from each other and are relevant to the question by CLIP's similarity.

    Needs the text tower of the encoder's CLIP model. As in the authors' release, relevance is the *negated* cosine,
    since CLIP's patch features point away from matching text; `relevance_sign=1` uses the plain one, for comparison.
    Padding can be selected, relevance is computed in the model's data type, and positions are renumbered. Where a model
    cuts an image into crops, relevance is scaled by the lowest and highest value of all crops, and tokens are then
    selected in each crop separately. Two defects are not reproduced: infinity for an image whose tokens are all equally
    relevant, and NaN once rounding has made a gain negative. On the harmonised track padding is excluded and relevance
    is float32. The authors' code scales all images of a batch together; here each has its own scale, so batches do not
    matter.
    """

    summary: ClassVar[str] = "relevant + diverse ones"
    source: ClassVar[str] = "arXiv 2506.10967"
    venue: ClassVar[str] = "NeurIPS 2025"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = ("clip_image_embeds", "clip_text_embeds")
    nested: ClassVar[bool] = True
    per_crop: ClassVar[bool] = True
    positions: ClassVar[Positions] = "renumber"
    keeps_padding: ClassVar[bool] = True
    matrices: ClassVar[float] = 3

    relevance_sign: float = -1.0

    def __post_init__(self) -> None:
        if self.relevance_sign not in (-1, 1):
            raise MMTokError(f"the relevance sign is {self.relevance_sign}", "choose -1 (as released) or 1")

    def across_crops(self, crops: Sequence[VisionTokens]) -> list[VisionTokens]:
        import torch

        embeds = torch.cat([crop.signals["clip_image_embeds"][crop.eligible_places] for crop in crops])
        scores = relevance(embeds[None], crops[0].signals["clip_text_embeds"], self.relevance_sign)[0]
        shares = scores.split([crop.eligible_count for crop in crops])
        return [
            replace(crop, signals={**crop.signals, RELEVANCE: share}) for crop, share in zip(crops, shares, strict=True)
        ]

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        seen = [image if RELEVANCE in image.signals else self.across_crops([image])[0] for image in vision]
        places = eligible_places(vision)
        projected = [image.projected[own] for image, own in zip(vision, places, strict=True)]
        kernel = conditional_kernel(projected, stacked([image.signals[RELEVANCE] for image in seen]))
        order, _ = greedy_determinant(kernel, budget)
        return by_order(places.gather(1, order))  # its gains are factors of a determinant, not sums


@without_gradients
def relevance(image_embeds: Tensor, text_embeds: Tensor, sign: float = -1.0) -> Tensor:
    """How relevant each vision token is to the text: `[batch, n]`, above 0 and up to about 1.

    Cosines averaged over the pieces of the text and times `sign`, then shifted and scaled by the lowest and highest of
    the whole batch, as released, with 1e-6 added to the numerator alone. Where all are equal, all are 1. Computed in
    the data type of the embeddings.

    Args:
        image_embeds: `[batch, n, c]`, vision tokens in CLIP's shared space.
        text_embeds: `[pieces, c]`, the text in that space.
    """
    import torch

    score = sign * (unit_rows(image_embeds) @ unit_rows(text_embeds).T).mean(-1)
    low, high = score.min(), score.max()
    return torch.where(high > low, (score - low + RELEVANCE_FLOOR) / (high - low), 1)


@without_gradients
def conditional_kernel(projected: Sequence[Tensor], relevance: Tensor) -> Tensor:
    """Cosines between tokens, each weighed by both tokens' relevance: `[batch, n, n]` float32, as released.

    projected: `[n, d]` of each image, behind the projector; relevance: `[batch, n]`.
    """
    from mmtok_cli.methods.coverage import self_product

    weight = relevance.float()
    cosines = stacked([self_product(unit_rows(rows.float())) for rows in projected])
    return cosines.mul_(weight.unsqueeze(2)).mul_(weight.unsqueeze(1))


@without_gradients
def greedy_determinant(kernel: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Pick `k` rows one by one, each time the one that enlarges the determinant of the picked rows' kernel most.

    The Cholesky factor of the picked rows grows by one row per pick, so a pick costs O(n * picks so far). The lowest
    index wins a tie, and no index comes twice.

    Args:
        kernel: `[batch, n, n]`, symmetric and positive semidefinite but for rounding.
        k: at most n.

    Returns:
        order `[batch, k]` and gains `[batch, k]`: the factor by which each pick enlarged the determinant (its variance
        given the earlier picks). Gains fall and are never negative; they are 0 where nothing new is left.

    Raises:
        MMTokError: `k` is out of range, or a value is not finite.
    """
    import torch

    batch, n, _ = kernel.shape
    if not 0 <= k <= n:
        raise MMTokError(f"cannot keep {k} vision tokens: {n} are eligible", f"choose a number from 0 to {n}")
    # A token that is not finite spoils its entry in every row, so one row shows them all.
    error = MMTokError("features or relevance hold NaN or infinity", "score in a wider dtype")
    require(kernel[:, :1].isfinite().all(), error)
    tiny = torch.finfo(kernel.dtype).tiny
    left = kernel.diagonal(dim1=1, dim2=2).clamp(min=0)  # what each row would gain now
    barred = torch.zeros_like(left)
    factor = aligned_empty(kernel, batch, k, n)
    images = torch.arange(batch, device=kernel.device)
    of_pick, explained = aligned_empty(kernel, batch, k, 1), aligned_empty(kernel, batch, 1, n)
    order = [torch.empty(batch, 0, dtype=torch.int64, device=kernel.device)]
    gains = [kernel.new_empty(batch, 0)]
    for i in range(k):
        gain, pick = (left + barred).max(1, keepdim=True)
        earlier = factor[:, :i]
        column = torch.gather(earlier, 2, pick.unsqueeze(1).expand(-1, i, -1), out=of_pick[:, :i])
        for image in range(batch):  # one product per image: batched kernels round differently
            torch.mm(column[image].T, earlier[image], out=explained[image])
        row = kernel[images, pick.squeeze(1)] - explained.squeeze(1)
        # No entry's square can exceed what its row has left. Rounding would break that where little is left, and
        # every later row with it.
        bound = left.sqrt()
        entry = (row / gain.clamp(min=tiny).sqrt()).clamp(-bound, bound)
        left = (left - entry.square()).clamp(min=0)
        barred.scatter_(1, pick, -torch.inf)
        factor[:, i] = entry
        order.append(pick)
        gains.append(gain)
    return torch.cat(order, 1), torch.cat(gains, 1)
