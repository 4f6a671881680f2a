"""Devices, data types and attention kernels by the names that users give them."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
ATTENTION = ("sdpa", "eager", "flash_attention_2")


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the best there is for `auto`. Raises MMTokError where it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise MMTokError(f"there is no device {name!r}", f"choose one of {', '.join(DEVICES)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MMTokError("no CUDA device is available", "use --device cpu, or install a CUDA build of torch")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MMTokError("no MPS device is available", "use --device cpu")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise MMTokError(f"device {name!r} cannot be used: {first_line(error)}", "use --device auto") from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The data type called `name`; for `auto` float32 on a CPU, otherwise None: that of the stored weights."""
    import torch

    if name not in DTYPES:
        raise MMTokError(f"there is no data type {name!r}", f"choose one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    return getattr(torch, name)


def narrower(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """A data type, and a narrower one in which a model could be loaded instead."""
    import torch

    return (dtype,) if dtype.itemsize <= torch.bfloat16.itemsize else (dtype, torch.bfloat16)


def require_attention(name: str, device: torch.device, dtype: torch.dtype | None, option: str = "--attention") -> None:
    """Refuse an attention kernel that does not exist, or not here. option: that names it. Raises MMTokError."""
    import torch

    if name not in ATTENTION:
        raise MMTokError(f"there is no attention kernel {name!r}", f"choose one of {', '.join(ATTENTION)}")
    if name != "flash_attention_2":
        return
    from mmtok_cli.models import hf

    if device.type != "cuda":
        raise MMTokError(
            f"flash_attention_2 needs a CUDA device, and the device is {device}",
            f"use {option} sdpa, whose kernels are fused as well",
        )
    if not hf.has_flash_attention():
        raise MMTokError("flash_attention_2 needs the package flash-attn", "pip install flash-attn")
    if dtype == torch.float32:
        raise MMTokError("flash_attention_2 does not run in float32", f"use --dtype bfloat16, or {option} sdpa")


def require_compiler(device: torch.device, device_map: str | None) -> None:
    """Refuse --compile where torch.compile cannot run. Raises MMTokError."""
    if device_map is not None:
        raise MMTokError("--compile does not work with --device-map", "leave one of them out")
    if device.type == "cpu":
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if not any(map(shutil.which, compilers)):
            raise MMTokError("--compile needs a C++ compiler on a CPU", "install g++, or leave out --compile")
    elif device.type != "cuda":
        raise MMTokError(f"--compile runs on cpu and cuda, and the device is {device}", "leave out --compile")
    elif find_spec("triton") is None:
        raise MMTokError("--compile needs the package triton", "pip install triton")
