"""FLOPs of each stage, counted by torch while the model runs, and the operators that this count leaves out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.schema import FlopCoverage, Flops
from mmtok_cli.stages import ALL_STAGES, CHECK, STAGES
from mmtok_cli.timing.clock import Stages
from mmtok_cli.timing.partial import last_layer, missing_layers, of_whole_model


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch only has formulas for the attention kernels of GPUs.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}

# Words in the names of operators that multiply matrices: products, convolutions, attention, recurrent cells.
PRODUCTS = re.compile(
    r"(^|_)([a-z0-9]*m[mv]|matmul|v?dot|linear|einsum|conv(olution|\dd)?|attention|lstm|gru|rnn)(_|$)"
)


class SeenOperators(TorchDispatchMode):
    """Counts the calls of all operators by name, below torch's own counter and so after its decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "_overloadpacket", func)] += 1
        return func(*args, **(kwargs or {}))


def count_flops(
    model: VisionLanguageModel,
    case: Case,
    samples: Sequence[Sample],
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> dict[str, float]:
    """FLOPs per sample by stage, and their sum as `total`; see `measure_flops`."""
    return measure_flops(model, case, samples, max_new_tokens, ignore_eos=ignore_eos).stages


def measure_flops(
    model: VisionLanguageModel,
    case: Case,
    samples: Sequence[Sample],
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> Flops:
    """FLOPs per sample by stage, their sum as `total`, and the operators that they cover.

    torch counts matrix products, convolutions and attention, two operations for each multiply-accumulate. Element-wise
    operators (softmax, normalisation, MMTok's greedy loop) are not counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    stages = Stages(counter.get_total_flops)
    with SeenOperators() as seen, counter, last_layer(model, counter.get_total_flops) as spans:
        case.answer(model, samples, max_new_tokens, stages.stage, ignore_eos=ignore_eos)
    stage_spans = stages.spans()
    seen_stages = {name for name, _, _ in stage_spans}
    stages_of_case = tuple(name for name in ALL_STAGES if name in STAGES or name in seen_stages)
    counted, last = (dict.fromkeys(stages_of_case, 0.0) for _ in range(2))
    for flops, found in ((counted, stage_spans), (last, spans)):
        for name, start, end in found:
            if name != CHECK:
                flops[name] += (end - start) / len(samples)
    whole = of_whole_model(counted, last, missing_layers(model))
    total = sum(whole[name] for name in stages_of_case)
    return Flops(stages={**whole, "total": total}, coverage=coverage(seen.calls, counter.flop_registry))


def coverage(calls: Counter[Any], formulas: Any) -> FlopCoverage:
    """Calls of all operators, of those with a formula, and of matrix products without one."""
    counted: dict[str, int] = {}
    missed: dict[str, int] = {}
    for operator, number in calls.most_common():
        name = str(operator).removeprefix("aten.")
        if operator in formulas:
            counted[name] = number
        elif PRODUCTS.search(name.split(".")[-1]):
            missed[name] = number
    return FlopCoverage(calls=calls.total(), counted=counted, missed=missed)
