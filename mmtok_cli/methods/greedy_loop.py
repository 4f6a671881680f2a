"""MMTok's selection as in algorithm 2 of the paper and the authors' release, to compare its time with ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.mmtok import MMTok

if TYPE_CHECKING:
    from torch import Tensor

    from mmtok_cli.methods.coverage import Coverage


@dataclass(frozen=True)
class GreedyLoop(MMTok):
    """Selects the same tokens as mmtok, but evaluates the gain of every token at each pick, as the authors' release
    does.

    That takes O(k n (m + n)) for k of n vision tokens and m words. The matrix is also built as released: similarities,
    softmax and concatenation out of place, one image after the other, and the loop is compiled by TorchScript. Near
    ties may be decided differently, since sums in another order differ in the last digit.
    """

    summary: ClassVar[str] = "mmtok's, as released"
    matrices: ClassVar[float] = 2.25

    def cover(
        self,
        words: Sequence[Tensor] | None,
        projected: Tensor,
        features: Tensor | None,
        budget: int,
        excluded: Tensor,
    ) -> Coverage:
        import torch

        from mmtok_cli.methods.coverage import Coverage
        from mmtok_cli.methods.plain_loop import compiled_loop, plain_matrix

        found = []
        for i in range(len(projected)):
            text = None if words is None else words[i]
            patches = None if features is None else features[i]
            matrix = plain_matrix(
                text,
                projected[i],
                patches,
                alpha=self.alpha,
                text_temperature=self.text_temperature,
                vision_temperature=self.vision_temperature,
            )
            found.append(compiled_loop()(matrix, budget, excluded[i]))
        order, gains = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Coverage(order.sort().values, order, gains)
