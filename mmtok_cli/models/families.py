"""The model families, by transformers' name of the architecture."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmtok_cli.errors import MMTokError

# Module and class. A module is imported when a model of its family is loaded.
FAMILIES = {
    "gemma3": ("gemma3", "Gemma3"),
    "internvl": ("internvl", "InternVL"),
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_onevision": ("llava_onevision", "LlavaOneVision"),
    "qwen2_5_vl": ("qwen_vl", "QwenVL"),
    "qwen3_5": ("qwen_vl", "Qwen35"),
    "qwen3_vl": ("qwen_vl", "Qwen3VL"),
    "qwen3_vl_moe": ("qwen_vl", "Qwen3VLMoe"),
}


def require_family(model_type: str, name: str) -> None:
    """Raises MMTokError for an architecture that is not supported."""
    if model_type not in FAMILIES:
        raise MMTokError(
            f"{name} is a {model_type!r} model, which is not supported", f"supported families: {', '.join(FAMILIES)}"
        )


def family_class(model_type: str) -> Any:
    """The subclass of VisionLanguageModel for an architecture."""
    module, name = FAMILIES[model_type]
    return getattr(import_module(f"mmtok_cli.models.{module}"), name)
