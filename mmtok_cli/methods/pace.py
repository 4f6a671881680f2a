"""PACE: attention in the language model and in the encoder, weighted by their spread (arXiv 2608.27206, EMNLP 2026
Findings)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, attention_at, highest, known, require_layers
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Rows, Selection, VisionTokens
from mmtok_cli.values import on_host, to_device

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-6  # added to the range of scores


@dataclass(frozen=True)
class PACE(Method):
    """Runs `layer` decoder layers on every token, then keeps the vision tokens with the highest sum of two scores: the
    attention that they receive in the last of these layers, averaged over heads and all tokens of the prompt, and the
    attention that they receive in the encoder. Both are scaled to 0..1; their weights are a softmax over their standard
    deviations divided by `temperature` (the authors' DDAE).

    This is the half of PACE that acts inside the language model, not the half that makes the image smaller before the
    encoder (APC). With `last_query_only` only the last token of the prompt attends.

    As released (for Qwen2.5-VL): the attention over all rows favours early tokens, which more tokens can see, and
    positions are kept. The encoder's attention is `received_attention`: of the last block, averaged over heads, queries
    and the patches of a token. On LLaVA families, for which there is no release, it is that of the layer that the
    features come from, with the class token among the queries; crops are scaled together, and ends of lines get the
    lowest score. Not as released: the attention matrix is not held but summed up, 32 MiB at a time, which takes about
    as long as the layer's own attention; a single token is not scored (the standard deviation of one is NaN there);
    several images have a budget each, and batches work. Of equal scores the first token is kept.
    """

    summary: ClassVar[str] = "attention, LM and encoder"
    source: ClassVar[str] = "arXiv 2608.27206"
    venue: ClassVar[str] = "EMNLP 2026 Findings"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = ("received_attention",)
    positions: ClassVar[Positions] = "keep"
    keeps_padding: ClassVar[bool] = True

    layer: int = 2
    temperature: float = 0.5
    last_query_only: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"pace.temperature must be above 0, not {self.temperature}")

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        return max(1, int(total * share))

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        require_layers("pace.layer", (self.layer,), layers)
        rows: Rows = "queries" if self.last_query_only else "mean"
        return (Cut(self.layer, budget, reads=self.layer - 1, rows=rows),) if budget < total else ()

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        read = attention_at(tokens).mean((0, 1))
        seen = saliency(known(tokens.vision, "vision"), known(tokens.places, "places"))
        return highest(self.fused(read, seen, tokens.eligible), tokens.eligible, cut.keep)

    def fused(self, read: Tensor, seen: Tensor | None, eligible: Tensor) -> Tensor:
        """The score of each token: [tokens].

        read, seen: [tokens], attention received in the language model and in the encoder; without the latter, the
        former decides. eligible: [tokens], those that ranges and deviations are taken over.
        """
        import torch

        if seen is None:
            return scaled(read, eligible)
        scores = torch.stack([scaled(read, eligible), scaled(seen, eligible)])
        return self.weights(scores[:, _places(eligible)]) @ scores

    def weights(self, scores: Tensor) -> Tensor:
        """The share of each score, [2]. scores: [2, tokens], scaled. A single token has no spread: equal shares."""
        if scores.shape[1] < 2:
            return scores.new_full((2,), 0.5)
        return (scores.std(1) / self.temperature).softmax(0)


def saliency(vision: VisionTokens, places: Tensor) -> Tensor | None:
    """The attention that the tokens at [tokens] places receive in the encoder: [tokens]; None without a signal."""
    shown = vision if vision.crops is None else vision.crops.tokens[0]
    if "received_attention" not in shown.signals:
        return None
    return vision.scores(lambda crop: crop.signals["received_attention"])[places]


def scaled(scores: Tensor, eligible: Tensor) -> Tensor:
    """Scores [tokens] such that those of eligible tokens go from 0 to just below 1."""
    low, high = scores[_places(eligible)].aminmax()
    return (scores - low) / (high - low + FLOOR)


def _places(eligible: Tensor) -> Tensor:
    """The indices of the eligible tokens, of which the host knows how many there are."""
    return to_device(on_host(eligible).nonzero().squeeze(1), eligible.device)
