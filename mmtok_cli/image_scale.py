"""Smaller images: at which size each image is encoded, before a method selects from its vision tokens.

A scale is a factor on both sides of an image: 0.5 leaves a quarter of its patches, as in VTC-Bench (arXiv 2510.07143).
PACE (arXiv 2608.27206) speaks of shares of tokens: its fixed 50 % is the scale 0.71 here. "auto" lets each image decide
by how much detail it shows, PACE's rule APC.

Families make images smaller as they can. Qwen's encoder sees a smaller image of the usual kind. CLIP of LLaVA-1.5 sees
a rectangle without padding, with interpolated position embeddings. LLaVA-NeXT and InternVL see the image in one piece,
without crops and the view of the whole beside them: their processors choose crops by an image's shape rather than its
size, so that a smaller image would often have as many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Grid, VisionLanguageModel
from mmtok_cli.rules import AUTO, ImageScale
from mmtok_cli.stages import PREVIEW, Stage, unwatched
from mmtok_cli.video import Visual

GLOBAL_WEIGHT = 0.6  # of the difference between tokens, against that of the most unusual ones
UNUSUAL = 0.1  # share of tokens whose distances to the mean direction count as detail
MOST_DETAIL = 1.5  # such a distance that counts as 1
LEAST_SHARE = 0.05  # of the tokens, however little an image shows


def encoded_grids(
    model: VisionLanguageModel, images: Sequence[Visual], scale: ImageScale, stage: Stage = unwatched
) -> list[Grid | None]:
    """The grid at which each image is encoded at a scale; None is the image's own size.

    With "auto", an image is looked at in a stage of its own: it is prepared at its own size and goes through the first
    block of the encoder.
    """
    if scale == AUTO:
        with stage(PREVIEW):
            return [_by_detail(model, image) for image in images]
    if scale == 1:
        return [None] * len(images)
    return [_scaled(model, image, scale) for image in images]


def _scaled(model: VisionLanguageModel, image: Visual, scale: float) -> Grid:
    slices, (rows, columns) = _one_slice(model, image)
    return slices * max(1, round(rows * scale)), max(1, round(columns * scale))


def _one_slice(model: VisionLanguageModel, image: Visual) -> tuple[int, Grid]:
    """The slices in time of a video, 1 of an image, and the grid of each."""
    slices, (rows, columns) = max(1, model.slices(image)), model.whole_grid(image)
    return slices, (rows // slices, columns)


@torch.inference_mode()
def _by_detail(model: VisionLanguageModel, image: Visual) -> Grid | None:
    """The grid by PACE's rule; None, the own size, where an image needs all of its tokens.

    PACE was written for Qwen2.5-VL. For encoders of fixed size the rule is adapted: the tokens scored are those of the
    image as the encoder sees it at once, without padding and crops, and a cell is one vision token of the image in one
    piece (a patch of 14 pixels for CLIP, in place of Qwen's 28). All frames of a video count as one image.
    """
    slices, whole = _one_slice(model, image)
    rows, columns = grid = compressed(*whole, share_of_detail(model.first_block(image)))
    return None if grid == whole else (slices * rows, columns)


def share_of_detail(
    features: Tensor,
    *,
    global_weight: float = GLOBAL_WEIGHT,
    unusual: float = UNUSUAL,
    most: float = MOST_DETAIL,
    least: float = LEAST_SHARE,
) -> float:
    """The share of vision tokens that an image needs, from `least` to 1, by the differences between its patches.

    features: [patches, dim], after the encoder's first block. The score of PACE's release: the mean difference of
    directions, 1 - cosine, and the distances of the most unusual patches to the mean direction, weighted. Values that
    are not finite count as 0. One patch gives `least`, as do features that are all 0, to which the release gives 0.6.
    """
    return scores_of_detail(features, global_weight=global_weight, unusual=unusual, most=most, least=least)[0]


def scores_of_detail(
    features: Tensor, *, global_weight: float, unusual: float, most: float, least: float
) -> tuple[float, float, float]:
    """The share of `share_of_detail`, and its two parts: the mean difference and the detail, both from 0 to 1."""
    count, rows = len(features), torch.nan_to_num(features.float(), nan=0.0, posinf=0.0, neginf=0.0)
    if count <= 1 or not rows.any():
        return least, 0.0, 0.0
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    # The sum of all cosines, from which those of rows with themselves are taken.
    total = rows.sum(0)
    cosine = (total.square().sum() - rows.square().sum()) / (count * (count - 1))
    difference = float((1 - cosine).clamp(0, 1))
    centre = total / count
    centre = centre / centre.norm().clamp(min=1e-12)
    distances = (rows - centre).norm(dim=-1)
    largest = distances.topk(max(1, math.ceil(unusual * count))).values.mean()
    detail = float((largest / most).clamp(0, 1))
    share = global_weight * difference + (1 - global_weight) * detail
    return min(max(share, least), 1.0), difference, detail


def compressed(height: float, width: float, share: float, cell: float = 1) -> Grid:
    """The (rows, columns) of cells nearest to a share of those of an image, at its aspect, as in PACE's release.

    height, width: of the image. cell: the side of a cell in the same unit. Of the ideal sides rounded down and up, the
    combination with the nearest number of cells is taken, then the one with the nearest aspect.
    """
    target = max(1, round(math.ceil(height / cell) * math.ceil(width / cell) * share))
    rows, columns = math.sqrt(target * height / width), math.sqrt(target * width / height)
    choices = [
        (max(1, down(rows)), max(1, across(columns))) for down, across in product((math.floor, math.ceil), repeat=2)
    ]
    return min(choices, key=lambda c: (abs(c[0] * c[1] - target), abs(c[0] / c[1] - height / width)))


def chooses_size(method: Method | type[Method]) -> bool:
    """Whether a method makes images smaller itself."""
    kind = method if isinstance(method, type) else type(method)
    return kind.sizes()


def require_scalable(method: Method) -> None:
    """Raises MMTokError for a method that makes images smaller itself."""
    if chooses_size(method):
        raise MMTokError(
            f"{type(method).__name__} makes images smaller itself, by the budget, and has no --image-scale",
            "omit --image-scale, or use --method full for the smaller image alone",
        )
