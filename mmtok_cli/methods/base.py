"""What a reduction method is: a small frozen dataclass whose fields are its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection, TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One way to reduce vision tokens. Override the hook at which the method acts; the others keep everything.

    Before the encoder that is `resize`, behind it `select`, and inside the language model `cuts` with `choose`.

    The class attributes are what `mmtok methods` prints, and what the released track has to know:
    reads_question: what is dropped depends on the question, so that a second one may not find what it needs.
    signals: what the method must see of the encoder beside the tokens; nothing is computed that no method asked for.
    signals_without_class_token: what it reads instead of an encoder that has no class token, if it can.
    per_crop: where a model cuts an image into crops, the method chooses in each of them on its own, as authors do who
        act on the encoder's output (see `across_crops`); otherwise in the packed sequence, ends of lines included.
    positions: whether the authors' code leaves kept tokens at their positions or renumbers them.
    keeps_padding: the authors' code lets padding compete for the budget.
    matrices: what choosing holds at once that grows with the square of the tokens, in float32 matrices of all tokens
        against all; for knowing whether it fits before it starts.
    """

    summary: ClassVar[str]
    source: ClassVar[str] = ""
    acts: ClassVar[str] = "between encoder and language model"
    reads_question: ClassVar[bool] = False
    training_free: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = ()
    signals_without_class_token: ClassVar[tuple[str, ...]] = ()
    per_crop: ClassVar[bool] = False
    positions: ClassVar[Positions] = "renumber"
    keeps_padding: ClassVar[bool] = False
    matrices: ClassVar[float] = 0

    def count(self, share: float, total: int) -> int:
        """How many of `total` vision tokens a share is (0.1 for 10 %), rounded as the authors' code does.

        Used on the released track; the harmonised track rounds the shares of all methods down. Default: MMTok's rule,
        which truncates the floating-point product (0.29 of 100 is 28).
        """
        return int(share * total)

    def resize(self, total: int, budget: int) -> int | None:
        """How many vision tokens a smaller version of the image is to have when it is encoded; None leaves it as it is.

        total: what the image has as it is. The model makes the image smaller, with its aspect ratio in mind.
        """
        return None

    def across_crops(self, crops: Sequence[VisionTokens]) -> Sequence[VisionTokens]:
        """The crops of one image as `select` is to see them; override it where a choice depends on the other crops.

        Called for methods that are `per_crop`, once for each image. Results belong in the crops' `signals`.
        """
        return crops

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        """Choose `budget` of the image's vision tokens."""
        return Selection.everything(vision)

    def select_batch(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
    ) -> list[Selection]:
        """`select` for each image; override it where a batch can be done in one go. Results must not differ."""
        return [self.select(v, t, budget) for v, t, budget in zip(vision, text, budgets, strict=True)]

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        """Where inside the language model an image of `total` vision tokens is cut down to `budget`.

        layers: how many decoder layers the model has. The cuts' layers ascend; no cut leaves the image whole.
        Raises MMTokError where the model has too few layers for the method's parameters.
        """
        return ()

    def queries(self, vision: Tensor, text: Tensor) -> Tensor:
        """Which tokens behind the image ask for it: [queries] indices into `text`. Default: the last alone.

        vision: [tokens, dim], text: [text tokens, dim], embeddings as they enter the first decoder layer.
        """
        import torch

        return torch.tensor([len(text) - 1], device=text.device)

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        """Which of the image's vision tokens go on at a cut, `cut.keep` of them; indices count those at the cut."""
        raise MMTokError(
            f"{type(self).__name__} cuts inside the language model, but says not what to keep there",
            "this is a defect of the method: it must override `choose`",
        )


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


def require_layers(parameter: str, given: Sequence[int], layers: int, first: int = 1) -> None:
    """Refuse the places of cuts that a model of so many decoder layers does not have.

    parameter: as the user sets it. given: its value, ascending. first: the lowest that it may hold; the highest leaves
    one layer behind the last cut. Raises MMTokError with the range.
    """
    last = layers - 2 + first
    if not given or sorted(set(given)) != list(given) or not first <= given[0] <= given[-1] <= last:
        example = ",".join(str(first + i) for i in range(min(len(given), last - first + 1)))
        raise MMTokError(
            f"{parameter}={','.join(map(str, given))} does not fit a language model of {layers} layers",
            f"choose from {first} to {last}, ascending, as in --set {parameter}={example}",
        )


def attention_at(tokens: LayerTokens) -> Tensor:
    """The attention that a cut asked for, [heads, queries, tokens]. Raises ValueError for a cut that read none."""
    if tokens.attention is None:
        raise ValueError("the choice is made from a layer's attention, and its cut read none")
    return tokens.attention


def ranking(scores: Tensor, eligible: Tensor) -> Tensor:
    """All tokens [tokens] by descending score, those that are not eligible last.

    Of equal scores the first goes first, on every device.
    """
    return scores.float().masked_fill(~eligible, float("-inf")).argsort(descending=True, stable=True)


def highest(scores: Tensor, eligible: Tensor, keep: int) -> Selection:
    """The first `keep` tokens of the `ranking`."""
    order = ranking(scores, eligible)[:keep]
    return Selection(order.sort().values, order=order)
