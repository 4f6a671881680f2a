"""Models of the true architecture with random weights: latency and memory do not depend on what the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from mmtok_cli.models import hf


def fill_randomly(model: Any, device: torch.device, places: Mapping[str, int | str] | None = None) -> Any:
    """Give a laid-out model memory straight on the device, and weights from a fixed seed.

    Nothing is allocated twice or in a wider type. places: the device of each part, where it is spread over several.
    """
    if places:
        from accelerate.utils import set_module_tensor_to_device

        for name, tensor in list(chain(model.named_parameters(), model.named_buffers())):
            part = max((part for part in places if f"{name}.".startswith(f"{part}." if part else "")), key=len)
            empty = torch.empty_like(tensor, device=places[part])
            set_module_tensor_to_device(model, name, places[part], value=empty)
    else:
        model.to_empty(device=device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(0)
        hf.initialize_weights(model)
    return model
