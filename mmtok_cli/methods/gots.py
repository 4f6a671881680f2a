"""GOTS: greedy orthogonal token selection, a QR decomposition with pivoting (arXiv 2607.23913)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, by_order, excluded_of
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class GOTS(Method):
    """Keeps the tokens whose features span the most: each pick is the token with the largest part outside the span of
    those before it.

    As in the authors' release: features are those before the projector, not normalised, one row for each token (the
    mean of the four patches of a Qwen token, the shuffled patches of an InternVL token), computed in float32; all crops
    of an image compete for one budget; a percentage is rounded down. Not as released: once the picks explain the
    features up to rounding (a residual energy below 1e-6 of the largest squared norm), the others follow by descending
    norm. The release goes on with noise there, which gives repeated tokens and NaN, always when more tokens are kept
    than features are wide. The release is for Qwen and InternVL; in LLaVA models padding and the ends of lines, which
    have no features, are not kept.
    """

    summary: ClassVar[str] = "spans the features"
    source: ClassVar[str] = "arXiv 2607.23913"
    venue: ClassVar[str] = "preprint 2026"
    licence: ClassVar[str] = "Apache-2.0, no file"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    nested: ClassVar[bool] = True

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        from mmtok_cli.methods.pivoted_qr import pivoted_rows

        order, _ = pivoted_rows([image.features for image in vision], budget, excluded_of(vision))
        return by_order(order)  # its energies are factors of a volume, not sums
