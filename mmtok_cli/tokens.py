"""The plain objects that pass between a model and a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from mmtok_cli.values import mirrored, on_host, to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASS_TOKEN = -1  # indices that stand for no place in the image
PADDING = -2
Rows = Literal["queries", "mean", "none"]
GROUP = 2**40  # offset between groups in the sort keys of `Crops.join`, above any rank


@dataclass(frozen=True)
class VisionTokens:
    """The vision tokens of one image, as the encoder left them.

    projected: [tokens, dim], what would enter the language model.
    features: [tokens, vision_dim], the same tokens before the projector.
        Rows without a patch, such as the ends of lines, are zero.
    grid: (rows, columns); token i lies in row i // columns, column i % columns. One row where the tokens form no
        rectangle.
    eligible: [tokens], False where a patch shows nothing but padding that must not be kept, or nothing at all.
    image_id: names the image in the same way in every run; seeded methods draw from it.
    project: the projector, from `features` [rows, vision_dim] to `projected` [rows, dim], for methods that merge.
    signals: what else the method requested of the encoder, by name (see `VisionLanguageModel.signals`).
    crops: the image's crops, each on its own, where the model cuts images into several.
    deepstack: [tokens, dim] for each of the first decoder layers that add something of their own to vision tokens.
    slices: of a video, how many slices in time the tokens are of, equally many each; `grid` then has the rows of all
        slices, one after another. 0 for an image.
    """

    projected: Tensor
    features: Tensor
    grid: tuple[int, int]
    eligible: Tensor
    image_id: str
    project: Callable[[Tensor], Tensor]
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    crops: Crops | None = None
    deepstack: tuple[Tensor, ...] = ()
    slices: int = 0

    @property
    def total(self) -> int:
        return self.projected.shape[0]

    @property
    def eligible_count(self) -> int:
        """How many tokens are eligible, for which the host need not wait where a model made them."""
        return int(on_host(self.eligible).sum())

    @property
    def eligible_places(self) -> Tensor:
        """[eligible], the indices of the eligible tokens, ascending."""
        return mirrored(on_host(self.eligible).nonzero().squeeze(1), self.projected.device)

    def to(self, device: torch.device) -> VisionTokens:
        """The tokens on a device; those that are there already as they are."""
        if self.projected.device == device:
            return self
        return replace(
            self,
            projected=self.projected.to(device),
            features=self.features.to(device),
            eligible=mirrored(on_host(self.eligible), device),
            project=lambda features: self.project(features.to(self.projected.device)).to(device),
            signals={name: signal.to(device) for name, signal in self.signals.items()},
            crops=self.crops and self.crops.to(device),
            deepstack=tuple(layer.to(device) for layer in self.deepstack),
        )

    def scores(self, score: Callable[[VisionTokens], Tensor]) -> Tensor:
        """What `score` gives for the image, [tokens], in float32: for each crop by itself, where there are any.

        Tokens that belong to no crop, such as the ends of lines, get the lowest value.
        """
        import torch

        if self.crops is None:
            return score(self).float()
        values = torch.stack([score(crop).float() for crop in self.crops.tokens]).flatten()
        places = on_host(self.crops.places).flatten()
        shown = mirrored((places >= 0).nonzero().squeeze(1), values.device)
        shown_values = values[shown]
        return shown_values.min().repeat(self.total).index_copy(0, self.crops.places.flatten()[shown], shown_values)


def all_eligible(count: int, device: torch.device) -> Tensor:
    """`VisionTokens.eligible` of an image without padding."""
    import torch

    return mirrored(torch.ones(count, dtype=torch.bool), device)


@dataclass(frozen=True)
class TextTokens:
    """The question that goes with an image.

    embed: turns words into the language model's input embeddings, [text tokens, dim].
    words: what the authors of MMTok cover on models of this family, where those are not the question's key words.
    """

    question: str
    embed: Callable[[Sequence[str]], Tensor]
    words: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Selection:
    """What a method keeps of one image.

    indices: [kept], the places in the image that the kept tokens stand for, in the order in which the tokens enter
        the language model. They ascend, but for methods that put merged tokens last. CLASS_TOKEN and PADDING are
        below zero and stand for no place.
    order: [kept], the same indices in the order in which they were picked, where there is one.
    gains: [kept], what each pick added to the method's objective, in the order of the picks.
    tokens: [kept, dim], rows that stand in for those at `indices` where the method merges or pools.
    merged: [kept], True for rows that are made of several places, where there are any.
    """

    indices: Tensor
    order: Tensor | None = None
    gains: Tensor | None = None
    tokens: Tensor | None = None
    merged: Tensor | None = None

    @property
    def kept(self) -> int:
        return self.indices.shape[0]

    @property
    def places(self) -> Tensor:
        """The places in the image that anything was kept of, ascending."""
        return self.indices[self.indices >= 0].sort().values

    def first(self, count: int) -> Selection:
        """The first `count` picks alone. Raises ValueError for a selection whose picks have no order."""
        if self.order is None:
            raise ValueError("the picks of this selection have no order")
        order, gains = self.order[:count], self.gains
        return Selection(order.sort().values, order, None if gains is None else gains[:count])

    def by_place(self) -> Selection:
        """The same tokens in the order of their places in the image, merged ones among them."""
        order = self.indices.argsort(stable=True)
        return Selection(
            self.indices[order],
            self.order,
            self.gains,
            None if self.tokens is None else self.tokens[order],
            None if self.merged is None else self.merged[order],
        )

    def united(self, other: Selection, vision: VisionTokens) -> Selection:
        """The tokens of this selection and of another one of the same image, each once.

        Places of the image come in its order, then tokens without a place, then merged ones. A place that both keep
        enters as it does here, a token without a place unless there is an equal one.
        """
        import torch

        mine, theirs = (vision.projected[s.indices] if s.tokens is None else s.tokens for s in (self, other))
        known = torch.isin(other.indices, self.indices)
        if bool((other.indices < 0).any()):
            equal = (theirs[:, None] == mine[None]).all(-1).any(1)
            known = torch.where(other.indices < 0, equal, known)
        if bool(known.all()):
            return self
        indices = torch.cat([self.indices, other.indices[~known]])
        merged = torch.cat([self._is_merged, other._is_merged[~known]])
        arrival = torch.arange(len(indices), device=indices.device)
        last = torch.where(merged, 2 * GROUP, GROUP) + arrival
        order = torch.where(merged | (indices < 0), last, indices).argsort(stable=True)
        plain = self.tokens is None and other.tokens is None
        return Selection(
            indices[order],
            tokens=None if plain else torch.cat([mine, theirs[~known].to(mine.dtype)])[order],
            merged=merged[order] if bool(merged.any()) else None,
        )

    @property
    def _is_merged(self) -> Tensor:
        import torch

        return torch.zeros_like(self.indices, dtype=torch.bool) if self.merged is None else self.merged

    @staticmethod
    def everything(vision: VisionTokens) -> Selection:
        import torch

        return Selection(torch.arange(vision.total, device=vision.projected.device))


@dataclass(frozen=True)
class Crops:
    """The crops of one image, each encoded on its own.

    tokens: of each crop, in the order of the prompt (for LLaVA-NeXT, the one that shows the whole image first).
    places: [crops, tokens of a crop], where each token stands among the vision tokens of the unreduced prompt;
        PADDING for those that it leaves out.
    ranks: [crops, tokens of a crop], the order in which kept tokens enter the language model: the first crop, then the
        others as if they were stitched together, row by row.
    """

    tokens: tuple[VisionTokens, ...]
    places: Tensor
    ranks: Tensor

    def to(self, device: torch.device) -> Crops:
        return Crops(tuple(crop.to(device) for crop in self.tokens), self.places.to(device), self.ranks.to(device))

    def split(self, budget: int) -> list[int]:
        """The budget spread evenly over the crops, the first ones taking what is left over.

        What a crop cannot hold without keeping padding goes to the others; together they must hold the budget.
        """
        capacities = [crop.eligible_count for crop in self.tokens]
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
        indices = torch.cat([chosen.indices for chosen in selections])
        rows = [
            crop.projected[chosen.indices] if chosen.tokens is None else chosen.tokens.to(dtype)
            for crop, chosen in zip(self.tokens, selections, strict=True)
        ]
        counts = torch.tensor([chosen.kept for chosen in selections])
        numbers = torch.arange(len(counts)).repeat_interleave(counts)  # of the crops, for each token
        # In the first crop tokens are ordered as they are, in the others those that come last crop by crop.
        lines = torch.arange(len(numbers)) + (numbers > 0) * (numbers * (GROUP // len(counts)))
        number, line = (to_device(each, device) for each in (numbers, lines))
        flat = indices.clamp(min=0) + number * self.places.shape[1]
        places = torch.where(indices < 0, indices, self.places.flatten()[flat])
        keys = GROUP + self.ranks.flatten()[flat]
        keys = torch.where(indices == CLASS_TOKEN, 2 * GROUP + line, keys)
        merged = torch.zeros_like(indices, dtype=torch.bool)
        if any(chosen.merged is not None for chosen in selections):
            merged = torch.cat([chosen._is_merged for chosen in selections])
            plain = torch.zeros(len(counts), dtype=torch.long, device=device).index_add_(0, number, (~merged).long())
            keys = torch.where(merged & (plain[number] > 0), 3 * GROUP + line, keys)
        order = torch.where(number == 0, line, keys).argsort(stable=True)
        return Selection(places[order], tokens=torch.cat(rows)[order], merged=merged[order])


@dataclass(frozen=True)
class Cut:
    """A place between two decoder layers at which vision tokens of an image leave the sequence.

    before: index of the first decoder layer that sees the shorter sequence.
    keep: vision tokens of the image from there on; those that arise by merging count.

    What the choice is made from, besides the tokens themselves; nothing else is computed or held:
    reads: index of the decoder layer whose attention is read, `before - 1` (it has just run) or `before` (it is about
        to run). None: no attention is read.
    rows: the part of that attention which is computed: "queries", the rows of the text tokens that the method's
        `queries` chooses; "mean", the mean over the rows of all tokens of the prompt, summed up a few rows at a time;
        "none", nothing but the keys, where `LayerTokens.keys` is called.
    earlier: indices of decoder layers below `before`, for `LayerTokens.earlier`.
    """

    before: int
    keep: int
    reads: int | None = None
    rows: Rows = "queries"
    earlier: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerTokens:
    """The vision tokens of one image at a cut.

    hidden: [tokens, dim], on their way into the layer `cut.before`.
    attention: [heads, queries, tokens], probabilities (softmax in float32 over the whole sequence) with which the
        method's queries attend to them in the layer `cut.reads`; [heads, 1, tokens], the mean over all tokens of the
        prompt, if `cut.rows` is "mean"; None where the cut reads none.
    rotary_response: gives [queries, tokens], what the layer's attention logits would be if every query and key
        were a vector of ones, so that rotary position alone decides.
    eligible: [tokens], as in VisionTokens. image_id: as in VisionTokens.

    earlier: by the layers in `cut.earlier`, [tokens, dim], the same tokens on their way into that layer. A merged token
        has there what the place that it stands for had before the merge.
    text: gives [text tokens, dim], the text tokens after the image, on their way into the layer `cut.before`.
    keys: gives the keys of the layer `cut.reads`, after the rotary embedding, of the vision tokens and of the text
        tokens after the image: [KV heads, tokens, head dim] and [KV heads, text tokens, head dim].
    norm: the norm behind the last decoder layer, for rows [..., dim].
    vision: the image as it left the encoder, with the method's signals.
    places: [tokens], where in `vision` they stand (below zero for those without a place, as in Selection).
    """

    hidden: Tensor
    attention: Tensor | None
    rotary_response: Callable[[], Tensor]
    eligible: Tensor
    image_id: str
    earlier: Mapping[int, Tensor] = field(default_factory=dict)
    text: Callable[[], Tensor] | None = None
    keys: Callable[[], tuple[Tensor, Tensor]] | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    vision: VisionTokens | None = None
    places: Tensor | None = None
