"""Whether a model fits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.quantization import QUANTIZATIONS, quantized_bytes

GIB = 2**30
NARROW = (torch.bfloat16, torch.float16)
TEXT_TOKENS = 128  # of a prompt, besides its vision tokens


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes to read one unreduced prompt.

    weights: all of them; layer: those of one decoder layer. working: an estimate of the KV cache of all layers and of
    what one layer holds at a time, for an image of so many vision tokens; cache: the KV cache of one layer alone.
    """

    weights: int
    layer: int
    working: int
    cache: int
    layers: int
    vision_tokens: int
    parameters: int

    @property
    def total(self) -> int:
        return self.weights + self.working

    def layers_within(self, free: int) -> int:
        """How many decoder layers would fit."""
        fixed = self.total - self.layers * (self.layer + self.cache)
        return max(0, min(self.layers, (free - fixed) // (self.layer + self.cache)))


def laid_out(config: Any, dtype: torch.dtype | None, attention: str = "sdpa") -> Any:
    """The model of a configuration, without memory for its weights."""
    return hf.empty_model(config, dtype, attention)


def needs_of(model: Any, dtype: torch.dtype, vision_tokens: int, attention: str = "sdpa") -> Needs:
    """What a laid-out model needs in a data type for one image of so many vision tokens.

    A decoder layer holds at once: its input and output, queries, keys and values, two states of the MLP's width and,
    with eager attention, the attention matrix, once more in float32.
    """
    text, width = model.config.text_config, dtype.itemsize
    tokens = vision_tokens + TEXT_TOKENS
    head = hf.head_width(text)
    cache = 2 * text.num_key_value_heads * head * tokens * width
    states = 4 * text.hidden_size + 2 * text.num_attention_heads * head + 3 * text.intermediate_size
    matrix = text.num_attention_heads * tokens**2 * (width + 4) if attention == "eager" else 0
    layers = hf.decoder_layers(hf.language_model(model))
    parameters = sum(p.numel() for p in model.parameters())
    return Needs(
        weights=parameters * width,
        layer=sum(p.numel() for p in layers[0].parameters()) * width,
        working=len(layers) * cache + tokens * states * width + matrix,
        cache=cache,
        layers=len(layers),
        vision_tokens=vision_tokens,
        parameters=parameters,
    )


def needs_quantized(needs: Needs, model: Any, dtype: torch.dtype, quantization: str) -> Needs:
    """The same with weights that are quantized while they are loaded."""
    layer = needs.layer * QUANTIZATIONS[quantization].bits // (8 * dtype.itemsize)
    return replace(needs, weights=quantized_bytes(model, quantization), layer=layer)


def require_room(
    name: str, needs: Needs, dtype: torch.dtype, device: torch.device, others: Mapping[int, int] | None = None
) -> None:
    """Refuse a model that does not fit into the device's free memory.

    others: free bytes of all GPUs, where the model may be spread over them. Raises MMTokError with the numbers, and
    with what would fit.
    """
    free = sum(others.values()) if others else free_memory(device)
    if free is None or needs.total <= free:
        return
    kind = str(dtype).removeprefix("torch.")
    quantized = " (quantized)" if needs.weights < needs.parameters * dtype.itemsize else ""
    place = f"{len(others)} GPUs have" if others else f"{device} has"
    raise MMTokError(
        f"{name} does not fit: its {needs.parameters / 1e9:.2f} B weights take {needs.weights / GIB:.1f} GiB in {kind}"
        f"{quantized}, KV cache and activations for {needs.vision_tokens} vision tokens about "
        f"{needs.working / GIB:.1f} GiB more, and {place} {free / GIB:.1f} GiB free",
        _what_would_fit(needs, dtype, free, device, spread=bool(others)),
    )


def _what_would_fit(needs: Needs, dtype: torch.dtype, free: int, device: torch.device, *, spread: bool) -> str:
    narrow = needs.total * 2 // dtype.itemsize
    if dtype not in NARROW and narrow <= free:
        return f"use --dtype bfloat16, which takes {narrow / GIB:.1f} GiB in all"
    ways = []
    gpus = {} if spread else free_on_gpus()
    if device.type == "cuda" and len(gpus) > 1 and needs.total <= sum(gpus.values()):
        ways.append(f"spread it over {len(gpus)} GPUs by --device-map auto")
    if layers := needs.layers_within(free):
        ways.append(
            f"time {layers} of its {needs.layers} decoder layers and estimate the rest: mmtok profile --layers {layers}"
        )
    return "; or ".join(ways) or "choose a smaller model (`mmtok models`), or a device with more memory"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None


def free_on_gpus() -> dict[int, int]:
    """Free bytes of each GPU."""
    return {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
