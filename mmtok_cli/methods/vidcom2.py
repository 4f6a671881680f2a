"""VidCom2: the tokens of a video that are least like the whole video and their frame (arXiv 2505.14454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, engine_count, ranking
from mmtok_cli.methods.cosine import without_gradients
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of the Gaussians that measure similarity
TEMPERATURE = 0.01  # of the softmax that shares the budget among frames


@dataclass(frozen=True)
class VidCom2(Method):
    """Keeps in each frame the tokens that are least similar to the video's and the frame's mean; frames that are more
    unusual keep more.

    As in vLLM 0.32, adapted there from the authors' code: a "frame" is a slice in time (Qwen makes one slice of two
    frames); only the half of the channels with the lowest variance counts; rows are scaled to length 1; a sum of five
    Gaussians measures similarity; everything is in the data type of the rows that enter the language model (float32 on
    the harmonised track); a percentage is counted as vLLM counts `video_pruning_rate`, truncated after floating-point
    arithmetic, and is at least one token per slice. Tokens are then added or dropped over the whole video until the
    count is exact, which may empty a frame. Not as in vLLM: the share of each frame is computed from the budget, in
    tokens, which differs from the percentage by less than a token of the video; of equal values the lowest index goes
    first. An image is a single frame, on which the method is refused.
    """

    summary: ClassVar[str] = "unlike video and frame"
    source: ClassVar[str] = "arXiv 2505.14454"
    venue: ClassVar[str] = "EMNLP 2025"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    needs_video: ClassVar[bool] = True

    def video_count(self, share: float, slices: int, tokens: int) -> int:
        return engine_count(share, slices * tokens, fewest=slices)

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        of_video, of_frame = similarities(vision.projected.unflatten(0, (vision.slices, -1)))
        shares = frame_budgets(of_video, budget / vision.total)
        return Selection(lowest(of_video + of_frame, shares, vision.eligible, budget))


@without_gradients
def similarities(features: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of each token to the mean of the video, and to that of its frame: [frames, tokens] each.

    features: [frames, tokens, dim].
    """
    import torch

    rows = features.flatten(0, 1)
    channels = rows.var(0, unbiased=False).argsort(stable=True)[: max(1, rows.shape[1] // 2)]
    narrow = features[..., channels]
    unit = narrow / narrow.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def near(centre: Tensor) -> Tensor:
        distance = (unit - centre).square().sum(-1)
        return torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0)

    return near(unit.flatten(0, 1).mean(0)), near(unit.mean(1, keepdim=True))


@without_gradients
def frame_budgets(of_video: Tensor, share: float) -> list[int]:
    """Tokens of each frame before the count is made exact, 1 to all. of_video: [frames, tokens], see `similarities`."""
    unusual = (-of_video.mean(1) / TEMPERATURE).softmax(0)
    shares = (share * (1 + unusual - unusual.mean())).clamp(max=1)
    tokens = of_video.shape[1]
    return [min(max(round(each * tokens), 1), tokens) for each in shares.tolist()]


def lowest(scores: Tensor, budgets: list[int], eligible: Tensor, budget: int) -> Tensor:
    """`budget` ascending indices: the lowest `scores` [frames, tokens] of each frame, made exact over the video."""
    import torch

    flat, tokens = scores.flatten(), scores.shape[1]
    kept = torch.zeros_like(eligible)
    for frame, count in enumerate(budgets):
        area = slice(frame * tokens, (frame + 1) * tokens)
        kept[area].index_fill_(0, ranking(-flat[area], eligible[area])[:count], True)
    kept &= eligible
    extra = int(kept.sum()) - budget
    if extra > 0:
        kept.index_fill_(0, ranking(flat, kept)[:extra], False)
    elif extra < 0:
        kept.index_fill_(0, ranking(-flat, eligible & ~kept)[:-extra], True)
    return kept.nonzero().squeeze(1)
