"""Models of the true architecture with random weights: latency and memory do not depend on what the weights are."""

from __future__ import annotations

from typing import Any

import torch

from mmtok_cli.models.room import require_room


def build_random(name: str, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of this configuration, initialised straight on the device with a fixed seed.

    It is laid out without memory first, so that nothing is allocated twice or in a wider type. Raises MMTokError where
    the device has no room for it.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    require_room(name, sum(parameter.numel() for parameter in model.parameters()), dtype, device)
    model.to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model.initialize_weights()
    model.tie_weights()
    return model
