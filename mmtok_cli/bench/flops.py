"""Floating-point operations of each stage, counted by torch rather than by a formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch has a formula for the attention kernels of GPUs only.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def count_flops(
    model: VisionLanguageModel, method: Method, samples: Sequence[Sample], budget: Budget | None, max_new_tokens: int
) -> dict[str, float]:
    """FLOPs per sample by stage, and their sum as `total`.

    torch counts matrix products, convolutions and attention, two operations for each multiply-accumulate; what is
    element-wise (softmax, normalisation, MMTok's greedy loop) counts as nothing.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    flops: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        before = counter.get_total_flops()
        yield
        flops[name] = (counter.get_total_flops() - before) / len(samples)

    with counter:
        answer(model, method, samples, budget, max_new_tokens=max_new_tokens, stage=stage)
    return {**flops, "total": sum(flops.values())}
