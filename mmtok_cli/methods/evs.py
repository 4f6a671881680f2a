"""EVS: the tokens of a video that change from one frame to the next (arXiv 2510.14624)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, engine_count, highest
from mmtok_cli.methods.cosine import without_gradients
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 255.0  # dissimilarity of the first frame's tokens, above that of any other


@dataclass(frozen=True)
class EVS(Method):
    """Keeps the first frame, and the tokens that are least similar to the token at the same place one frame earlier.

    As in vLLM 0.32: a "frame" is a slice in time (Qwen makes one slice of two frames); similarity is the cosine of
    rows that enter the language model, in their data type (float32 on the harmonised track); equal values keep the
    earlier token; a percentage is counted as vLLM counts `video_pruning_rate`, truncated after floating-point
    arithmetic, and is at least one whole slice. A budget that is a number may be less than that; then the first tokens
    of the first slice are kept. Known to hurt on short clips, where little more than the first slice is
    left. An image is a single slice, on which the method is refused.
    """

    summary: ClassVar[str] = "what changes over time"
    source: ClassVar[str] = "arXiv 2510.14624"
    venue: ClassVar[str] = "preprint 2025"
    licence: ClassVar[str] = "Apache-2.0 (vLLM)"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    needs_video: ClassVar[bool] = True
    nested: ClassVar[bool] = True

    def video_count(self, share: float, slices: int, tokens: int) -> int:
        return engine_count(share, slices * tokens, fewest=tokens)

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        changes = dissimilarity(vision.projected.unflatten(0, (vision.slices, -1)))
        return highest(changes.flatten(), vision.eligible, budget)


@without_gradients
def dissimilarity(features: Tensor) -> Tensor:
    """1 - cosine of each token with the one at the same place one slice earlier: [slices, tokens].

    features: [slices, tokens, dim]. The first slice gets `FIRST`. A row of zeros is dissimilar to all (1).
    """
    from torch.nn.functional import cosine_similarity, pad

    changes = 1 - cosine_similarity(features[1:], features[:-1], dim=-1, eps=1e-8)
    return pad(changes, (0, 0, 1, 0), value=FIRST)
