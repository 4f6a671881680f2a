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


# Architectures whose forward pass takes no encoded images: between their encoder and their language model, which sees
# images by cross-attention or encodes them itself, there is no place at which vision tokens could be dropped.
WITHOUT_ENCODED_IMAGES = ("idefics", "mllama", "phi4_multimodal", "pixtral")


def require_family(model_type: str, name: str) -> None:
    """Raises MMTokError for an architecture that is not supported."""
    if model_type in WITHOUT_ENCODED_IMAGES:
        raise MMTokError(
            f"{name} is a {model_type!r} model, to which transformers gives no encoded images, so that vision tokens "
            "cannot be dropped before its language model",
            f"supported families: {', '.join(FAMILIES)}",
        )
    if model_type not in FAMILIES:
        raise MMTokError(
            f"{name} is a {model_type!r} model, which is not supported", f"supported families: {', '.join(FAMILIES)}"
        )


def family_class(model_type: str) -> Any:
    """The subclass of VisionLanguageModel for an architecture."""
    module, name = FAMILIES[model_type]
    return getattr(import_module(f"mmtok_cli.models.{module}"), name)
