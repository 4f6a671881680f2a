"""Images that a model cuts into crops: a budget split over them, and what was kept of each joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError
from mmtok_cli.tokens import CLASS_TOKEN, Selection, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 2**40  # above any rank


@dataclass(frozen=True)
class Crops:
    """The crops of one image, each encoded on its own.

    tokens: of each crop, the one that shows the whole image first.
    places: [crops, tokens of a crop], where each token stands among the vision tokens of the unreduced prompt;
        PADDING for those that it leaves out.
    ranks: [crops, tokens of a crop], the order in which kept tokens enter the language model: the first crop, then the
        others as if they were stitched together, row by row.
    """

    tokens: tuple[VisionTokens, ...]
    places: Tensor
    ranks: Tensor

    def split(self, budget: int) -> list[int]:
        """The budget spread evenly over the crops, the first ones taking what is left over.

        What a crop cannot hold without keeping padding goes to the others. Raises MMTokError for more than all can.
        """
        capacities = [int(crop.eligible.sum()) for crop in self.tokens]
        if budget > sum(capacities):
            raise MMTokError(
                f"the budget of {budget} is more than the {sum(capacities)} vision tokens of the image's crops "
                "that are not padding",
                f"choose 1 to {sum(capacities)}, or 100%",
            )
        shares = [0] * len(capacities)
        while left := budget - sum(shares):
            open_crops = [i for i, capacity in enumerate(capacities) if shares[i] < capacity]
            for rank, i in enumerate(open_crops):
                share = left // len(open_crops) + (rank < left % len(open_crops))
                shares[i] += min(share, capacities[i] - shares[i])
        return shares

    def join(self, selections: Sequence[Selection]) -> Selection:
        """One selection of the image from those of its crops, ordered as the releases of MMTok and VisionZip do it.

        The first crop's tokens come first, as they are. Of the others come the patches row by row over all crops, then
        their class tokens, then what was merged, crop by crop. Where a method merges everything, as pooling does, its
        tokens are ordered as patches are. No line of the stitched crops gets a token at its end.
        """
        import torch

        device, dtype = self.places.device, self.tokens[0].projected.dtype
        rows, places, merged, keys = [], [], [], []
        for number, (crop, chosen) in enumerate(zip(self.tokens, selections, strict=True)):
            indices, at = chosen.indices, chosen.indices.clamp(min=0)
            is_merged = torch.zeros_like(indices, dtype=torch.bool) if chosen.merged is None else chosen.merged
            rows.append(crop.projected[indices] if chosen.tokens is None else chosen.tokens.to(dtype))
            places.append(torch.where(indices < 0, indices, self.places[number][at]))
            merged.append(is_merged)
            line = torch.arange(len(indices), device=device)
            if number > 0:
                by_crop = number * (GROUP // len(self.tokens)) + line
                line = GROUP + self.ranks[number][at]
                line = torch.where(indices == CLASS_TOKEN, 2 * GROUP + by_crop, line)
                if not bool(is_merged.all()):
                    line = torch.where(is_merged, 3 * GROUP + by_crop, line)
            keys.append(line)
        order = torch.cat(keys).argsort(stable=True)
        return Selection(torch.cat(places)[order], tokens=torch.cat(rows)[order], merged=torch.cat(merged)[order])
