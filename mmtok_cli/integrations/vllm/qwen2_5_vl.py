"""Qwen2.5-VL in vLLM, with vision tokens that are selected between encoder and language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmtok_cli.integrations.vllm.processing import info_of
from mmtok_cli.integrations.vllm.qwen import QwenProcessor, QwenReducing


class Processor(QwenProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    family = "qwen2_5_vl"


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=info_of(qwen2_5_vl.Qwen2_5_VLProcessingInfo),
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class ReducingQwen2_5_VL(QwenReducing, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    norm = "ln_q"

    @property
    def attention_block(self) -> int:
        return max(self.visual.fullatt_block_indexes)

    def raster_order(self, sizes: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
        return self.visual.prepare_encoder_metadata(sizes)["reverse_indices"].to(device)
