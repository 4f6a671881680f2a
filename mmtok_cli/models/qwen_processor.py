"""A processor for Qwen-VL models' images and text."""

from __future__ import annotations

from typing import ClassVar

from mmtok_cli.models.processors import ImageTextProcessor

IMAGE_TOKEN = "<|image_pad|>"


class QwenProcessor(ImageTextProcessor):
    """What Qwen2_5_VLProcessor and Qwen3VLProcessor hold, without their video processor."""

    image_token: ClassVar[str] = IMAGE_TOKEN
    image_processor_kind: ClassVar[str] = "qwen2_vl"
