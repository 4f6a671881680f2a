"""What methods that compare directions share."""

from __future__ import annotations

from torch import Tensor


def in_float64(values: Tensor) -> Tensor:
    """For decisions among nearly equal values; on the CPU where the device has no float64, as Apple's GPUs."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def unit_rows(x: Tensor) -> Tensor:
    """The last axis scaled to length 1, in the data type it comes in; zero vectors stay zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.where(length > 0, 1)
