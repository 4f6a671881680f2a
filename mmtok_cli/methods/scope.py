"""SCOPE: coverage of the image, weighed by how salient each token is (arXiv 2510.24214)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, by_order, excluded_of, ranked_from, stacked
from mmtok_cli.methods.cosine import unit_rows, without_gradients
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import on_host, require

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["multiply", "add"]
NEGLIGIBLE = 1e-6  # of the first gain in coverage: gains below are rounding noise


@dataclass(frozen=True)
class SCOPE(Method):
    """Keeps tokens that are salient and, by cosine similarity, cover what the tokens kept so far do not.

    A pick is the token with the largest product of what it adds to the coverage of all tokens and its saliency. As in
    the authors' release for LLaVA: similarity is that of the features before the projector, saliency is the attention
    of the class token, summed over the heads, no class token is kept, and padding can be selected (not on the
    harmonised track). Encoders without a class token (Qwen) are treated as in AngelSlim's port: similarity is that of
    the projected tokens, saliency is the attention that a token receives in the last block (the mean of its patches,
    where the port takes their sum, which makes no difference to a product), and a percentage is rounded to the nearest
    whole number. Not as released: scores are float32 in every model; a token whose features are all zero covers
    nothing, instead of turning all gains into NaN; and once no pick adds to the coverage but rounding noise (a
    millionth of the first gain), the others follow by saliency instead of by index, those without features last.

    alpha: exponent of the saliency; 0 ignores it.
    combine: `multiply`, or `add`, as the paper's ablation does.
    """

    summary: ClassVar[str] = "salient + covers the image"
    source: ClassVar[str] = "arXiv 2510.24214"
    venue: ClassVar[str] = "NeurIPS 2025"
    licence: ClassVar[str] = "no licence file"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    signals: ClassVar[tuple[str, ...]] = ("class_attention",)
    alternative_signals: ClassVar[tuple[tuple[str, ...], ...]] = (("received_attention",),)
    nested: ClassVar[bool] = True
    per_crop: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True
    matrices: ClassVar[float] = 1.25

    alpha: float = 1.0
    combine: Combine = "multiply"

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise MMTokError(f"an exponent of {self.alpha} is negative", "the default of alpha is 1")

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        if "received_attention" not in signals:
            return super().count(share, total, signals)
        removed = 1 - share  # what the port's parameter says; halves fall as they do in its arithmetic
        return max(min(total, 1), round(total * (1 - removed)))

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        if "class_attention" in vision[0].signals:
            features = [image.features for image in vision]
            saliency = stacked([image.signals["class_attention"] for image in vision]).float().sum(1)
        else:
            features = [image.projected for image in vision]
            saliency = stacked([image.signals["received_attention"] for image in vision]).float()
        order, gains = salient_coverage(
            features, saliency, budget, alpha=self.alpha, combine=self.combine, excluded=excluded_of(vision)
        )
        return by_order(order, gains)


@without_gradients
def salient_coverage(
    features: Sequence[Tensor],
    saliency: Tensor,
    k: int,
    *,
    alpha: float = 1.0,
    combine: Combine = "multiply",
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick `k` tokens of each image, each the one with the best combination of saliency and gain in coverage.

    A token is covered as well as the most similar pick is similar to it; a negative cosine covers nothing. Computed in
    float32. The lowest index wins a tie.

    Args:
        features: [n, d] of each image. saliency: [b, n], not negative.
        alpha: exponent of the saliency. combine: whether the gain is multiplied by it, or it is added.
        excluded: bool [b, n], True for tokens never to be picked. They are to be covered all the same.

    Returns:
        order [b, k], and gains [b, k], the combined score of each pick.

    Raises:
        MMTokError: fewer than `k` tokens are left, or a value is not finite.
    """
    import torch

    from mmtok_cli.methods.coverage import greedy, self_product

    batch, n = saliency.shape
    excluded = torch.zeros_like(saliency, dtype=torch.bool) if excluded is None else excluded
    eligible = int((~on_host(excluded)).sum(1).min())
    if not 0 <= k <= eligible:
        raise MMTokError(f"cannot keep {k} vision tokens: {eligible} of {n} are eligible")
    cosines = torch.empty(batch, n, n, device=saliency.device)
    for image, out in zip(features, cosines, strict=True):
        self_product(unit_rows(image.float()), out=out)
    # A token that is not finite spoils its entry in every row, so one row shows them all.
    error = MMTokError("features or saliency hold NaN or infinity", "score in a wider dtype")
    require(cosines[:, :1].isfinite().all() & saliency.isfinite().all(), error)
    prior = saliency.float() ** alpha
    if combine == "add":
        return greedy(cosines.relu_(), k, excluded, bonus=prior)
    order, scores = greedy(cosines.relu_(), k, excluded, factor=prior)
    empty = stacked([(rows == 0).all(-1) for rows in features])
    by_saliency = prior.masked_fill(empty, -1).masked_fill(excluded, -torch.inf)
    return _filled(order, scores, prior, by_saliency), scores


def _filled(order: Tensor, scores: Tensor, prior: Tensor, ranks: Tensor) -> Tensor:
    """The picks up to where the coverage stops growing, then tokens by descending rank [b, n]: [b, k]."""
    import torch

    weights = prior.gather(1, order)
    gains = torch.where(weights > 0, scores / weights, 0)
    noise = (gains <= NEGLIGIBLE * gains[:, :1]).cumsum(1) > 0
    return ranked_from(noise, order, ranks)
