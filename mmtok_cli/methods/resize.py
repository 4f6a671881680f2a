"""A smaller image: the baseline that also saves encoder time."""

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import DESCRIPTION_ONLY, Method


@dataclass(frozen=True)
class Resize(Method):
    """Encodes the image at a lower resolution. VTC-Bench (arXiv 2510.07143) found plain down-sampling ahead of many
    methods.

    Encoders of fixed size (LLaVA) interpolate their position embeddings, so the budget is met exactly. A budget that
    forms no suitable rectangle is refused with the nearest that does; if it does for other images of a dataset, an
    image keeps the next lower number that does. LLaVA-NeXT then gets the image without crops.
    Encoders of native resolution (Qwen) get a smaller image of their usual kind, with at least 85% of the budget.
    """

    summary: ClassVar[str] = "a smaller image"
    source: ClassVar[str] = "arXiv 2510.07143"
    venue: ClassVar[str] = "ACL 2026"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = DESCRIPTION_ONLY
    exact: ClassVar[bool] = False

    def resize(self, total: int, budget: int) -> int | None:
        return budget if budget < total else None
