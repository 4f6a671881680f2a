"""Qwen3-VL in vLLM, with vision tokens that are selected between encoder and language model.

The features that the first decoder layers add (DeepStack) follow the rows of the kept tokens.
"""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmtok_cli.integrations.vllm.processing import info_of
from mmtok_cli.integrations.vllm.qwen import QwenProcessor, QwenReducing


class Processor(QwenProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    family = "qwen3_vl"


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=info_of(qwen3_vl.Qwen3VLProcessingInfo), dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class ReducingQwen3VL(QwenReducing, qwen3_vl.Qwen3VLForConditionalGeneration):
    norm = "norm"

    @property
    def attention_block(self) -> int:
        return len(self.visual.blocks) - 1
