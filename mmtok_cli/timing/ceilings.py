"""The device's peak rates, measured in the same run, and the rates that each stage achieves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.quantization import stored_bytes
from mmtok_cli.models.room import free_memory
from mmtok_cli.results.profile import Achieved, Ceilings
from mmtok_cli.results.schema import CaseResult
from mmtok_cli.timing.clock import Clock
from mmtok_cli.timing.machine import expected_flops
from mmtok_cli.timing.partial import last_group, missing_groups

REPETITIONS = 5
TIME_LIMIT = 1.0  # seconds spent at one size after which no further repetition begins
TOO_LONG = 0.5  # seconds; a product or copy that is expected to take longer is not started
LONG_ENOUGH = {"cpu": 10e-3}  # seconds of one product
LONG_ENOUGH_ELSEWHERE = 1e-3
RISE = 1.1  # factor by which the rate must rise from one size to the next for a larger one to be tried
SMALLEST_PRODUCT, LARGEST_PRODUCT = 64, 16384  # rows
SMALLEST_COPY = 2**20  # bytes
LARGEST_COPY = {"cpu": 256 * 2**20}  # bytes: larger than the caches
LARGEST_COPY_ELSEWHERE = 2**30

CLOCK_TICK = 1e-9  # seconds; a coarse clock may read zero

Work = Callable[[], Any]


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a large matrix product and a large copy, sized to the device, so that this takes seconds on any of them."""
    rows, products = _products(device, dtype)
    copied, copies = _copies(device)
    return Ceilings(
        flops_per_second=2 * rows**3 / median(products),
        bytes_per_second=2 * copied / median(copies),
        dtype=str(dtype).removeprefix("torch."),
        tf32=device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
        rows=rows,
        copied=copied,
        matmul_seconds=products,
        copy_seconds=copies,
        expected_flops_per_second=expected_flops(device, dtype),
    )


def achieved(results: Sequence[CaseResult], weights_read: int, *, experts: bool = False) -> list[Achieved]:
    """The rates that the cases of a profile reached.

    experts: whether the model is a mixture of experts. How many of them a batch reads depends on its tokens, so that
    the rate of decoding is known for single sequences alone.
    """
    return [_achieved(result, None if experts and result.case.batch_size > 1 else weights_read) for result in results]


def weights_read(model: VisionLanguageModel) -> int:
    """Bytes of weights that are read to decode one token: those of the language model and its head.

    The KV cache and the one row of the input embedding are not counted. Layers that are not run count as the last group
    that is. Of a mixture of experts, those that one token is sent to count.
    """
    embedding = hf.input_embedding(model.model).weight
    head = hf.output_embedding(model.model).weight
    language_model = hf.language_model(model.model)
    expert_share = hf.expert_share(model.model.config)

    def read(module: Any) -> float:
        return sum(
            stored_bytes(weight) * (expert_share if hf.is_of_experts(name) else 1)
            for name, weight in module.named_parameters()
            if weight is not embedding
        )

    return stored_bytes(head) + round(missing_groups(model) * read(last_group(model)) + read(language_model))


def _achieved(result: CaseResult, weights_read: int | None) -> Achieved:
    seconds = {stage: times.median for stage, times in result.seconds.items()}
    passes = result.tokens.new - 1  # the first token comes from the logits of the prefill
    return Achieved(
        case=result.case,
        flops_per_second={
            stage: flops * result.case.batch_size / seconds[stage]
            for stage, flops in result.flops.items()
            if flops > 0 and seconds[stage] > 0
        },
        decode_bytes_per_second=weights_read * passes / seconds["decode"] if passes > 0 and weights_read else None,
    )


def grow(
    prepare: Callable[[int], Work],
    time: Callable[[Work], float],
    *,
    smallest: int,
    largest: int,
    power: int,
    enough: float = math.inf,
) -> tuple[int, list[float]]:
    """Double the size of a piece of work until it is large enough; returns that size and the seconds of its runs.

    prepare: the work of a size, which is in proportion to size ** power. time: does it and returns its seconds.

    A size is large enough when a run takes `enough` seconds and its rate is no longer rising, as it does while a fixed
    cost, such as that of threads on a busy machine, is most of the time. Nothing larger than `largest` is tried, nor
    what is expected to take more than `TOO_LONG`, except for the smallest size, so that the whole is bounded on any
    machine. Each size has one run to warm up and `REPETITIONS` more, fewer (but one) where they exceed `TIME_LIMIT`.
    The fastest decides, since others may have been disturbed.
    """
    size, rate_before = smallest, 0.0
    while True:
        work = prepare(size)
        time(work)
        seconds: list[float] = []
        while len(seconds) < REPETITIONS and sum(seconds) < TIME_LIMIT:
            seconds.append(time(work))
        fastest, larger = min(seconds), min(2 * size, largest)
        rate = size**power / max(fastest, CLOCK_TICK)
        settled = fastest >= enough and rate < RISE * rate_before
        if settled or size == largest or fastest * (larger / size) ** power > TOO_LONG:
            return size, seconds
        size, rate_before = larger, rate


def _products(device: torch.device, dtype: torch.dtype) -> tuple[int, list[float]]:
    """Rows of square matrices, and seconds of each of a few of their products."""

    def prepare(rows: int) -> Work:
        a, b = (torch.randn(rows, rows, dtype=dtype, device=device) for _ in range(2))
        product = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=product)

    return grow(
        prepare,
        partial(_seconds, device),
        smallest=SMALLEST_PRODUCT,
        largest=LARGEST_PRODUCT,
        power=3,
        enough=LONG_ENOUGH.get(device.type, LONG_ENOUGH_ELSEWHERE),
    )


def _copies(device: torch.device) -> tuple[int, list[float]]:
    """Bytes that are copied, and seconds of each of a few copies."""

    def prepare(count: int) -> Work:
        source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
        return lambda: target.copy_(source)

    wanted, free = LARGEST_COPY.get(device.type, LARGEST_COPY_ELSEWHERE), free_memory(device)
    return grow(
        prepare,
        partial(_seconds, device),
        smallest=SMALLEST_COPY,
        largest=wanted if free is None else max(SMALLEST_COPY, min(wanted, free // 8)),
        power=1,
    )


def _seconds(device: torch.device, work: Work) -> float:
    clock = Clock(device)
    with clock.stage("work"):
        work()
    return clock.seconds()["work"]
