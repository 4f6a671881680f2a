"""Coverage of a question and of an image by the same tokens, with a gate that says which of them is served next.

The same picks are found in two ways: lazily on a CPU, where the host knows every gain, and with all gains evaluated at
each pick on a GPU, which decides by itself, so that the host never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.cosine import in_float64
from mmtok_cli.methods.coverage import EXHAUSTIVE_BELOW_GPU, LazyGains, coverage_matrix, greedy
from mmtok_cli.values import on_host, require, to_device

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
    beta: Tensor


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
    eligible = [int((~on_host(mask)).sum()) for mask in excluded]
    if not 0 <= k <= sum(eligible):
        raise MMTokError(f"cannot keep {k} vision tokens: {sum(eligible)} are eligible")
    temperatures = {"text_temperature": text_temperature, "vision_temperature": vision_temperature}
    crops = [
        _Crop(text, rows, patches, mask, min(k, count), temperatures, beta)
        for rows, patches, mask, count in zip(projected, features, excluded, eligible, strict=True)
    ]
    sizes = {len(rows) for rows in projected}
    # An Apple GPU has no float64, in which the crops are compared.
    on_device = text.device.type not in ("cpu", "mps") and len(sizes) == 1 and max(sizes) < EXHAUSTIVE_BELOW_GPU
    orders = (_searched_on_device if on_device else _searched_on_host)(crops, k)
    found = []
    for crop, order in zip(crops, orders, strict=True):
        swaps = swap == "always" or (swap == "auto" and len(order) <= SWAPPED_UP_TO)
        found.append(CropCoverage(crop.swapped(order) if swaps else order, order, crop.curve, crop.beta))
    return found


class _Crop:
    """What is covered by the tokens of one crop.

    for_text: [n, words] and for_image: [n, n], how well each token covers each target. free: [n], True for tokens that
    can be picked; `limit` of them at most. beta and curve: as in CropCoverage. demands: beta * curve.
    """

    def __init__(
        self,
        text: Tensor,
        projected: Tensor,
        features: Tensor,
        excluded: Tensor,
        limit: int,
        temperatures: dict[str, float],
        beta: tuple[float, float],
    ) -> None:
        self.for_text, self.for_image = (
            coverage_matrix(words, projected[None].float(), patches, alpha=1, **temperatures)[0]
            for words, patches in ((text[None].float(), None), (None, features[None].float()))
        )
        finite = self.for_image[:1].isfinite().all() & self.for_text[:1].isfinite().all()
        require(finite, MMTokError("text, projected or features hold NaN or infinity", "score in a wider dtype"))
        self.limit = limit
        self.free = ~excluded
        self.beta = _gate(self.for_text, beta)
        alone = greedy(self.for_image[None], limit, excluded[None])[1][0]
        self.curve = torch.cat([alone.new_zeros(1), alone.cumsum(0)])
        self.demands = self.beta * self.curve

    def swapped(self, order: Tensor) -> Tensor:
        """Exchange each pick [picks] once for the token that raises the sum of both coverages most, unless none does.

        The coverage of the image may fall, but not below what the gate demands of all picks.
        """
        free = self.free.index_fill(0, order, False)
        matrices, demand = (self.for_text, self.for_image), self.demands[len(order)]
        for position in range(len(order)):
            pick, others = order[position : position + 1], torch.cat([order[:position], order[position + 1 :]])
            present = [matrix[order].amax(0).sum() for matrix in matrices]
            text, image = (
                torch.maximum(matrix, matrix[others].amax(0) if len(others) else matrix.new_zeros(())).sum(1)
                for matrix in matrices
            )
            allowed = free & (image >= torch.minimum(demand, present[1]))
            best, token = (text + image).masked_fill(~allowed, -math.inf).max(0, keepdim=True)
            better = in_float64(best) > (in_float64(present[0]) + in_float64(present[1])) * (1 + WORTHWHILE)
            left = torch.where(better.to(token.device), token, pick)
            free = free.index_fill(0, pick, True).index_fill(0, left, False)
            order = torch.cat([order[:position], left, order[position + 1 :]])
        return order


def _searched_on_host(crops: Sequence[_Crop], k: int) -> list[Tensor]:
    """The picks of each crop, of `k` in all; the host decides."""
    searches = [_Search(crop, competes=len(crops) > 1) for crop in crops]
    for _ in range(k):
        max(searches, key=lambda search: search.nominee[0]).take()
    return [torch.tensor(search.order, dtype=torch.int64, device=search.free.device) for search in searches]


class _Search:
    """The picks of one crop, with gains for the image that are evaluated only where they may be the best.

    nominee: what its next token adds to both coverages, minus infinity where no token is left, and that token. Without
    other crops the first is not computed.
    """

    def __init__(self, crop: _Crop, *, competes: bool) -> None:
        self.crop, self.competes = crop, competes
        self.for_text, self.free = crop.for_text, crop.free.clone()
        self.demands = crop.demands.tolist()
        self.lazy = LazyGains(crop.for_image[None], ~crop.free[None])
        self.text_cover = torch.zeros_like(self.for_text[0])
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
        if len(self.order) == self.crop.limit:
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


def _searched_on_device(crops: Sequence[_Crop], k: int) -> list[Tensor]:
    """The same picks, for crops of one size. The host reads how many each crop won, if there are several."""
    search = _DeviceSearch(crops)
    picks, won = [search.count[:, :0]], [search.count[:, :0].bool()]
    for _ in range(k):
        tokens, wins = search.nominees(), None
        if len(crops) > 1:
            added = search.added(tokens)
            wins = added == added.amax(0)
            wins &= wins.cumsum(0) == 1  # the first of equals
            won.append(wins)
        search.take(tokens, wins)
        picks.append(tokens)
    order = torch.cat(picks, 1)
    if len(crops) == 1:
        return [order[0]]
    of_crop = torch.cat(won, 1)
    order = order.gather(1, (~of_crop).int().argsort(dim=1, stable=True))
    return [own[:count] for own, count in zip(order, of_crop.sum(1).tolist(), strict=True)]


class _DeviceSearch:
    """The picks of all crops, with all gains evaluated at each, as tensors that the host does not read.

    matrix, cover: [crops, n, words + n] and [crops, 1, words + n], of both. gains: [2, crops, n]. barred: [crops, n],
    minus infinity for tokens that cannot be picked. count: [crops, 1], picks so far.
    """

    def __init__(self, crops: Sequence[_Crop]) -> None:
        self.words = crops[0].for_text.shape[1]
        self.matrix = torch.stack([torch.cat([crop.for_text, crop.for_image], 1) for crop in crops])
        self.cover, self.buffer = torch.zeros_like(self.matrix[:, :1]), torch.empty_like(self.matrix)
        self.gains = self.matrix.new_empty(2, *self.matrix.shape[:2])
        self.barred = torch.zeros_like(self.gains[0]).masked_fill_(~torch.stack([c.free for c in crops]), -math.inf)
        self.count = torch.zeros(len(crops), 1, dtype=torch.int64, device=self.matrix.device)
        longest = max(crop.limit for crop in crops)
        self.demands = torch.stack([pad(crop.demands, (0, longest - crop.limit)) for crop in crops])
        self.limits = to_device(torch.tensor([[crop.limit] for crop in crops]), self.matrix.device)

    def nominees(self) -> Tensor:
        """The token of each crop, [crops, 1], that is picked next.

        Where no gain is above 0, the highest ones are of the first free token.
        """
        fresh = torch.sub(self.matrix, self.cover, out=self.buffer).relu_()
        torch.sum(fresh[..., : self.words], 2, out=self.gains[0])
        torch.sum(fresh[..., self.words :], 2, out=self.gains[1])
        gain, token = self.gains.add_(self.barred).max(2, keepdim=True)
        (for_text, for_image), (text, image) = gain > 0, token
        lags = self.cover[..., self.words :].sum(2) < self.demands.gather(1, self.count)
        return torch.where(lags, torch.where(for_image, image, text), torch.where(for_text, text, image))

    def added(self, tokens: Tensor) -> Tensor:
        """What nominees [crops, 1] add to both coverages, in float64; minus infinity where no token is left."""
        both = in_float64(self.gains.gather(2, tokens.expand(2, -1, -1))).sum(0)
        return torch.where(self.count < self.limits, both, -math.inf)

    def take(self, tokens: Tensor, wins: Tensor | None) -> None:
        """Pick the nominees [crops, 1] of the crops that win, [crops, 1]; None is of all."""
        taken = self.matrix.gather(1, tokens.unsqueeze(2).expand(-1, -1, self.matrix.shape[2]))
        cover, barred = torch.maximum(self.cover, taken), self.barred.scatter(1, tokens, -math.inf)
        self.cover = cover if wins is None else torch.where(wins.unsqueeze(2), cover, self.cover)
        self.barred = barred if wins is None else torch.where(wins, barred, self.barred)
        self.count = self.count + (1 if wins is None else wins)


def _gate(for_text: Tensor, limits: tuple[float, float]) -> Tensor:
    """The share of the image's best coverage that is demanded: the mean entropy of the words, as a share of the highest
    possible one, within the limits. for_text: [n, words], columns with the sum 1 / words."""
    n, words = for_text.shape
    if n <= 1 or not words:
        return torch.full((), limits[0] if n <= 1 else limits[1], device=for_text.device)
    shares = for_text * words
    entropy = -(shares * (shares + 1e-12).log()).sum(0).mean() / math.log(n)
    return entropy.clamp(*limits)
