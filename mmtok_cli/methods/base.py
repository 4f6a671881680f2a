"""What a reduction method is: a small frozen dataclass whose fields are its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens


@dataclass(frozen=True)
class Method:
    """One way to reduce vision tokens. Override the hook at which the method acts; the others keep everything.

    The class attributes are what `mmtok methods` prints; `signals` names what the method must see of the encoder
    beside the tokens themselves, and nothing is computed that no method asked for.
    """

    summary: ClassVar[str]
    source: ClassVar[str] = ""
    acts: ClassVar[str] = "between encoder and language model"
    reads_question: ClassVar[bool] = False
    takes_budget: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = ()

    def resize(self, grid: tuple[int, int], budget: int, aspect: float) -> tuple[int, int]:
        """The (rows, columns) of vision tokens at which the image is to be encoded.

        grid: what the model would encode it at; aspect: the image's height over its width.
        """
        return grid

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        """Choose `budget` of the image's vision tokens."""
        return Selection.everything(vision)

    def select_batch(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
    ) -> list[Selection]:
        """`select` for each image; override it where a batch can be done in one go. Results must not differ."""
        return [self.select(v, t, budget) for v, t, budget in zip(vision, text, budgets, strict=True)]


def require_eligible(vision: VisionTokens, budget: int) -> None:
    """Refuse a budget above the tokens that show something of the image.

    Raises MMTokError with the feasible range.
    """
    eligible = int(vision.eligible.sum())
    if budget > eligible:
        raise MMTokError(
            f"the budget of {budget} is more than the {eligible} vision tokens of {vision.image_id} "
            "that are not padding",
            f"choose 1 to {eligible}, or all {vision.total}",
        )
