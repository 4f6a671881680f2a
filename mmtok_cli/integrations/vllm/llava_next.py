"""LLaVA-NeXT in vLLM, with vision tokens that are selected between encoder and language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.vllm.llava import ClipReducing
from mmtok_cli.integrations.vllm.processing import ReducingProcessor, info_of
from mmtok_cli.integrations.vllm.request import ImageRequest
from mmtok_cli.tokens import VisionTokens


class Processor(ReducingProcessor, llava_next.LlavaNextMultiModalProcessor):
    family = "llava_next"


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=info_of(llava_next.LlavaNextProcessingInfo),
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class ReducingLlavaNext(ClipReducing, llava_next.LlavaNextForConditionalGeneration):
    def encode_images(self, requests: Sequence[ImageRequest], signals: Sequence[str], **inputs: Any) -> Any:
        image_input = self._parse_and_validate_image_input(**inputs)
        if image_input is None or image_input["type"] != "pixel_values" or image_input["image_sizes"] is None:
            raise MMTokError("images that come as embeddings cannot be reduced", "send pixels")
        tiles = list(image_input["pixel_values"])  # [crops, 3, height, width] of each image
        names = [f"{r.image_id}#{i}" for r, crops in zip(requests, tiles, strict=True) for i in range(len(crops))]
        encoded = iter(self.encode_tiles(torch.cat(tiles), names, signals))
        packed = []
        for request, crops, size in zip(requests, tiles, image_input["image_sizes"].tolist(), strict=True):
            of_image = [next(encoded) for _ in range(len(crops))]
            packed.append(self._packed(of_image, size, request.image_id))
        return packed

    def _packed(self, tiles: Sequence[VisionTokens], size: Sequence[int], image_id: str) -> VisionTokens:
        """The vision tokens of an image from those of its crops. size: height and width of the image."""
        packing = self.layout.packing(*size)  # type: ignore[attr-defined]
        tiles = tiles[: len(packing.places)]  # a batch of images pads the shorter lists of crops
        sources = packing.sources.to(tiles[0].projected.device)
        rows = torch.cat([tile.projected for tile in tiles])[sources.clamp(min=0)]
        projected = torch.where((sources < 0)[:, None], self.image_newline.to(rows.dtype), rows)
        return packing.packed(tiles, projected, image_id, self.project)
