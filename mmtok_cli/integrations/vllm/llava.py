"""LLaVA-1.5 in vLLM, with vision tokens that are selected between encoder and language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image as PILImage
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.vllm.processing import ReducingProcessor, info_of, unencoded
from mmtok_cli.integrations.vllm.reducing import Reducing, watched
from mmtok_cli.integrations.vllm.request import CLIP_SIGNALS, ImageRequest
from mmtok_cli.models.clip_signals import class_probabilities
from mmtok_cli.tokens import VisionTokens, all_eligible

ATTENTION_SIGNALS = {"class_attention", "mean_keys"}


class Processor(ReducingProcessor, llava.LlavaMultiModalProcessor):
    family = "llava"


def _processor(info: Any, dummy_inputs: Any) -> Any:
    if not isinstance(info, llava.LlavaProcessingInfo):  # Pixtral has an encoder of its own
        return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)
    return Processor(info, dummy_inputs)


class ClipReducing(Reducing):
    """What LLaVA-1.5 and LLaVA-NeXT have in common: a CLIP tower of fixed size and a projector."""

    signals = CLIP_SIGNALS
    vision_tower: Any
    multi_modal_projector: Any

    def encode_tiles(self, pixels: Tensor, names: Sequence[str], signals: Sequence[str]) -> list[VisionTokens]:
        """Vision tokens of pictures of one size. pixels: [pictures, 3, height, width]; names: one for each."""
        layers = self.vision_tower.vision_model.encoder.layers
        attention = layers[-1].self_attn  # the tower ends with the layer that the features come from
        wanted = bool(ATTENTION_SIGNALS & set(signals))
        with watched(attention.qkv_proj, wanted=wanted) as seen:
            hidden = self.vision_tower(pixels, feature_select_strategy="full")
        projected = self.project(hidden[:, 1:])
        found: dict[str, Any] = {"class_feature": hidden[:, 0]} if "class_feature" in signals else {}
        if wanted:
            found |= attention_signals(attention, seen[0][1], signals)
        side = self.layout.side  # type: ignore[attr-defined]
        eligible = all_eligible(side**2, hidden.device)
        return [
            VisionTokens(
                projected=projected[row],
                features=hidden[row, 1:],
                grid=(side, side),
                eligible=eligible,
                image_id=name,
                project=self.project,
                signals={signal: values[row] for signal, values in found.items()},
            )
            for row, name in enumerate(names)
        ]

    def project(self, features: Tensor) -> Tensor:
        return self.multi_modal_projector(features.to(self.vision_tower.dtype))


def attention_signals(attention: Any, qkv: Tensor, signals: Sequence[str]) -> dict[str, Any]:
    """Signals of CLIP's attention. qkv: [images, 1 + tokens, 3 x dim], of this process's heads."""
    heads = [part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)[:2]]
    if get_tensor_model_parallel_world_size() > 1 and attention.tp_size > 1:
        heads = [tensor_model_parallel_all_gather(part.contiguous(), dim=1) for part in heads]
    queries, keys = heads
    found: dict[str, Any] = {}
    if "class_attention" in signals:
        pairs = zip(queries[:, :, :1], keys, strict=True)
        found["class_attention"] = [class_probabilities(query, key, attention.scale) for query, key in pairs]
    if "mean_keys" in signals:
        found["mean_keys"] = keys[:, :, 1:].mean(1)
    return found


@MULTIMODAL_REGISTRY.register_processor(
    _processor,
    info=info_of(llava._build_llava_or_pixtral_hf_info),
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class ReducingLlava(ClipReducing, llava.LlavaForConditionalGeneration):
    def encode_images(self, requests: Sequence[ImageRequest], signals: Sequence[str], **inputs: Any) -> Any:
        image_input = self._parse_and_validate_image_input(**inputs)
        if not isinstance(image_input, llava.LlavaImagePixelInputs):
            raise MMTokError("images that come as embeddings cannot be reduced", "send pixels")
        vision = self.encode_tiles(image_input["pixel_values"], [r.image_id for r in requests], signals)
        return [self._with_padding(tokens, request) for tokens, request in zip(vision, requests, strict=True)]

    def _with_padding(self, vision: VisionTokens, request: ImageRequest) -> VisionTokens:
        if request.padded_from is None:
            return vision
        known = unencoded(self.layout, PILImage.new("RGB", request.padded_from), padded=True)
        return replace(vision, eligible=known.eligible.to(vision.projected.device))
