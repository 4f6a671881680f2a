"""How each image is to be reduced, known before it is encoded: its token counts, its size and the method's cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from mmtok_cli import hooks
from mmtok_cli.budget import Budget, UnmetBudgetError, rectangle
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_scale import require_scalable
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Grid, VisionLanguageModel
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import Cut
from mmtok_cli.video import Visual


@dataclass(frozen=True)
class ImagePlan:
    """How one image is to be reduced.

    total: its vision tokens when nothing is reduced. keep: how many of them are left after the last reduction.
    grid: the grid at which the image is encoded; None is the model's own choice. short: the image cannot meet the
    budget, and keeps as many tokens as it can, or a video as few. slices: of a video, how many evenly spaced slices in
    time are encoded; None is all.
    """

    total: int
    keep: int
    grid: Grid | None
    short: bool = False
    slices: int | None = None

    @property
    def encoded(self) -> int:
        """Vision tokens that the encoder makes of the image."""
        return self.grid[0] * self.grid[1] if self.grid else self.total


def plan_images(
    model: VisionLanguageModel,
    method: Method,
    images: Sequence[Visual],
    budget: Budget | None,
    rules: Rules,
    grids: Sequence[Grid] | None = None,
    *,
    smaller: Sequence[Grid | None] | None = None,
    strict: bool = False,
) -> list[ImagePlan]:
    """The plan of each image.

    grids: as in `pipeline.reduce`. smaller: grids of smaller versions of the images, of `image_scale.encoded_grids`; a
    budget is still one of the tokens that an image has at its own size. strict: raise UnmetBudgetError for a budget
    that an image cannot meet, in place of reducing the image as far as possible.

    Raises MMTokError for a video and a model that sees images only, for a smaller version and a method that makes
    images smaller itself, for an image and a method that needs a video, and for a method inside the language model
    where text stands between the frames of a video.
    """
    model.require_visible(images)
    if method.needs_video and not all(model.slices(image) for image in images):
        raise MMTokError(
            f"{type(method).__name__} is for the frames of a video, and this is an image",
            "give a video, or use a method for images such as mmtok",
        )
    if type(method).cuts is not Method.cuts and any(map(model.has_text_within, images)):
        raise MMTokError(
            f"{type(method).__name__} drops tokens inside the language model, where {model.name} has text between the "
            "frames of a video",
            "use a method that acts before the language model, such as mmtok, or Qwen2.5-VL",
        )
    nothing: Sequence[Grid | None] = [None] * len(images)
    if any(smaller or ()):
        require_scalable(method)
    return [
        _plan(model, method, image, budget, rules, grid, size, strict)
        for image, grid, size in zip(images, grids or nothing, smaller or nothing, strict=True)
    ]


def _plan(
    model: VisionLanguageModel,
    method: Method,
    image: Visual,
    budget: Budget | None,
    rules: Rules,
    grid: Grid | None,
    size: Grid | None,
    strict: bool,
) -> ImagePlan:
    """size: the grid of a smaller version of the image."""
    total = grid[0] * grid[1] if grid else model.total(image)
    entering = size[0] * size[1] if size else total
    keep, short = min(total, entering), False
    if budget is not None:
        keep, short = _nearest(partial(_kept, model, method, image, budget, rules, grid, total, entering), strict)
        if keep > entering:  # a smaller image keeps all that it has, whatever the other scales can meet
            keep, short = entering, True
        if rules.budget_means == "layer-average":
            keep, lower = _nearest(partial(final_count, method, keep, entering, model.layer_count), strict)
            short = short or lower
    if size:
        return ImagePlan(total, keep, size, short)
    if (slices := model.slices(image)) and grid is None:
        rows, columns = model.whole_grid(image)
        kept = hooks.keep_slices(method, slices, total // slices, keep)
        if kept is not None and kept < slices:
            least = total // slices * kept  # more than the budget, where that is less than one slice
            if keep < least and budget is not None and budget.count is not None:  # a share is met as nearly as possible
                if strict:
                    raise UnmetBudgetError(
                        f"one slice in time of the video has {least} vision tokens, which cannot be kept in part",
                        f"choose {least} tokens or more, or another method",
                        nearest=least,
                    )
                short = True
            return ImagePlan(total, max(keep, least), (rows // slices * kept, columns), short, kept)
    smaller = hooks.resize(method, total, keep)
    if smaller is None:
        return ImagePlan(total, keep, grid, short)

    def encoded_at(tokens: int) -> Grid:
        return rectangle(tokens, grid, grid[0] / grid[1]) if grid else model.smaller(image, tokens)

    try:
        return ImagePlan(total, keep, encoded_at(smaller), short)
    except UnmetBudgetError as error:
        if strict and budget is not None and budget.count is not None:  # a share is met as nearly as possible
            raise
        nearest = encoded_at(error.nearest)  # of a video more than the budget, where that is less than its slices
        return ImagePlan(total, max(keep, nearest[0] * nearest[1]), nearest, short=True)


def _nearest(find: Callable[[], int], strict: bool) -> tuple[int, bool]:
    """The number of tokens found, or the nearest that an image can keep, and whether it is the latter."""
    try:
        return find(), False
    except UnmetBudgetError as error:
        if strict:
            raise
        return error.nearest, True


def _kept(
    model: VisionLanguageModel,
    method: Method,
    image: Visual,
    budget: Budget,
    rules: Rules,
    grid: Grid | None,
    total: int,
    entering: int,
) -> int:
    """Vision tokens that the image keeps of `total`; `entering` of them, fewer if it was made smaller, are encoded."""
    if rules.track == "released" and budget.percent is not None:
        if slices := model.slices(image):

            def count(share: float, total: int) -> int:
                """A share of the tokens at the video's own size; whole slices are those that are encoded."""
                encoded = share * (total / entering)
                return (
                    math.floor(share * total) if encoded > 1 else hooks.video_count(method, encoded, entering, slices)
                )

            return budget.resolve(total, count)
        return budget.resolve(total, partial(hooks.count, method, signals=method.signals_among(model.signals)))
    return budget.resolve(total) if grid else model.keep(image, budget, rules.track)


def planned_cuts(method: Method, plan: ImagePlan, model: VisionLanguageModel) -> tuple[Cut, ...]:
    """The cuts of an image that is reduced as planned, of which all tokens are eligible; see `cuts_of`."""
    keep = min(plan.keep, plan.encoded)  # a smaller image may have a few less than the budget
    return cuts_of(method, hooks.entering(method, plan.encoded, keep), keep, model)


def cuts_of(method: Method, entering: int, keep: int, model: VisionLanguageModel) -> tuple[Cut, ...]:
    """The method's cuts of an image of which `entering` tokens enter the language model.

    Raises MMTokError naming the method where its cuts are inconsistent, and where they are beyond the loaded layers.
    """
    layers = model.layer_count
    cuts, before, tokens = hooks.cuts(method, entering, keep, layers), 0, entering
    for cut in cuts:
        if not before < cut.before < layers:
            problem = f"`before` must be {before + 1} to {layers - 1}, see `require_layers`"
        elif not 1 <= cut.keep <= tokens:
            problem = f"`keep` must be 1 to {tokens}, the tokens that are left"
        elif cut.reads not in (None, cut.before - 1, cut.before):
            problem = f"`reads` must be {cut.before - 1}, {cut.before} or None"
        elif not all(0 <= layer < cut.before for layer in cut.earlier):
            problem = f"`earlier` must name layers from 0 to {cut.before - 1}"
        else:
            problem = ""
        if problem:
            raise hooks.fault(method, "cuts", f"makes an impossible cut, {cut}: {problem}")
        before, tokens = cut.before, cut.keep
    if cuts and cuts[0].before < model.first_cut:
        raise MMTokError(
            f"{type(method).__name__} drops tokens before layer {cuts[0].before + 1}, and the first {model.first_cut} "
            f"decoder layers of {model.name} need all vision tokens ({model.first_cut_reason})",
            "let it cut later; `mmtok methods` followed by its name shows the parameter",
        )
    for cut in cuts:
        if cut.reads in model.linear_layers:
            others = [str(layer) for layer in range(layers) if layer not in model.linear_layers]
            raise MMTokError(
                f"{type(method).__name__} reads the attention of decoder layer {cut.reads} of {model.name}, which has "
                "linear attention and so no rows of it",
                f"choose a parameter by which it reads one of the layers {', '.join(others)}",
            )
    if before >= model.loaded_layers:
        raise MMTokError(
            f"{type(method).__name__} drops tokens before layer {before + 1} of {layers}, and only "
            f"{model.loaded_layers} are run",
            f"use --layers {before + 1} or more",
        )
    return cuts


def layer_average(total: int, cuts: Sequence[Cut], layers: int) -> float:
    """Vision tokens of an image on average over the decoder layers; `total` enter the first layer."""
    starts = [0, *(cut.before for cut in cuts), layers]
    counts = [total, *(cut.keep for cut in cuts)]
    return sum(n * (end - start) for n, start, end in zip(counts, starts, starts[1:], strict=False)) / layers


@lru_cache(maxsize=1024)
def final_count(method: Method, wanted: int, total: int, layers: int) -> int:
    """How many tokens must be left after the last cut for the layer average to be nearest to `wanted`.

    Raises UnmetBudgetError with the range where the layers before the first cut alone exceed it.
    """
    if type(method).cuts is Method.cuts:
        return wanted
    averages = {n: _average_of(method, total, n, layers) for n in range(1, total + 1)}
    lowest = min(averages.values())
    if wanted < lowest:
        raise UnmetBudgetError(
            f"a layer average of {wanted} vision tokens cannot be reached: keeping one token after the cut still "
            f"gives {lowest:.1f}",
            f"choose {math.ceil(lowest)} to {total}, cut in an earlier layer, or count with --budget-means final",
            nearest=1,
        )
    return min(averages, key=lambda n: abs(averages[n] - wanted))


def _average_of(method: Method, total: int, keep: int, layers: int) -> float:
    """The layer average of an image of `total` vision tokens of which `keep` are left."""
    entering = hooks.entering(method, total, keep)
    return layer_average(entering, hooks.cuts(method, entering, keep, layers), layers)
