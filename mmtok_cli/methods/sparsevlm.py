"""SparseVLM: words of the question score the vision tokens in three layers (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, attention_at, highest, ranking, require_layers
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection

if TYPE_CHECKING:
    from torch import Tensor

# Vision tokens kept of 576 behind each of the three layers, as the authors' code lists them for the settings that it
# calls 192, 128, 96 and 64 (the paper's adaptive ratio is not in the code).
V1_COUNTS = ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17))
V2_COUNTS = ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20))
V2_HEADS = 14


@dataclass(frozen=True)
class SparseVLM2(Method):
    """SparseVLM+ (version 2 of the authors' code). The text tokens whose embeddings are closer to the image than
    average are the raters: their attention in each of `layers` scores the vision tokens, and the best go on to the next
    layer.

    As released: positions are kept, attention is divided by the part that comes from the rotary position only, only the
    14 heads with the most attention from raters to the image count, and padding can be selected. The tokens are dropped
    after each of `layers` has run, so with the default the first three layers see all tokens. The authors' settings
    192, 128 and 64 keep 118, 60 and 20 tokens, with layer averages of 206.8, 144.1 and 81.8; here a budget is the
    number of tokens after the last step, and the steps before it are interpolated from the authors' table. Not as
    released: the whole attention matrix is not computed, and batches.
    """

    summary: ClassVar[str] = "key words' attention"
    source: ClassVar[str] = "arXiv 2410.04417"
    venue: ClassVar[str] = "ICML 2025"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    positions: ClassVar[Positions] = "keep"
    keeps_padding: ClassVar[bool] = True
    parameter: ClassVar[str] = "sparsevlm:v2.layers"

    layers: tuple[int, ...] = (2, 6, 15)

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        if len(self.layers) != 3:
            raise MMTokError(f"{self.parameter} needs three layers", f"as in --set {self.parameter}=2,6,15")
        require_layers(self.parameter, self.layers, layers, first=0)
        if budget == total:
            return ()
        counts = self._counts(total, budget)
        return tuple(Cut(layer + 1, keep, reads=layer) for layer, keep in zip(self.layers, counts, strict=True))

    def queries(self, vision: Tensor, text: Tensor) -> Tensor:
        return raters(vision, text)

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        return highest(self._scores(tokens), tokens.eligible, cut.keep)

    def _scores(self, tokens: LayerTokens) -> Tensor:
        attention = attention_at(tokens) / tokens.rotary_response().float()
        return attention[heads_by_attention(attention, V2_HEADS)].mean((0, 1))

    def _counts(self, total: int, budget: int) -> tuple[int, ...]:
        return _on_table(V2_COUNTS, total, budget)


@dataclass(frozen=True)
class SparseVLM(SparseVLM2):
    """SparseVLM (version 1 of the authors' code). The text tokens whose embeddings are closer to the image than average
    are the raters: their attention in each of `layers` scores the vision tokens, and the best go on to the next layer.
    The best 30% of the others are clustered and averaged into a few tokens, which follow them (recycling).

    As released: each shorter sequence is renumbered and decoding continues from its end, padding can be selected, and
    tokens are dropped after each of `layers` has run. The authors' settings 192, 128 and 64 keep 113, 39 and 18 tokens
    including recycled ones, with layer averages of 206.5, 145.4 and 82.3; here a budget includes recycled tokens, and
    the steps before the last are interpolated from the authors' table. Not as released: ties between densities are
    broken by index instead of noise, the whole attention matrix is not computed, and batches work.
    """

    summary: ClassVar[str] = "v2 + recycled tokens"
    positions: ClassVar[Positions] = "renumber"
    parameter: ClassVar[str] = "sparsevlm.layers"

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        import torch

        ranked, total = ranking(self._scores(tokens), tokens.eligible), len(tokens.eligible)
        if cut.keep == total:
            return Selection(torch.arange(total, device=ranked.device))
        kept = kept_before_recycling(total, cut.keep)
        dropped = total - kept
        recycled = ranked[kept : kept + int(dropped * 0.3) + 1]
        merged, centres = cluster_and_merge(tokens.hidden[recycled], _clusters(dropped))
        places = ranked[:kept].sort().values
        indices = torch.cat([places, recycled[centres]])
        is_merged = torch.arange(len(indices), device=indices.device) >= kept
        return Selection(indices, tokens=torch.cat([tokens.hidden[places], merged]), merged=is_merged)

    def _scores(self, tokens: LayerTokens) -> Tensor:
        return attention_at(tokens).mean((0, 1))

    def _counts(self, total: int, budget: int) -> tuple[int, ...]:
        counts: list[int] = []
        for count in _on_table([_with_recycled(row) for row in V1_COUNTS], total, budget):
            before = counts[-1] if counts else total
            counts.append(max(count, _clusters(before)))  # recycling alone leaves so many
        return tuple(counts)


def raters(vision: Tensor, text: Tensor) -> Tensor:
    """The text tokens that score the image: bool [text tokens].

    vision: [tokens, dim], text: [text tokens, dim], input embeddings. Each vision token's affinities are a softmax over
    the text tokens; raters are those with more than the average share. If all are equal, all are raters.
    """
    share = (vision.float() @ text.float().T).softmax(-1).mean(0)
    found = share > share.mean()
    return found | ~found.any()


def heads_by_attention(attention: Tensor, count: int) -> Tensor:
    """The heads with most attention in total, [min(count, heads)] indices. attention: [heads, queries, tokens]."""
    return attention.sum((1, 2)).topk(min(count, attention.shape[0])).indices


def cluster_and_merge(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density-peaks clustering with nearest neighbours, and the mean of each cluster: [clusters, dim], and the indices
    [clusters] of the tokens at their centres.

    A token's density is exp of minus the mean squared distance to its `clusters` nearest (itself included). Centres are
    those with the largest product of density and distance to the nearest denser token; the others join the nearest
    centre. tokens: [tokens, dim].
    """
    import torch

    points = tokens.float()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[1] ** 0.5
    density = (-distance.topk(clusters, largest=False).values.square().mean(-1)).exp()
    index = torch.arange(len(tokens), device=tokens.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (index[None] < index[:, None]))
    isolation = torch.where(denser, distance, distance.max()).min(-1).values
    centres = (isolation * density).topk(clusters).indices
    member = distance[centres].argmin(0)
    member[centres] = torch.arange(clusters, device=tokens.device)
    sums = torch.zeros(clusters, points.shape[1], device=tokens.device).index_add_(0, member, points)
    sizes = sums.new_zeros(clusters).index_add_(0, member, sums.new_ones(len(points)))
    return (sums / sizes[:, None]).to(tokens.dtype), centres


def _clusters(dropped: int) -> int:
    """Number of recycled tokens made from `dropped` ones."""
    return (int(dropped * 0.3) + 1) // 10 + 1 if dropped else 0


def kept_before_recycling(total: int, keep: int) -> int:
    """How many of `total` tokens are kept unmerged if `keep` includes the recycled ones."""
    return next(kept for kept in range(keep, -1, -1) if kept + _clusters(total - kept) == keep)


def _with_recycled(kept: tuple[int, ...]) -> tuple[int, ...]:
    counts = [576]
    for each in kept:
        counts.append(each + _clusters(counts[-1] - each))
    return tuple(counts[1:])


def _on_table(table: tuple[tuple[int, ...], ...] | list[tuple[int, ...]], total: int, budget: int) -> tuple[int, ...]:
    """Token counts after each layer, ending in `budget`, interpolated between the rows of a table for 576 tokens."""
    import numpy as np

    rows = sorted([(0, 0, 0), *table, (576, 576, 576)], key=lambda row: row[-1])
    last = [row[-1] for row in rows]
    counts = [budget]
    for column in (1, 0):
        share = np.interp(budget / total * 576, last, [row[column] for row in rows]) / 576
        counts.insert(0, max(round(total * float(share)), counts[0]))
    return tuple(counts)
