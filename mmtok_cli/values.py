"""Values on a device: what the host knows of them without waiting, and what it may find out later.

Reading a value from a GPU makes the host wait until all earlier work is done, and the GPU then waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ORIGINAL = "_mmtok_original"  # attribute of a tensor on a device: the same values on the host

_unsettled: ContextVar[list[tuple[Tensor, MMTokError]] | None] = ContextVar("unsettled", default=None)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device. The host does not wait for the copy."""
    return values.to(device, non_blocking=device.type == "cuda")


def mirrored(values: Tensor, device: torch.device) -> Tensor:
    """`to_device`, for values that the host needs again: see `on_host`. They must not be changed in place."""
    there = to_device(values, device)
    if there is not values:
        setattr(there, ORIGINAL, values)
    return there


def on_host(values: Tensor) -> Tensor:
    """Values on the host: those that were `mirrored`; others are read from their device, for which the host waits."""
    original: Tensor | None = getattr(values, ORIGINAL, None)
    return values.cpu() if original is None else original


def require(holds: Tensor, error: MMTokError) -> None:
    """Raise the error unless `holds`, a tensor of one value, is true: at once, or when a `deferred` context settles."""
    unsettled = _unsettled.get()
    if unsettled is not None:
        unsettled.append((holds, error))
    elif not bool(holds):
        raise error


@contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """A context in which `require` does not wait for the device.

    It yields a function that settles what was required so far, with one transfer. What is left is settled where the
    context is left by an exception, since it may have been the cause. Raises the first error that applies.
    """
    required: list[tuple[Tensor, MMTokError]] = []
    token = _unsettled.set(required)
    try:
        yield lambda: _settle(required)
    except Exception:
        _settle(required)
        raise
    finally:
        _unsettled.reset(token)


def _settle(required: list[tuple[Tensor, MMTokError]]) -> None:
    import torch

    if not required:
        return
    holds, errors = zip(*required, strict=True)
    required.clear()
    device = holds[0].device
    for held, error in zip(torch.stack([each.to(device) for each in holds]).tolist(), errors, strict=True):
        if not held:
            raise error
