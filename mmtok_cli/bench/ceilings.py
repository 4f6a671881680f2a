"""What the device can do at best, measured in the same run, and how near each stage comes to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from mmtok_cli.bench.clock import Clock
from mmtok_cli.bench.part import missing_layers
from mmtok_cli.bench.results import CaseResult, Profile, Record
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.room import free_memory

REPETITIONS = 5
LONG_ENOUGH = {"cpu": 5e-3}  # seconds of one matrix product
LONG_ENOUGH_ELSEWHERE = 1e-3
SMALLEST_PRODUCT, LARGEST_PRODUCT = 1024, 16384  # rows
COPIED = {"cpu": 256 * 2**20}  # bytes: more than caches hold
COPIED_ELSEWHERE = 2**30


class Ceilings(Record):
    """FLOP/s of the product of two square matrices in the model's data type, and bytes/s of a copy.

    Medians over repetitions, whose seconds are kept. rows: of the matrices. copied: bytes of what was copied; every
    one was read and written, and counts twice. tf32: whether float32 products were rounded to TF32, as the model's are.
    """

    flops_per_second: float
    bytes_per_second: float
    dtype: str
    tf32: bool
    rows: int
    copied: int
    matmul_seconds: list[float]
    copy_seconds: list[float]


class Achieved(Record):
    """What one case achieved: counted FLOPs / median seconds by stage, and bytes of the language model's weights read
    for each decoded token / seconds per token, None where a single token was made, which prefill had left over."""

    method: str
    budget: str | None
    flops_per_second: dict[str, float]
    decode_bytes_per_second: float | None


class CeilingProfile(Profile):
    """A profile with the device's ceilings; `weights_read` are bytes for each decoded token."""

    ceilings: Ceilings
    weights_read: int
    achieved: list[Achieved]


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a large matrix product and a large copy, sized to the device; a fraction of a second in all."""
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
    )


def achieved(results: Sequence[CaseResult], weights_read: int) -> list[Achieved]:
    """What the cases of a profile, whose batches hold one sample, achieved."""
    return [_achieved(result, weights_read) for result in results]


def weights_read(model: VisionLanguageModel) -> int:
    """Bytes of weights that decoding one token reads: the language model's and its head's. Of the input embedding it
    reads a row, which is not counted; nor is the KV cache. Layers that are not run count as the last one that is."""
    embedding = model.model.get_input_embeddings().weight
    head = model.model.get_output_embeddings().weight
    language_model = hf.language_model(model.model)
    last = hf.decoder_layers(language_model)[-1]
    missing = missing_layers(model) * sum(weight.nbytes for weight in last.parameters())
    return head.nbytes + missing + sum(w.nbytes for w in language_model.parameters() if w is not embedding)


def _achieved(result: CaseResult, weights_read: int) -> Achieved:
    seconds = {stage: times.median for stage, times in result.seconds.items()}
    passes = result.tokens.new - 1  # the first token comes of the prefill's logits
    return Achieved(
        method=result.method,
        budget=result.budget,
        flops_per_second={
            stage: flops / seconds[stage] for stage, flops in result.flops.items() if flops > 0 and seconds[stage] > 0
        },
        decode_bytes_per_second=weights_read * passes / seconds["decode"] if passes > 0 else None,
    )


def _products(device: torch.device, dtype: torch.dtype) -> tuple[int, list[float]]:
    """Rows of square matrices whose product takes long enough, and seconds of each of a few products."""
    enough, rows = LONG_ENOUGH.get(device.type, LONG_ENOUGH_ELSEWHERE), SMALLEST_PRODUCT
    while True:
        a, b = (torch.randn(rows, rows, dtype=dtype, device=device) for _ in range(2))
        product = torch.empty_like(a)
        seconds = _timed(lambda: torch.mm(a, b, out=product), device)  # noqa: B023 (called before the loop goes on)
        if median(seconds) >= enough or 2 * rows > LARGEST_PRODUCT:
            return rows, seconds
        rows *= 2


def _copies(device: torch.device) -> tuple[int, list[float]]:
    """Bytes that are copied, and seconds of each of a few copies."""
    wanted, free = COPIED.get(device.type, COPIED_ELSEWHERE), free_memory(device)
    count = wanted if free is None else max(2**20, min(wanted, free // 8))
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return count, _timed(lambda: target.copy_(source), device)


def _timed(work: Callable[[], Any], device: torch.device) -> list[float]:
    work()  # warms up
    seconds = []
    for _ in range(REPETITIONS):
        clock = Clock(device)
        with clock.stage("work"):
            work()
        seconds.append(clock.seconds()["work"])
    return seconds
