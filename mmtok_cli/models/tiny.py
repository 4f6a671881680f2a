"""Tiny models of every family, with random weights and without any download, for the checks of methods."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.families import family_class
from mmtok_cli.models.random_weights import fill_randomly
from mmtok_cli.models.room import laid_out
from mmtok_cli.profiles import known_profiles

LAYERS = 4  # of every language model
SIDE = 84  # pixels of a picture that CLIP encodes, 6 x 6 vision tokens
INTERNVL_SIDE = 112  # pixels of a tile, 4 x 4 vision tokens
SCALE = 3  # of the weights, so that attention is far from uniform

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
}
QWEN = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
ROTARY = {"mrope_section": [2, 2, 2]}
# Values that replace those of each family's first profile.
SMALLER: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 12, "sliding_window": 64, "sliding_window_pattern": 2},
        "vision_config": {**CLIP, "image_size": 2 * SIDE},
        "mm_tokens_per_image": 36,
    },
    "internvl": {"text_config": TEXT, "vision_config": {**CLIP, "image_size": [INTERNVL_SIDE, INTERNVL_SIDE]}},
    "llava": {"text_config": TEXT, "vision_config": CLIP},
    "llava_next": {
        "text_config": TEXT,
        "vision_config": CLIP,
        "image_grid_pinpoints": [
            [SIDE, 2 * SIDE],
            [2 * SIDE, SIDE],
            [2 * SIDE, 2 * SIDE],
            [3 * SIDE, SIDE],
            [SIDE, 3 * SIDE],
        ],
    },
    "llava_onevision": {
        "text_config": TEXT,
        "vision_config": CLIP,
        "image_grid_pinpoints": [[SIDE * rows, SIDE * columns] for rows in (1, 2, 4) for columns in (1, 2, 4)],
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": ROTARY},
        "vision_config": {**QWEN, "fullatt_block_indexes": [0, 2]},
    },
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "head_dim": 24,
            "full_attention_interval": 2,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 12,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {"mrope_section": [1, 1, 1]},
        },
        "vision_config": QWEN,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 12, "rope_parameters": ROTARY},
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **TEXT,
            "head_dim": 12,
            "rope_parameters": ROTARY,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0]},
    },
}


def tiny_families() -> list[str]:
    """The families of which there are tiny models."""
    return list(SMALLER)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> VisionLanguageModel:
    """A model of a family with four decoder layers and small widths on the CPU; the same weights every time.

    Its tokenizer is a stand-in, so its answers mean nothing. Raises MMTokError for a family that is not known.
    """
    if family not in SMALLER:
        raise MMTokError(f"there is no tiny model of the family {family!r}", f"choose one of {', '.join(SMALLER)}")
    profile = next(p for p in known_profiles().values() if p.family == family and p.architecture and p.chat_template)
    config = hf.make_config(family, _merged(profile.architecture or {}, SMALLER[family]))
    model = fill_randomly(laid_out(config, dtype, attention), torch.device("cpu")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALE)
    built = family_class(family)
    tiny = built(f"tiny-{family}", model, built.stand_in_processor(config, profile.chat_template))
    tiny.weights = "random"
    return tiny


def _merged(settings: dict[str, Any], smaller: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with some values replaced."""
    merged = copy.deepcopy(settings)
    for name, value in smaller.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if nested else copy.deepcopy(value)
    return merged
