"""Coverage of a question and of an image by the same tokens, with a gate that says which of them is served next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.coverage import LazyGains, coverage_matrix, greedy

SWAPPED_UP_TO = 16  # picks of a crop
WORTHWHILE = 1e-6  # by which an exchange must raise the total coverage


@dataclass(frozen=True)
class CropCoverage:
    """What was picked of a crop.

    order: [picks]. picked: [picks], the same before exchanges. curve: [budget + 1], the coverage of the image that
    greedy selection for the image alone reaches with 0, 1, ... tokens. beta: the share of it that the gate demands.
    """

    order: Tensor
    picked: Tensor
    curve: Tensor
    beta: float


@torch.no_grad()
def gated_coverage(
    text: Tensor,
    projected: Sequence[Tensor],
    features: Sequence[Tensor],
    k: int,
    *,
    excluded: Sequence[Tensor],
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    beta: tuple[float, float] = (0.3, 0.9),
    swap: str = "auto",
) -> list[CropCoverage]:
    """Pick `k` tokens of all crops of an image together; of those that a crop nominates, the one that adds most.

    A crop nominates the token that adds most to the coverage of the question if the coverage of the crop is at least
    beta times the curve of greedy selection, and the token that adds most to the latter otherwise. Coverages are means
    over words and over tokens. On ties the first crop and the lowest index win.

    Args:
        text: [words, d], may be empty. projected: [n, d] of each crop. features: [n, d_vis] of each crop.
        excluded: bool [n] of each crop, True for tokens never to be picked.
        beta: the lowest and the highest value of the gate.
        swap: "auto", "always" or "never", see `StackTok`.

    Raises:
        MMTokError: fewer than `k` tokens are left, or a value is not finite.
    """
    left = sum(int((~mask).sum()) for mask in excluded)
    if not 0 <= k <= left:
        raise MMTokError(f"cannot keep {k} vision tokens: {left} are eligible")
    temperatures = {"text_temperature": text_temperature, "vision_temperature": vision_temperature}
    given = zip(projected, features, excluded, strict=True)
    crops = [_Crop(text, *crop, k, temperatures, beta, competes=len(projected) > 1) for crop in given]
    for _ in range(k):
        max(crops, key=lambda crop: crop.nominee[0]).take()
    found = []
    for crop in crops:
        picked = list(crop.order)
        if swap == "always" or (swap == "auto" and len(picked) <= SWAPPED_UP_TO):
            crop.swap()
        order, before = (torch.tensor(picks, dtype=torch.int64, device=text.device) for picks in (crop.order, picked))
        found.append(CropCoverage(order, before, crop.curve, crop.beta))
    return found


class _Crop:
    """Coverage of the question and of the image by the tokens of one crop.

    nominee: what its next token adds to both coverages, minus infinity where no token is left, and that token. Without
    other crops the first is not computed.
    """

    def __init__(
        self,
        text: Tensor,
        projected: Tensor,
        features: Tensor,
        excluded: Tensor,
        k: int,
        temperatures: dict[str, float],
        beta: tuple[float, float],
        competes: bool,
    ) -> None:
        self.for_text, self.for_image = (
            coverage_matrix(words, projected[None].float(), patches, alpha=1, **temperatures)[0]
            for words, patches in ((text[None].float(), None), (None, features[None].float()))
        )
        if not bool(self.for_image[:1].isfinite().all() & self.for_text[:1].isfinite().all()):
            raise MMTokError("text, projected or features hold NaN or infinity", "score in a wider dtype")
        self.free = ~excluded
        self.beta = _gate(self.for_text, beta)
        alone = greedy(self.for_image[None], min(k, int(self.free.sum())), excluded[None])[1][0]
        self.curve = torch.cat([alone.new_zeros(1), alone.cumsum(0)])
        self.demands = (self.beta * self.curve).tolist()
        self.lazy = LazyGains(self.for_image[None], excluded[None])
        self.text_cover = torch.zeros_like(self.for_text[0])
        self.competes = competes
        self.order: list[int] = []
        self.nominee = self._nominate()

    def take(self) -> None:
        """Pick the nominee."""
        token = self.nominee[1]
        self.order.append(token)
        self.free[token] = False
        self.text_cover = torch.maximum(self.text_cover, self.for_text[token])
        self.lazy.take(np.array([[token]]))
        self.nominee = self._nominate()

    def _nominate(self) -> tuple[float, int]:
        if len(self.order) == len(self.curve) - 1:
            return -math.inf, -1
        covered = float(self.lazy.cover.sum())
        served = (self._for_text, self._for_image)
        if not self.for_text.shape[1] or covered < self.demands[len(self.order)]:
            served = (self._for_image, self._for_text)
        gain, token = served[0]()
        if gain <= 0:
            gain, token = served[1]()
        if gain <= 0:
            token = int(self.free.int().argmax())
        if not self.competes:
            return 0.0, token
        text_gain = float((self.for_text[token] - self.text_cover).relu().sum())
        return text_gain + float(self.lazy.gains(np.array([token]))[0]), token

    def _for_text(self) -> tuple[float, int]:
        gains = (self.for_text - self.text_cover).relu_().sum(1)
        gain, token = gains.where(self.free, -math.inf).max(0)
        return float(gain), int(token)

    def _for_image(self) -> tuple[float, int]:
        gain, token = self.lazy.best()
        return float(gain[0, 0]), int(token[0, 0])

    def swap(self) -> None:
        """Exchange each pick once for the token that raises the sum of both coverages most, unless none does.

        The coverage of the image may fall, but not below what the gate demands of all picks.
        """
        for position in range(len(self.order)):
            others = self.order[:position] + self.order[position + 1 :]
            candidates = self.free.nonzero().squeeze(1)
            if not len(candidates):
                return
            present = [float(matrix[self.order].amax(0).sum()) for matrix in (self.for_text, self.for_image)]
            text, image = (
                torch.maximum(matrix[candidates], matrix[others].amax(0) if others else matrix.new_zeros(())).sum(1)
                for matrix in (self.for_text, self.for_image)
            )
            total = (text + image).masked_fill(image < min(self.demands[len(self.order)], present[1]), -math.inf)
            best, at = total.max(0)
            if float(best) > sum(present) * (1 + WORTHWHILE):
                token = int(candidates[at])
                self.free[self.order[position]], self.free[token] = True, False
                self.order[position] = token


def _gate(for_text: Tensor, limits: tuple[float, float]) -> float:
    """The share of the image's best coverage that is demanded: the mean entropy of the words, as a share of the highest
    possible one, within the limits. for_text: [n, words], columns with the sum 1 / words."""
    n, words = for_text.shape
    if n <= 1:
        return limits[0]
    if not words:
        return limits[1]
    shares = for_text * words
    entropy = -(shares * (shares + 1e-12).log()).sum(0).mean() / math.log(n)
    return min(max(float(entropy), limits[0]), limits[1])
