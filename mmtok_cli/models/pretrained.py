"""Weights that were trained: all of them, in the shapes that the configuration says, and none of them NaN."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import nn

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.foreign_errors import COMPARE, errors_as
from mmtok_cli.models.quantization import loading_options, stored_tensors
from mmtok_cli.models.sources import configuration, shortened

NAMED = 3  # names of weights in a message
ALWAYS_FINITE = (torch.float4_e2m1fn_x2,)  # has neither NaN nor infinity


def load_pretrained(
    name: str,
    source: str,
    layers: int | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    attention: str | Mapping[str, str],
    places: Mapping[str, int | str] | None,
    quantization: str | None = None,
) -> Any:
    """The model with the weights of its files on the device. layers: only the first so many decoder layers. places: the
    GPU of each part, where it is spread over several. Weights are read straight to a GPU where accelerate is installed,
    and otherwise pass through host memory.

    Raises MMTokError for files that are damaged or do not hold the weights that the configuration describes.
    """
    config = configuration(source, name)
    if layers is not None:
        config = shortened(config, layers, name)
    options = None
    if quantization is not None:
        if getattr(config, "quantization_config", None):
            raise MMTokError(f"the weights of {name} are quantized already", "leave out --quantization")
        options = loading_options(quantization, dtype or torch.bfloat16, device)
    device_map = places
    if device_map is None and device.type != "cpu" and find_spec("accelerate"):
        device_map = {"": str(device)}
    with errors_as(f"the weights of {name} cannot be loaded", hf.or_tested(COMPARE)):
        loaded = hf.load_weights(
            source, config, dtype=dtype, attention=attention, device_map=device_map, quantization=options
        )
    require_same_weights(loaded, name, layers)
    model = loaded.model if device_map or quantization else loaded.model.to(device)
    require_finite(model, name)
    return model


def require_same_weights(loaded: hf.Loaded, name: str, layers: int | None = None) -> None:
    """Refuse files that lack weights of the model, have others, or have them in other shapes.

    transformers draws missing ones at random and ignores the others. layers: decoder layers that were loaded, if not
    all of them. Raises MMTokError that names the weights.
    """
    if loaded.mismatched:
        weight, stored, built = loaded.mismatched[0]
        raise MMTokError(
            f"{weight} has the shape {_shape(stored)} in the files of {name}, and {_shape(built)} by its config.json"
            + _more(len(loaded.mismatched) - 1),
            COMPARE,
        )
    unexpected = [weight for weight in loaded.unexpected if not _is_behind(weight, layers)]
    for fault, weights in (("lack", loaded.missing), ("hold weights that the model does not have:", unexpected)):
        if weights:
            raise MMTokError(f"the files of {name} {fault} {_list(weights)}", hf.or_tested(COMPARE))


def require_finite(model: nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinity among its weights. Raises MMTokError that names them.

    The largest and smallest value of a tensor show both, without a copy of it.
    """
    with torch.no_grad():
        weights = {
            weight: tensor
            for weight, stored in chain(model.named_parameters(), model.named_buffers())
            for tensor in stored_tensors(stored)
            if tensor.is_floating_point() and tensor.numel() and tensor.dtype not in ALWAYS_FINITE
        }
        # Torch cannot compare numbers of 8 bits; bfloat16 holds each of them exactly.
        extremes = [
            torch.stack((tensor if tensor.itemsize > 1 else tensor.bfloat16()).aminmax()).isfinite().all()
            for tensor in weights.values()
        ]
    bad = [weight for weight, finite in zip(weights, extremes, strict=True) if not finite]
    if bad:
        raise MMTokError(f"the weights of {name} hold NaN or infinity: {_list(bad)}", COMPARE)


def _is_behind(weight: str, layers: int | None) -> bool:
    """Whether a weight belongs to a decoder layer behind the first `layers`."""
    found = re.search(r"language_model\.(?:model\.)?layers\.(\d+)\.", weight)
    return layers is not None and found is not None and int(found[1]) >= layers


def _list(weights: Iterable[str]) -> str:
    names = list(weights)
    return ", ".join(names[:NAMED]) + _more(len(names) - NAMED)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes)) or "scalar"
