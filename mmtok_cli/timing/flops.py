"""FLOPs of each stage, counted by torch while the model runs, and the operators that this count leaves out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.schema import FlopCoverage, Flops
from mmtok_cli.stages import ALL_STAGES, CHECK, STAGES
from mmtok_cli.timing.clock import Stages
from mmtok_cli.timing.partial import last_layer, missing_groups, of_whole_model


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes [batch, heads, tokens, head dim]. Like torch's own formulas, without regard to a causal mask."""
    return sdpa_flop_count(query, key, value)


def _flash_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes [batch, tokens, heads, head dim]."""
    return sdpa_flop_count(*((batch, heads, n, dim) for batch, n, heads, dim in (query, key, value)))


def _packed_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *args: Any, **kwargs: Any
) -> int:
    """[tokens, heads, head dim] each, of several sequences that begin and end at cu_seqlens: [sequences + 1]."""
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    shapes = [tensor.shape[1:] for tensor in (query, key, value)]
    return sum(
        sdpa_flop_count(*((1, heads, n, dim) for n, (heads, dim) in zip((of_query, n, n), shapes, strict=True)))
        for of_query, n in lengths
    )


_packed_flash_attention._get_raw = True  # type: ignore[attr-defined]  # torch then passes tensors, not shapes

# Torch has formulas for the attention kernels of NVIDIA GPUs alone, and none for operators of other packages.
FORMULAS = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_attention_math_for_mps": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,  # XPU
    "flash_attn._flash_attn_forward": _flash_attention,
    "flash_attn._flash_attn_varlen_forward": _packed_flash_attention,
}

# Words in the names of operators that multiply matrices: products, convolutions, attention, recurrent cells.
PRODUCTS = re.compile(
    r"(^|_)([a-z0-9]*m[mv]|matmul|v?dot|linear|einsum|conv(olution|\dd)?|attention|attn|mha|sdpa|lstm|gru|rnn)(_|$)"
)
# Packages of attention kernels name what runs one fwd, and themselves in the namespace: flash_attn_3.fwd.
ATTENTION_PACKAGE, FORWARD = re.compile(r"(^|_)attn\d*(_|$)"), re.compile(r"(^|_)(fwd|forward)(_|$)")
ATTENTION = re.compile(r"(^|[_.])(attn\d*|attention)(_|\.|$)")
PLAIN_ATTENTION = ("sdpa", "eager")  # kernels of torch itself


def formulas() -> dict[Any, Callable[..., int]]:
    """The formulas beside torch's own, of operators that exist here."""
    found = {}
    for name, formula in FORMULAS.items():
        namespace, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found[packet] = formula
    return found


class SeenOperators(TorchDispatchMode):
    """Counts the calls of all operators by name, below torch's own counter and so after its decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "_overloadpacket", func)] += 1
        return func(*args, **(kwargs or {}))

    def attention_calls(self) -> int:
        """Calls of attention kernels so far; eager attention has none."""
        return sum(number for operator, number in self.calls.items() if ATTENTION.search(str(operator)))


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
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    seen = SeenOperators()
    stages, attention_calls = Stages(counter.get_total_flops), Stages(seen.attention_calls)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with stages.stage(name), attention_calls.stage(name):
            yield

    with seen, counter, last_layer(model, counter.get_total_flops) as spans:
        case.answer(model, samples, max_new_tokens, stage, ignore_eos=ignore_eos)
    stage_spans = stages.spans()
    seen_stages = {name for name, _, _ in stage_spans}
    stages_of_case = tuple(name for name in ALL_STAGES if name in STAGES or name in seen_stages)
    counted, last = (dict.fromkeys(stages_of_case, 0.0) for _ in range(2))
    for flops, found in ((counted, stage_spans), (last, spans)):
        for name, start, end in found:
            if name != CHECK:
                flops[name] += (end - start) / len(samples)
    whole = of_whole_model(counted, last, missing_groups(model))
    total = sum(whole[name] for name in stages_of_case)
    return Flops(
        stages={**whole, "total": total},
        coverage=coverage(
            seen.calls,
            counter.flop_registry,
            model.attention,
            model.encoder_attention,
            encoder_calls=sum(end - start for name, start, end in attention_calls.spans() if name == "encode"),
        ),
    )


def coverage(calls: Counter[Any], formulas: Any, *attention: str, encoder_calls: int = 0) -> FlopCoverage:
    """Calls of all operators, of those with a formula, and of matrix products without one.

    attention: the kernels in use. One of which no operator was seen is missed as a whole: releases of flash-attn
    before 2.7 call their kernels past torch's dispatcher. encoder_calls: of attention kernels while images are encoded.
    """
    counted: dict[str, int] = {}
    missed: dict[str, int] = {}
    for operator, number in calls.most_common():
        name = str(operator).removeprefix("aten.")
        if operator in formulas:
            counted[name] = number
        elif _multiplies(name):
            missed[name] = number
    for kernel in attention:
        kind = kernel.partition("_")[0]
        if kernel not in PLAIN_ATTENTION and not any(kind in name for name in (*counted, *missed)):
            missed[kernel] = 0
    return FlopCoverage(calls=calls.total(), counted=counted, missed=missed, encoder_attention=encoder_calls)


def _multiplies(name: str) -> bool:
    """Whether the name of an operator says that it multiplies matrices."""
    namespace, _, operator = name.rpartition(".")
    return bool(PRODUCTS.search(operator) or (ATTENTION_PACKAGE.search(namespace) and FORWARD.search(operator)))
