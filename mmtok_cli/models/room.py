"""Whether a model fits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from mmtok_cli.errors import UnloadableError
from mmtok_cli.models import hf
from mmtok_cli.models.quantization import QUANTIZATIONS, quantized_bytes

GIB = 2**30
TEXT_TOKENS = 128  # of a prompt, besides its vision tokens


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes to read a batch of unreduced prompts.

    weights: all of them; layer: those of one decoder layer. working: an estimate of the KV cache of all layers and of
    what one layer holds at a time; cache: the KV cache of one layer alone. Where layers differ, both are means.
    encoder: what one block of the vision encoder holds at a time, before there is a KV cache. layers: of the model,
    which come in groups of `group`. vision_tokens: of the whole batch.
    """

    weights: int
    layer: int
    working: int
    cache: int
    layers: int
    vision_tokens: int
    parameters: int
    encoder: int = 0
    group: int = 1

    @property
    def activations(self) -> int:
        """The most beside the weights, while images are encoded or the prompt is read."""
        return max(self.working, self.encoder)

    @property
    def total(self) -> int:
        return self.weights + self.activations

    def of_layers(self, layers: int) -> Needs:
        """What the model needs with only its first decoder layers."""
        fewer = self.layers - layers
        return replace(
            self,
            weights=self.weights - fewer * self.layer,
            working=self.working - fewer * self.cache,
            layers=layers,
        )

    def layers_within(self, free: int) -> int:
        """How many decoder layers would fit, in whole groups."""
        none = self.of_layers(0)
        reading = (free - none.weights - none.working) // (self.layer + self.cache)
        encoding = (free - none.weights - none.encoder) // self.layer
        fitting = max(0, min(self.layers, reading, encoding))
        return fitting if fitting == self.layers else fitting - fitting % self.group


def laid_out(config: Any, dtype: torch.dtype | None, attention: str | Mapping[str, str] = "sdpa") -> Any:
    """The model of a configuration, without memory for its weights. attention: see `hf.attention_kernels`."""
    return hf.empty_model(config, dtype, attention)


def needs_of(
    model: Any,
    dtype: torch.dtype,
    vision_tokens: Sequence[int],
    attention: str = "sdpa",
    encoder_attention: str | None = None,
) -> Needs:
    """What a laid-out model needs in a data type for a batch of prompts with so many vision tokens.

    A decoder layer holds at once: its input and output, queries, keys and values, two states of the MLP's width and,
    with eager attention, the attention matrix, once more in float32. A block of the encoder holds the same of all
    patches, beside the pixels and the features of all images.
    """
    text, width = model.config.text_config, dtype.itemsize
    lengths = [count + TEXT_TOKENS for count in vision_tokens]
    tokens = sum(lengths)
    head = hf.head_width(text)
    cache = 2 * text.num_key_value_heads * head * tokens * width
    attending = sum(kind != hf.LINEAR for kind in hf.layer_types(text))
    cache = cache * attending // text.num_hidden_layers
    states = 4 * text.hidden_size + 2 * text.num_attention_heads * head + 3 * text.intermediate_size
    pairs = len(lengths) * max(lengths) ** 2
    matrix = text.num_attention_heads * pairs * (width + 4) if attention == "eager" else 0
    vision = hf.encoder_shape(model.config)
    patches = [count * vision.patches for count in vision_tokens]
    block = sum(patches) * (8 * vision.hidden + 3 * vision.intermediate) * width
    seen_pairs = sum(count * min(count, vision.longest or count) for count in patches)
    seen = vision.heads * seen_pairs * (width + 4) if (encoder_attention or attention) == "eager" else 0
    layers = hf.decoder_layers(hf.language_model(model))
    parameters = sum(p.numel() for p in model.parameters())
    return Needs(
        weights=parameters * width,
        layer=sum(p.numel() for p in layers.parameters()) // len(layers) * width,
        working=len(layers) * cache + tokens * states * width + matrix,
        cache=cache,
        layers=len(layers),
        vision_tokens=sum(vision_tokens),
        parameters=parameters,
        encoder=block + seen,
        group=hf.layer_group(text),
    )


def needs_quantized(needs: Needs, model: Any, dtype: torch.dtype, quantization: str) -> Needs:
    """The same with weights that are quantized while they are loaded."""
    layer = needs.layer * QUANTIZATIONS[quantization].bits // (8 * dtype.itemsize)
    return replace(needs, weights=quantized_bytes(model, quantization, dtype), layer=layer)


def widest_fit(needs: Mapping[torch.dtype, Needs], free: int) -> tuple[torch.dtype, int]:
    """The first of the data types in which the whole model fits, and the number of its decoder layers; otherwise the
    last of them, and how many layers fit into most of the memory. needs: by data type, the widest first."""
    for dtype, need in needs.items():
        if need.total <= free:
            return dtype, need.layers
    dtype, need = list(needs.items())[-1]
    return dtype, need.layers_within(free * 9 // 10)


def refusal(
    name: str,
    needs: Mapping[torch.dtype, Needs],
    missing: str | None,
    device: torch.device,
    others: Mapping[int, int] | None = None,
) -> UnloadableError | None:
    """Why a model cannot be loaded: it does not fit into the device's free memory, or its weights are missing.

    needs: in the data type that was asked for, and in narrower ones that could be. missing: why there are no weights.
    others: free bytes of all GPUs, where the model may be spread over them. The hint says what could be loaded.
    """
    wanted, need = next(iter(needs.items()))
    free = sum(others.values()) if others else free_memory(device)
    fits = free is None or need.total <= free
    if fits and missing is None:
        return None
    place = f"{len(others)} GPUs have" if others else f"{device} has"
    quantized = " (quantized)" if need.weights < need.parameters * wanted.itemsize else ""
    too_large = (
        ""
        if fits or free is None
        else f"{name} does not fit: its {need.parameters / 1e9:.2f} B weights take {need.weights / GIB:.1f} GiB in "
        f"{dtype_name(wanted)}{quantized}, KV cache and activations for {need.vision_tokens} vision tokens about "
        f"{need.activations / GIB:.1f} GiB more, and {place} {free / GIB:.1f} GiB free"
    )
    message = "; ".join(filter(None, (too_large, missing)))
    options = {} if missing is None else {"--weights": "random"}
    advice = [] if missing is None else ["time and memory can be measured with random weights"]
    if free is not None and not fits:
        gpus = {} if others else free_on_gpus()
        dtype, layers = widest_fit(needs, free)
        if device.type == "cuda" and len(gpus) > 1 and need.total <= sum(gpus.values()):
            options["--device-map"] = "auto"
            advice.append(f"it can be spread over {len(gpus)} GPUs")
        elif not layers:
            return UnloadableError(message, "choose a smaller model (`mmtok models`), or a device with more memory")
        else:
            if dtype != wanted:
                options["--dtype"] = dtype_name(dtype)
                advice.append(f"in {dtype_name(dtype)} it takes {needs[dtype].total / GIB:.1f} GiB")
            if layers < needs[dtype].layers:
                options["--layers"] = str(layers)
                advice.append(f"{layers} of its {needs[dtype].layers} decoder layers fit, and the rest is estimated")
    return UnloadableError(message, "; ".join(advice), name, options)


def dtype_name(dtype: torch.dtype) -> str:
    """What users call a data type."""
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None


def free_on_gpus() -> dict[int, int]:
    """Free bytes of each GPU."""
    return {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}


def free_for(device: torch.device, device_map: str | None) -> int | None:
    """Bytes that a model can still take, on the device or spread over all GPUs, None where the device does not say."""
    return sum(free_on_gpus().values()) if device_map else free_memory(device)
