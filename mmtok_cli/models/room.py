"""Whether a model fits, before anything is loaded."""

from __future__ import annotations

import psutil
import torch

from mmtok_cli.errors import MMTokError

GIB = 2**30
NARROW = (torch.bfloat16, torch.float16)


def require_room(name: str, parameters: float, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit into the device's free memory.

    Activations and the KV cache come on top, and are small beside the weights at batch 1. Raises MMTokError with the
    numbers, and with the narrower data type if that would fit.
    """
    free = free_memory(device)
    needed = parameters * dtype.itemsize
    if free is None or needed <= free:
        return
    kind = str(dtype).removeprefix("torch.")
    narrow = 2 * parameters
    raise MMTokError(
        f"{name} does not fit: its {parameters / 1e9:.2f} B weights take {needed / GIB:.1f} GiB in {kind}, and "
        f"{device} has {free / GIB:.1f} GiB free",
        f"use --dtype bfloat16, which takes {narrow / GIB:.1f} GiB"
        if dtype not in NARROW and narrow <= free
        else "choose a smaller model (`mmtok models`), or a device with more memory",
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None
