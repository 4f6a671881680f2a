"""Functions of methods that compare directions of vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

ALIGNMENT = 64  # numbers

if TYPE_CHECKING:
    from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_float64(values: Tensor) -> Tensor:
    """The values in float64, for decisions among nearly equal ones; on the CPU if the device is an Apple GPU."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def aligned_empty(like: Tensor, images: int, *shape: int) -> Tensor:
    """An uninitialised tensor [images, *shape], of which each image begins as if it had memory of its own.

    Matrix products of a CPU round differently where rows begin at other offsets.
    """
    size = math.prod(shape)
    return like.new_empty(images, -(-size // ALIGNMENT) * ALIGNMENT)[:, :size].unflatten(1, shape)


def unit_rows(x: Tensor) -> Tensor:
    """The last axis scaled to length 1, in the data type it comes in; zero vectors stay zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.where(length > 0, 1)


def without_gradients(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`torch.no_grad` as a decorator that imports torch when the function is called, not when it is defined."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return call
