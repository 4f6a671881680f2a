"""StackTok: MMTok's two coverages side by side, with a gate between them (arXiv 2609.16841)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method
from mmtok_cli.methods.keywords import keywords
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import mirrored, on_host

Swap = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class StackTok(Method):
    """Picks tokens for the words of the question, and for the image wherever its coverage falls behind a share of what
    greedy selection for the image alone would reach.

    That share, between `beta_min` and `beta_max`, is the mean entropy of the words' attention to the image: a question
    that points to few tokens leaves the image less. As in the authors' release: everything is float32, the first pick
    is always for the question, crops of an image compete for one budget, each with a gate of its own, and where at most
    16 tokens of a crop are picked, each of them is exchanged once for the token that raises both coverages most. The
    words are those that mmtok covers, padding is never kept on LLaVA-1.5, and the number of tokens of a percentage is
    truncated. Not as released: several crops always compete; the release has a switch that drops all but the first.
    InternVL's tiles are crops here.

    tau_text, tau_vision: temperatures of the softmax over similarities, 0.02 and 0.2 on all models, as released.
    swap: whether tokens are exchanged at the end: `auto`, as released, `always`, or `never`.
    """

    summary: ClassVar[str] = "mmtok with a gate"
    source: ClassVar[str] = "arXiv 2609.16841"
    venue: ClassVar[str] = "preprint 2026"
    licence: ClassVar[str] = "Apache-2.0, no file"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    per_crop: ClassVar[bool] = True
    matrices: ClassVar[float] = 1.25

    tau_text: float = 0.02
    tau_vision: float = 0.2
    beta_min: float = 0.3
    beta_max: float = 0.9
    swap: Swap = "auto"

    def __post_init__(self) -> None:
        if not (self.tau_text > 0 and self.tau_vision > 0):
            raise MMTokError(
                f"tau_text {self.tau_text} and tau_vision {self.tau_vision} must be above 0",
                "the defaults are 0.02 and 0.2",
            )
        if not 0 <= self.beta_min <= self.beta_max <= 1:
            raise MMTokError(
                f"beta_min {self.beta_min} and beta_max {self.beta_max} are not in order between 0 and 1",
                "the defaults are 0.3 and 0.9",
            )

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        if budget == vision.total:
            return Selection.everything(vision)
        return self.select_crops([vision], text, budget)[0]

    def select_crops(self, crops: Sequence[VisionTokens], text: TextTokens, budget: int) -> list[Selection]:
        from mmtok_cli.methods.gated_coverage import gated_coverage

        words = text.embed(keywords(text.question) if text.words is None else text.words)
        found = gated_coverage(
            words,
            [crop.projected for crop in crops],
            [crop.features for crop in crops],
            budget,
            excluded=[mirrored(~on_host(crop.eligible), crop.eligible.device) for crop in crops],
            text_temperature=self.tau_text,
            vision_temperature=self.tau_vision,
            beta=(self.beta_min, self.beta_max),
            swap=self.swap,
        )
        return [Selection(crop.order.sort().values, crop.order) for crop in found]
