"""Where a model and a method meet: sample -> prepare -> encode -> select -> prefill -> decode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmtok_cli.budget import Budget, TokenCounts, rectangle
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import cache_bytes, decode, prefill
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import Method, require_eligible
from mmtok_cli.models.base import Grid, Prompt, Stage, VisionLanguageModel, unwatched
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage
from mmtok_cli.rules import Positions, Rules, Track
from mmtok_cli.tokens import Cut, Selection, TextTokens, VisionTokens

STAGES = ("prepare", "encode", "select", "prefill", "decode")
RELEASED = Rules()


@dataclass(frozen=True)
class Reduced:
    """A prompt on its way into the language model.

    inputs: arguments of the model's forward. vision, selections: one for each image, `selections` before any cut
    inside the language model. cuts: the images that are to be cut there. tokens: one for each sample.
    """

    prompt: Prompt
    vision: list[VisionTokens]
    selections: list[Selection]
    inputs: dict[str, Any]
    cuts: list[CutImage]
    positions: Positions
    tokens: list[TokenCounts]


@dataclass(frozen=True)
class Answers:
    """What the model said to a batch of samples.

    texts: one for each sample. token_ids: [batch, steps], padded after the end of each answer. first_logits: [batch,
    vocabulary], those of the first new token. kv_cache_bytes: the keys and values of all layers after the last token.
    selections: what was kept of each image behind the last reduction.
    """

    texts: list[str]
    token_ids: Tensor
    first_logits: Tensor
    kv_cache_bytes: int
    selections: list[Selection]
    reduced: Reduced


@torch.inference_mode()
def reduce(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    rules: Rules = RELEASED,
    stage: Stage = unwatched,
    grids: Sequence[Grid] | None = None,
) -> Reduced:
    """Encode the samples' images and keep the vision tokens that the method chooses before the language model.

    `budget` may be None for methods that take none. What a method drops inside the language model is dropped by the
    forward pass within `inside`. grids: one for each image, in place of the model's own choice; a budget is then one
    of the grid's tokens. Raises MMTokError where a budget cannot be met.
    """
    images = [image for sample in samples for image in sample.images]
    positions = _positions(model, method, rules)
    signals = method.signals if model.has_class_token else method.signals_without_class_token or method.signals
    with stage("prepare"):
        totals, keep, sizes = _plan(model, method, images, budget, rules, grids)
        prompt = model.prepare(
            [s.question for s in samples], [s.images for s in samples], [s.image_ids for s in samples], sizes
        )
    with stage("encode"):
        vision = model.encode(prompt, signals, stage=stage)
    with stage("select"):
        # A method that acts before the encoder has met the budget by now.
        left = [min(kept, v.total) for kept, v in zip(keep, vision, strict=True)]
        seen = [_as_seen(v, method, rules.track) for v in vision]
        selections = _select(method, seen, model.text_tokens(prompt, rules.track), left)
        inputs = model.assemble(prompt, vision, selections, positions)
        cuts = [_cuts(method, s.kept, kept, model) for s, kept in zip(selections, keep, strict=True)]
        if rules.budget_means == "layer-average" and any(
            cut and s.kept < v.total for cut, s, v in zip(cuts, selections, vision, strict=True)
        ):
            raise MMTokError(
                "a layer average is no budget for a method that drops tokens both before and inside the language model",
                "use --budget-means final",
            )
        plans = _cut_images(model, method, seen, selections, cuts, inputs) if any(cuts) else []
    counts = _count_tokens(prompt, totals, selections, cuts, inputs, model.layer_count)
    return Reduced(prompt, vision, selections, inputs, plans, positions, counts)


def check_budget(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    rules: Rules = RELEASED,
    grids: Sequence[Grid] | None = None,
) -> None:
    """Refuse a budget that the method cannot meet on these samples, before anything slow happens.

    What depends on the pictures themselves, such as their padding, is refused by `reduce`. Raises MMTokError.
    """
    images = [image for sample in samples for image in sample.images]
    for total, kept in set(zip(*_plan(model, method, images, budget, rules, grids)[:2], strict=True)):
        _cuts(method, total, kept, model)


def inside(
    model: VisionLanguageModel, reduced: Reduced, *, stage: Stage = unwatched
) -> AbstractContextManager[Inside | None]:
    """The context within which the prompt is to be read and answered, by forward passes or by `generate`.

    Time spent on choosing tokens inside the language model is spent in `stage("select")`. None where the method makes
    no cut there. To be used within `torch.inference_mode()` or `torch.no_grad()`.
    """
    if not reduced.cuts:
        return nullcontext()
    return model.inside(reduced.inputs["attention_mask"], reduced.cuts, reduced.positions, stage)


@torch.inference_mode()
def answer(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    rules: Rules = RELEASED,
    max_new_tokens: int = 32,
    stage: Stage = unwatched,
) -> Answers:
    """Answer a batch of questions greedily from reduced images.

    Raises MMTokError where a budget cannot be met or the prompt is longer than the model can read.
    """
    reduced = reduce(model, method, samples, budget, rules=rules, stage=stage)
    length = reduced.inputs["input_ids"].shape[1]
    if length + max_new_tokens > model.context_length:
        raise MMTokError(
            f"the prompt of {length} tokens and an answer of up to {max_new_tokens} do not fit into the "
            f"{model.context_length} tokens that {model.name} can read",
            "shorten the question, or lower --budget or --max-new-tokens",
        )
    with inside(model, reduced, stage=stage) as cut:
        with stage("prefill"):
            first_logits, cache = prefill(model, reduced.inputs)
        with stage("decode"):
            token_ids = decode(model, reduced.inputs, first_logits, cache, max_new_tokens)
    kv_cache = cache_bytes(cache, model.layer_count - model.loaded_layers)
    texts = [text.strip() for text in model.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
    selections = reduced.selections
    if cut:  # counted among the tokens that entered the language model
        pairs = zip(reduced.selections, cut.selections, strict=True)
        selections = [Selection(entered.indices[left.indices], merged=left.merged) for entered, left in pairs]
    return Answers(texts, token_ids, first_logits, kv_cache, selections, reduced)


def layer_average(total: int, cuts: Sequence[Cut], layers: int) -> float:
    """Vision tokens of an image on average over the decoder layers; it enters them with `total`."""
    starts = [0, *(cut.before for cut in cuts), layers]
    counts = [total, *(cut.keep for cut in cuts)]
    return sum(n * (end - start) for n, start, end in zip(counts, starts, starts[1:], strict=False)) / layers


def _plan(
    model: VisionLanguageModel,
    method: Method,
    images: Sequence[Image],
    budget: Budget | None,
    rules: Rules,
    grids: Sequence[Grid] | None,
) -> tuple[list[int], list[int], list[Grid | None]]:
    """For each image its vision tokens, how many of them are to be kept, and the grid at which it is to be encoded
    where that is not the model's own choice."""
    totals = [rows * columns for rows, columns in grids] if grids else [model.total(image) for image in images]
    if budget is None:
        keep = totals
    elif rules.track == "released" and budget.percent is not None:
        keep = [budget.resolve(total, method.count) for total in totals]
    elif grids:
        keep = [budget.resolve(total) for total in totals]
    else:
        keep = [model.keep(image, budget, rules.track) for image in images]
    if rules.budget_means == "layer-average" and budget is not None:
        keep = [final_count(method, kept, n, model.layer_count) for kept, n in zip(keep, totals, strict=True)]
    wanted = [method.resize(total, kept) for total, kept in zip(totals, keep, strict=True)]
    given: Sequence[Grid | None] = grids or [None] * len(images)
    sizes: list[Grid | None] = []
    for image, tokens, grid in zip(images, wanted, given, strict=True):
        if tokens is None:
            sizes.append(grid)
        elif grid is None:
            sizes.append(model.smaller(image, tokens))
        else:
            sizes.append(rectangle(tokens, grid, grid[0] / grid[1]))
    return totals, keep, sizes


def _positions(model: VisionLanguageModel, method: Method, rules: Rules) -> Positions:
    """The position policy of a method on a model. Raises MMTokError for one that the model cannot follow."""
    if rules.positions is None:
        usual = model.positions[0] if rules.track == "harmonised" else method.positions
        return usual if usual in model.positions else model.positions[0]
    if rules.positions not in model.positions:
        raise MMTokError(
            f"positions of the {model.family} family cannot be counted anew: they say where in the image a token lies",
            "use --positions keep",
        )
    return rules.positions


def _select(
    method: Method, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
) -> list[Selection]:
    """What the method keeps of each image; crop by crop where the model cuts images and the method sees crops.

    Images of which everything is kept stay whole, with the ends of lines that no crop has.
    """
    if method.signals and not method.per_crop and any(v.crops for v in vision):
        raise MMTokError(
            f"{type(method).__name__} reads signals of the encoder, which this model has for each crop of an image",
            "this is a defect of the method: it must set per_crop",
        )
    shares = [
        v.crops.split(budget) if method.per_crop and v.crops and budget < v.total else None
        for v, budget in zip(vision, budgets, strict=True)
    ]
    units: list[tuple[VisionTokens, TextTokens, int]] = []
    for v, t, budget, share in zip(vision, text, budgets, shares, strict=True):
        if share is None or v.crops is None:
            units.append((v, t, budget))
        else:
            crops = method.across_crops(v.crops.tokens)
            units += [(crop, t, n) for crop, n in zip(crops, share, strict=True) if n]
    chosen = iter(method.select_batch(*map(list, zip(*units, strict=True))))
    selections = []
    for v, share in zip(vision, shares, strict=True):
        if share is None or v.crops is None:
            selections.append(next(chosen))
        else:
            nothing = Selection(torch.empty(0, dtype=torch.int64, device=v.projected.device))
            selections.append(v.crops.join([next(chosen) if n else nothing for n in share]))
    return selections


def _cuts(method: Method, entering: int, keep: int, model: VisionLanguageModel) -> tuple[Cut, ...]:
    """The method's cuts of an image of which so many tokens enter the language model.

    Raises MMTokError naming the method where they make no sense, and where they lie beyond the layers that are run.
    """
    layers = model.layer_count
    cuts, before, tokens = method.cuts(entering, keep, layers), 0, entering
    for cut in cuts:
        follows = before < cut.before < layers and 1 <= cut.keep <= tokens
        if not follows or cut.reads not in (None, cut.before - 1, cut.before):
            raise MMTokError(
                f"{type(method).__name__} makes an impossible cut of {tokens} tokens among {layers} layers: {cut}",
                "this is a defect of the method: cuts ascend, keep 1 token or more and none that has left, and read "
                "the layer in front of them or the one behind",
            )
        before, tokens = cut.before, cut.keep
    if cuts and cuts[0].before < model.first_cut:
        raise MMTokError(
            f"{type(method).__name__} drops tokens before layer {cuts[0].before + 1}, and the first {model.first_cut} "
            f"decoder layers of {model.name} add to all vision tokens (DeepStack)",
            "let it cut later; `mmtok methods` followed by its name shows the parameter",
        )
    if before >= model.loaded_layers:
        raise MMTokError(
            f"{type(method).__name__} drops tokens before layer {before + 1} of {layers}, and only "
            f"{model.loaded_layers} are run",
            f"use --layers {before + 1} or more",
        )
    return cuts


@lru_cache(maxsize=1024)
def final_count(method: Method, wanted: int, total: int, layers: int) -> int:
    """How many tokens behind the last cut bring the layer average nearest to the one that is wanted.

    Raises MMTokError with the range where the layers before the first cut alone are too many.
    """
    if not method.cuts(total, 1, layers):
        return wanted
    averages = {n: layer_average(total, method.cuts(total, n, layers), layers) for n in range(1, total + 1)}
    lowest = min(averages.values())
    if wanted < lowest:
        raise MMTokError(
            f"a layer average of {wanted} vision tokens cannot be reached: one token behind the cut still makes "
            f"{lowest:.1f}",
            f"choose {math.ceil(lowest)} to {total}, cut in an earlier layer, or count with --budget-means final",
        )
    return min(averages, key=lambda n: abs(averages[n] - wanted))


def _as_seen(vision: VisionTokens, method: Method, track: Track) -> VisionTokens:
    """The vision tokens as the track shows them to the method."""
    if vision.crops and method.per_crop:
        crops = [_as_seen(crop, method, track) for crop in vision.crops.tokens]
        if track == "released":  # no release leaves out the padding of crops
            crops = [replace(crop, eligible=torch.ones_like(crop.eligible)) for crop in crops]
        return replace(vision, crops=replace(vision.crops, tokens=tuple(crops)))
    if track == "harmonised":
        signals = {name: signal.float() for name, signal in vision.signals.items()}
        return replace(vision, projected=vision.projected.float(), features=vision.features.float(), signals=signals)
    if method.keeps_padding:
        return replace(vision, eligible=torch.ones_like(vision.eligible))
    return vision


def _cut_images(
    model: VisionLanguageModel,
    method: Method,
    vision: Sequence[VisionTokens],
    selections: Sequence[Selection],
    cuts: Sequence[tuple[Cut, ...]],
    inputs: dict[str, Any],
) -> list[CutImage]:
    for v, s, cut in zip(vision, selections, cuts, strict=True):
        if cut and s.kept == v.total:
            require_eligible(v, cut[-1].keep)
    starts = model.image_starts(inputs["input_ids"], [s.kept for s in selections])
    return [
        CutImage(row, start, v.eligible[s.indices] | (s.indices < 0), v.image_id, cut, method.queries, method.choose)
        for (row, start), v, s, cut in zip(starts, vision, selections, cuts, strict=True)
    ]


def _count_tokens(
    prompt: Prompt,
    totals: Sequence[int],
    selections: Sequence[Selection],
    cuts: Sequence[tuple[Cut, ...]],
    inputs: dict[str, Any],
    layers: int,
) -> list[TokenCounts]:
    lengths = inputs["attention_mask"].sum(1).tolist()
    counts = []
    for row, length in enumerate(lengths):
        mine = [i for i, owner in enumerate(prompt.owners) if owner == row]
        counts.append(
            TokenCounts(
                total=sum(totals[i] for i in mine),
                kept=sum(cuts[i][-1].keep if cuts[i] else selections[i].kept for i in mine),
                text=length - sum(selections[i].kept for i in mine),
                layer_average=sum(layer_average(selections[i].kept, cuts[i], layers) for i in mine),
            )
        )
    return counts
