"""VisionZip: dominant tokens by the class token's attention, the others merged (arXiv 2412.04467, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, ranking, stacked
from mmtok_cli.methods.cosine import in_float64
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens, all_eligible
from mmtok_cli.values import on_host, to_device

if TYPE_CHECKING:
    from torch import Tensor

Merge = Literal["sum", "mean"]
TOKENS_PER_CONTEXTUAL = 6.4  # dominant : contextual = 5.4 : 1 in all budgets that the authors publish
# The two settings of the authors' file for Qwen2.5-VL: the share of all tokens that is dominant, by the share that is
# kept, and the share that is contextual.
QWEN_DOMINANT = {0.7: 0.65, 0.5: 0.45}
QWEN_CONTEXTUAL = 0.05


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps the class token and the patches that it attends to most, and merges the others into a few tokens.

    The first kind is called dominant (paper, section 3.2), the second contextual (section 3.3). As in the authors'
    code: the class token counts towards the budget and goes through the projector although LLaVA was not trained on it,
    padding can be selected, and the tokens enter the language model in the order class token, dominant patches,
    contextual tokens, with renumbered positions (where positions are kept, the class token gets that of the first
    patch). On the harmonised track padding is neither kept nor merged. Corrected: a budget without contextual tokens
    works instead of dividing by zero. Attention is computed in float32 and the similarity of keys in float64, since a
    patch of padding may be equally similar to two targets up to 1e-8.

    Encoders without a class token (Qwen) are treated as in the authors' later file for Qwen2.5-VL: the tokens that
    receive most attention in the last block are dominant, merging happens after the projector, and a contextual token
    takes the place of its target. That file has two settings: of n tokens int(0.65 n) or int(0.45 n) are dominant, and
    int(0.05 n), at least one, are contextual. Budgets of 70% or 50%, or of the same number of tokens, follow them; all
    others are split 5.4 : 1, with at least one contextual token.

    contextual: number of contextual tokens in the budget. None follows the authors: 5.4 : 1, rounded (162 + 30 of 192,
        108 + 20 of 128, 54 + 10 of 64, 27 + 5 of 32, none of 3 or fewer), or their settings for Qwen.
    merge: `sum`, as released: a contextual token is its target *plus* the mean of the tokens assigned to it, so it is
        about twice as long as others. `mean`: the average of the target and those tokens.
    """

    summary: ClassVar[str] = "dominant + merged tokens"
    source: ClassVar[str] = "arXiv 2412.04467"
    venue: ClassVar[str] = "CVPR 2025"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    signals: ClassVar[tuple[str, ...]] = ("class_attention", "mean_keys", "class_feature")
    alternative_signals: ClassVar[tuple[tuple[str, ...], ...]] = (("received_attention", "mean_keys"),)
    per_crop: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True

    merge: Merge = "sum"
    contextual: int | None = None

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise MMTokError(f"VisionZip cannot merge by {self.merge!r}", f"choose {' or '.join(get_args(Merge))}")
        if self.contextual is not None and self.contextual < 0:
            raise MMTokError(f"VisionZip cannot make {self.contextual} contextual tokens", "choose 0 or more")

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        if "received_attention" not in signals or share not in QWEN_DOMINANT:
            return super().count(share, total, signals)
        return int(QWEN_DOMINANT[share] * total) + _qwen_contextual(total)

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        import torch

        if "class_feature" not in vision[0].signals:
            return self._select_without_class_token(vision, budget)
        contextual = self._contextual(vision[0], budget)
        rows, indices = zip_tokens(
            [image.features for image in vision],
            stacked([image.signals["class_feature"] for image in vision]),
            stacked([image.signals["class_attention"] for image in vision]),
            [image.signals["mean_keys"] for image in vision],
            budget - contextual,
            contextual,
            eligible=[image.eligible for image in vision],
            merge=self.merge,
        )
        merged = torch.arange(budget, device=indices.device) >= budget - contextual
        parts = zip(vision, indices, rows, strict=True)
        return [Selection(places, tokens=image.project(own), merged=merged) for image, places, own in parts]

    def _select_without_class_token(self, vision: Sequence[VisionTokens], budget: int) -> Sequence[Selection]:
        import torch

        contextual, total = self._share(budget), vision[0].total
        if self.contextual is None and budget > 1:
            contextual, released = max(1, contextual), _qwen_contextual(total)
            if budget - released in (int(share * total) for share in QWEN_DOMINANT.values()):
                contextual = released
        if contextual > budget:
            raise MMTokError(
                f"the budget of {budget} is less than {contextual} contextual tokens",
                f"choose {contextual} to {total}",
            )
        received = stacked([image.signals["received_attention"] for image in vision])
        order = ranking(received, stacked([image.eligible for image in vision]))[:, : vision[0].eligible_count]
        dominant, others = order[:, : budget - contextual], order[:, budget - contextual :].sort().values
        projected = [image.projected for image in vision]
        rows, targets = _merge_into_targets(
            projected, [image.signals["mean_keys"] for image in vision], others, contextual, self.merge
        )
        indices, places = torch.cat([dominant, targets], 1).sort()
        tokens = torch.cat([_rows_at(projected, dominant), rows], 1)
        parts = zip(indices, _rows_at([*tokens], places), places >= dominant.shape[1], strict=True)
        return [Selection(kept, tokens=own, merged=merged) for kept, own, merged in parts]

    def _share(self, budget: int) -> int:
        """Contextual tokens of a budget."""
        return round(budget / TOKENS_PER_CONTEXTUAL) if self.contextual is None else self.contextual

    def _contextual(self, vision: VisionTokens, budget: int) -> int:
        """How many tokens of the budget are contextual. Raises MMTokError where the budget cannot be met."""
        contextual = self._share(budget)
        eligible, smallest = vision.eligible_count, 1 + (self.contextual or 0)
        if smallest > eligible + 1:
            raise MMTokError(
                f"VisionZip cannot make {contextual} contextual tokens of the {eligible} vision tokens of "
                f"{vision.image_id} that are not padding",
                f"choose at most {eligible} contextual tokens",
            )
        feasible = f"choose {smallest} to {min(eligible + 1, vision.total)}, or all {vision.total}"
        if budget < smallest:
            raise MMTokError(
                f"the budget of {budget} is less than the class token and {contextual} contextual tokens", feasible
            )
        if budget > eligible + 1:
            raise MMTokError(
                f"the budget of {budget} is more than the class token and the {eligible} vision tokens of "
                f"{vision.image_id} that are not padding",
                feasible,
            )
        return contextual


def _qwen_contextual(total: int) -> int:
    return max(1, int(QWEN_CONTEXTUAL * total))


def zip_tokens(
    features: Sequence[Tensor],
    class_feature: Tensor,
    class_attention: Tensor,
    mean_keys: Sequence[Tensor],
    dominant: int,
    contextual: int,
    *,
    eligible: Sequence[Tensor] | None = None,
    merge: Merge = "sum",
) -> tuple[Tensor, Tensor]:
    """Reduce the n patches of each image, before the projector, to `dominant + contextual` tokens.

    Args:
        features: [n, dim] of each image, the patches; class_feature: [images, dim], the class tokens of the same layer.
        class_attention: [images, heads, n], probabilities with which the class token attends to each patch there.
        mean_keys: [n, head dim] of each image, the layer's keys, averaged over the heads.
        dominant: tokens that stay as they are, the class token among them; at least 1.
        contextual: tokens that the other patches are merged into.
        eligible: [n] of each image, False for patches that are neither kept nor merged, equally many in each. None: all
            take part.
        merge: see `VisionZip`.

    Returns:
        rows [images, dominant + contextual, dim], and the places that they stand for: -1 for the class token, the
        dominant patches ascending, the contextual tokens' targets ascending.

    Raises MMTokError if `dominant` is less than 1, or there are fewer than `dominant - 1 + contextual` patches.
    """
    import torch

    if eligible is None:
        eligible = [all_eligible(len(rows), rows.device) for rows in features]
    count = int(on_host(eligible[0]).sum())
    if dominant < 1 or not 0 <= contextual <= count - (dominant - 1):
        raise MMTokError(
            f"{count} vision tokens and a class token do not make {dominant} dominant and {contextual} contextual ones",
            f"dominant counts the class token; the two must come to no more than {count + 1}",
        )
    order = ranking(class_attention.sum(1, dtype=torch.float32), stacked(eligible))[:, :count]
    patches, others = order[:, : dominant - 1].sort().values, order[:, dominant - 1 :].sort().values
    merged, targets = _merge_into_targets(features, mean_keys, others, contextual, merge)
    rows = torch.cat([class_feature.unsqueeze(1), _rows_at(features, patches), merged], 1)
    return rows, torch.cat([patches.new_full((len(patches), 1), -1), patches, targets], 1)


def _merge_into_targets(
    features: Sequence[Tensor], keys: Sequence[Tensor], places: Tensor, count: int, merge: Merge
) -> tuple[Tensor, Tensor]:
    """Merge patches into `count` evenly spaced ones of them, each into the one whose key is most similar.

    features: [tokens, dim] of each image, keys: [tokens, head dim]. places: [images, patches], of those that are
    merged. Returns the merged rows [images, count, dim] and the places of the targets [images, count].
    """
    import torch
    from torch.nn.functional import normalize

    patches = places.shape[1]
    step = max(1, patches // max(1, count))
    chosen = torch.arange(count) * step
    targets = places[:, to_device(chosen, places.device)]
    own = _rows_at(features, targets)
    if count in (0, patches):
        return own, targets
    is_member = torch.ones(patches, dtype=torch.bool).index_fill(0, chosen, False)
    members = places[:, to_device(is_member.nonzero().squeeze(1), places.device)]
    of_members, of_targets = (normalize(in_float64(_rows_at(keys, each)), dim=-1) for each in (members, targets))
    # One product per image: batched kernels round differently.
    cosines = stacked([a @ b.T for a, b in zip(of_members, of_targets, strict=True)])
    nearest = cosines.argmax(2).to(places.device)  # the first on ties
    belongs = (nearest.unsqueeze(2) == torch.arange(count, device=places.device)).to(own.dtype)
    sizes = belongs.sum(1).unsqueeze(2)
    # Weights are divided before the sum: a sum of hundreds of features may be more than float16 can hold.
    parts = sizes.clamp(min=1) if merge == "sum" else sizes + 1
    own = own if merge == "sum" else own / parts
    weights = belongs / parts.mT
    means = [share.T @ rows[each] for share, rows, each in zip(weights, features, members, strict=True)]
    return own + stacked(means), targets


def _rows_at(rows: Sequence[Tensor], places: Tensor) -> Tensor:
    """The rows [tokens, dim] of each image at its places [images, kept]: [images, kept, dim]."""
    return stacked([own[each] for own, each in zip(rows, places, strict=True)])
