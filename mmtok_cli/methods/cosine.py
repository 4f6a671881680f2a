"""What methods that compare directions share."""

from __future__ import annotations

from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """The last axis scaled to length 1, in the data type it comes in; zero vectors stay zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.where(length > 0, 1)
