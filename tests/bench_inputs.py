"""What the benchmarks of selection share: features, a clock, and how times are printed."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def make_features(kind: str, images: int, tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    """Like a ViT's ("clustered": a common part, 24 kinds of patches, variation within a kind), the same with uneven
    lengths of rows ("uneven"), or plain noise ("iid")."""
    noise = torch.randn(images, tokens, dim, generator=generator)
    if kind == "iid":
        return noise
    kinds = torch.randn(images, 24, dim, generator=generator)
    which = torch.randint(24, (images, tokens), generator=generator)
    own = kinds.gather(1, which.unsqueeze(-1).expand(-1, -1, dim))
    clustered = noise.mul_(0.5).add_(own).add_(torch.randn(images, 1, dim, generator=generator))
    if kind == "uneven":
        clustered.mul_(torch.randn(images, tokens, 1, generator=generator).mul_(0.5).exp_())
    return clustered


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = function()
    return clock() - start, result


def tell(line: str) -> None:
    """Show a line on standard error at once, as the tables come at the end."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def human(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"
