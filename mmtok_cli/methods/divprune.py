"""DivPrune: the most diverse tokens by farthest-point selection (arXiv 2503.02175, CVPR 2025).

Written from a description of the algorithm, without the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, by_order, eligible_places, stacked
from mmtok_cli.methods.cosine import unit_rows, without_gradients
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DivPrune(Method):
    """Keeps tokens that lie far from each other, by cosine distance of the projected tokens.

    As in the authors' release, padding can be selected, distances are computed in the model's data type, kept tokens
    stay in the order of the image, positions are renumbered, and a percentage is rounded to the nearest whole number
    (halves to even). Two of its defects are not reproduced: equal tokens selected twice, and NaN for tokens that are
    all zero. On the harmonised track padding is excluded and distances are float32.
    """

    summary: ClassVar[str] = "mutually distant tokens"
    source: ClassVar[str] = "arXiv 2503.02175"
    venue: ClassVar[str] = "CVPR 2025"
    licence: ClassVar[str] = "CC BY-NC 4.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    positions: ClassVar[Positions] = "renumber"
    nested: ClassVar[bool] = True
    keeps_padding: ClassVar[bool] = True
    matrices: ClassVar[float] = 2

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        return round(share * total)

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        return by_order(farthest_points([image.projected for image in vision], budget, eligible_places(vision)))


@without_gradients
def farthest_points(features: Sequence[Tensor], k: int, places: Tensor | None = None) -> Tensor:
    """`k` rows of each image that lie far from each other: their indices `[images, k]`, in the order of the picks.

    The first pick is the row whose nearest neighbour is farthest, each further one the row farthest from all picked
    so far (max-min). The lowest index wins a tie, and no index comes twice, even among equal rows.

    Args:
        features: `[n, d]` of each image; distances are computed in its data type.
        k: rows to pick.
        places: `[images, rows]`, ascending indices of the rows that count. None: all.

    Raises:
        MMTokError: fewer than `k` rows are left, or a value is not finite.
    """
    import torch

    if places is None:
        places = torch.arange(len(features[0]), device=features[0].device).expand(len(features), -1)
    count = places.shape[1]
    if not 0 <= k <= count:
        raise MMTokError(f"cannot keep {k} vision tokens: {count} of {len(features[0])} are eligible")
    if k == 0:
        return places[:, :0]
    distance = stacked([cosine_distances(rows[own]) for rows, own in zip(features, places, strict=True)])
    # A row that is not finite makes its distance to all others not finite, so one row of the matrix shows it.
    require(distance[:, 0].isfinite().all(), MMTokError("features hold NaN or infinity", "score in a wider dtype"))
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)

    images = torch.arange(len(places), device=places.device)
    picks = [distance.amin(2).argmax(1)]
    nearest = distance[images, picks[0]]  # distance to the closest row picked so far
    for _ in range(k - 1):
        nearest.scatter_(1, picks[-1].unsqueeze(1), -torch.inf)
        picks.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[images, picks[-1]])
    return places.gather(1, torch.stack(picks, 1))


def cosine_distances(features: Tensor) -> Tensor:
    """One minus the cosine between all rows of `[n, d]`: `[n, n]`. A zero row is at distance 1 from every row."""
    from mmtok_cli.methods.coverage import self_product

    return 1 - self_product(unit_rows(features))
