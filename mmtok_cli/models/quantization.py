"""Weights of 8 or 4 bits: the ways to quantize them, what each needs, and how many bytes quantized weights take.

The linear layers are quantized, except the one that gives the logits, as transformers does it. Pretrained weights are
quantized by transformers while they are loaded; random ones by torchao once they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf


@dataclass(frozen=True)
class Quantization:
    """package: that has the kernels. bits: of a weight. needs: further packages, by the names that pip knows."""

    package: str
    bits: int
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()


QUANTIZATIONS = {
    "int8": Quantization("torchao", 8),
    "int4": Quantization("torchao", 4, devices=("cuda",), needs=("mslk",)),
    "bnb-8bit": Quantization("bitsandbytes", 8),
    "bnb-4bit": Quantization("bitsandbytes", 4),
}


def require_quantization(name: str, device: torch.device, weights: str, device_map: str | None) -> None:
    """Refuse a way to quantize that does not exist or does not work here. Raises MMTokError."""
    if name not in QUANTIZATIONS:
        raise MMTokError(f"there is no quantization {name!r}", f"choose one of {', '.join(QUANTIZATIONS)}")
    way = QUANTIZATIONS[name]
    if device.type not in way.devices:
        raise MMTokError(
            f"--quantization {name} runs on {' and '.join(way.devices)}, and the device is {device}",
            "use --quantization int8" if device.type == "cpu" else "leave it out",
        )
    if device_map is not None:
        raise MMTokError("--quantization does not work with --device-map", "leave one of them out")
    if way.package == "bitsandbytes" and weights == "random":
        raise MMTokError(
            f"--quantization {name} does not work with --weights random: bitsandbytes quantizes stored weights",
            "use --quantization int8",
        )
    packages = [way.package, *way.needs, *(["accelerate"] if weights == "pretrained" else [])]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        raise MMTokError(
            f"--quantization {name} needs the package{plural} {' and '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )


def loading_options(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments with which transformers quantizes weights while it loads them."""
    way = QUANTIZATIONS[name]
    if way.package == "bitsandbytes":
        config = hf.bitsandbytes_config(way.bits, dtype)
    else:
        config = hf.torchao_config(_torchao(way.bits))
    return {"quantization_config": config, "device_map": {"": str(device)}}


def quantize(model: nn.Module, name: str) -> None:
    """Quantize the weights of a model in place, by torchao."""
    from torchao.quantization import quantize_

    head = hf.output_embedding(model)
    quantize_(
        model,
        _torchao(QUANTIZATIONS[name].bits),
        filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head,
    )


def _torchao(bits: int) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig()


def quantized_bytes(model: nn.Module, name: str, dtype: torch.dtype) -> int:
    """Bytes of the weights of a laid-out model once they are quantized, without scales. dtype: of all others."""
    head = hf.output_embedding(model)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    return sum(
        weight.numel() * (QUANTIZATIONS[name].bits if id(weight) in linear else 8 * dtype.itemsize) // 8
        for weight in model.parameters()
    )


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is stored in: its values and scales, if it is quantized by torchao."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in stored_tensors(getattr(weight, name))]


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes."""
    return sum(tensor.nbytes for tensor in stored_tensors(weight))
