"""Floating-point operations of each stage, counted by torch rather than by a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmtok_cli.bench.clock import Stages
from mmtok_cli.bench.runner import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import STAGES


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch has a formula for the attention kernels of GPUs only.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def count_flops(
    model: VisionLanguageModel, case: Case, samples: Sequence[Sample], max_new_tokens: int
) -> dict[str, float]:
    """FLOPs per sample by stage, and their sum as `total`.

    torch counts matrix products, convolutions and attention, two operations for each multiply-accumulate; what is
    element-wise (softmax, normalisation, MMTok's greedy loop) counts as nothing.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    stages = Stages(counter.get_total_flops)
    with counter:
        case.answer(model, samples, max_new_tokens, stages.stage)
    flops: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for name, start, end in stages.spans:
        flops[name] += (end - start) / len(samples)
    return {**flops, "total": sum(flops.values())}
