"""The largest batch that fits into memory: from the peaks of two small batches and, on a GPU, by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mmtok_cli.cases import Case, release_memory
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import is_out_of_memory
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.quantization import stored_bytes
from mmtok_cli.models.room import free_memory
from mmtok_cli.option_values import LARGEST_BATCH
from mmtok_cli.pipeline import Answers
from mmtok_cli.results.schema import LargestBatch
from mmtok_cli.settings import AnswerLength
from mmtok_cli.stages import unwatched
from mmtok_cli.timing.memory import peak_memory
from mmtok_cli.timing.partial import last_group, missing_groups, missing_layers
from mmtok_cli.timing.traces import allocated_peak

TRIED = (1, 2)  # batch sizes whose peaks are measured
MOST_TRIES = 12  # runs of large batches

Batch = Callable[[int], Answers]  # answers a batch of so many copies of one sample


def largest_batch(model: VisionLanguageModel, case: Case, sample: Sample, length: AnswerLength) -> LargestBatch | None:
    """How many copies of the sample fit into one batch of the case, beside the weights.

    Peak memory is taken as a line through those of batches of 1 and 2, which the allocator of a GPU reports and the
    profiler sees on a CPU. On a GPU the batch is then run, and smaller or larger ones until the limit is found; memory
    that runs out is caught. Layers that are not run count as the last group that is, and then nothing is run.

    None where the device does not say how much memory it has, or has too little for a batch of 1.
    """
    release_memory(model.device)
    free = _free(model.device)
    if free is None:
        return None

    def answer(size: int) -> Answers:
        return case.answer(model, [sample] * size, length["max_new_tokens"], unwatched, ignore_eos=length["ignore_eos"])

    peaks = _peaks(model, answer)
    release_memory(model.device)  # only here, since an error holds on to the memory of the failed run
    if not peaks:
        return None
    whole = not missing_layers(model)
    if len(peaks) < len(TRIED):
        return LargestBatch(size=TRIED[0], measured=whole, free=free, fixed=0, per_sample=peaks[0])
    fixed, per_sample = line(peaks)
    computed = fitting(free - _missing_weights(model), fixed, per_sample)
    measured = model.device.type == "cuda" and whole
    size = search(computed, partial(_fits, model.device, answer)) if measured else computed
    return LargestBatch(size=size, measured=measured, free=free, fixed=fixed, per_sample=per_sample)


def line(peaks: Sequence[int]) -> tuple[int, int]:
    """Fixed bytes and bytes per sample, from the peaks of batches of the sizes `TRIED`."""
    (small, large), (low, high) = TRIED, peaks
    per_sample = max(1, (high - low) // (large - small))
    return max(0, low - small * per_sample), per_sample


def fitting(free: int, fixed: int, per_sample: int) -> int:
    """How many samples fit by that line."""
    return max(0, min(LARGEST_BATCH, (free - fixed) // per_sample))


def search(computed: int, fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, give or take 3 %, from the size that was computed.

    fits: runs a batch. Those of the sizes `TRIED` are known to fit. Steps double until one size fits and one does not;
    then the space between them is halved.
    """
    low, high = max(TRIED), LARGEST_BATCH + 1
    size, step = max(low + 1, computed), max(1, computed // 16)
    for _ in range(MOST_TRIES):
        if not low < size < high:
            size = (low + high) // 2
        if high - low <= max(1, low // 32):
            break
        if fits(size):
            low = size
            size = low + step if high > LARGEST_BATCH else (low + high) // 2
        else:
            high = size
            size = high - step if low == max(TRIED) else (low + high) // 2
        step *= 2
    return low


def _peaks(model: VisionLanguageModel, answer: Batch) -> list[int]:
    """The peaks of batches of the sizes `TRIED`, up to one that does not fit."""
    peaks: list[int] = []
    for size in TRIED:
        try:
            peaks.append(_peak(model, partial(answer, size)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
    return peaks


def _fits(device: torch.device, answer: Batch, size: int) -> bool:
    try:
        answer(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    release_memory(device)  # only here, since the error holds on to the memory of the failed run
    return fits


def _peak(model: VisionLanguageModel, answer: Callable[[], Answers]) -> int:
    """Peak bytes of a run above what was allocated before, with the KV cache of layers that are not run."""
    if model.device.type == "cuda":
        with peak_memory(*model.devices) as peak:
            answers = answer()
        allocated = peak.bytes or 0
    else:
        allocated, answers = allocated_peak(answer, model.device)
    return allocated + answers.missing_kv_cache_bytes


def _free(device: torch.device) -> int | None:
    """Bytes that can be allocated, with those that torch's allocator holds without using them."""
    free = free_memory(device)
    if free is None or device.type != "cuda":
        return free
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _missing_weights(model: VisionLanguageModel) -> int:
    """Bytes of the weights of the layers that are not run."""
    return int(missing_groups(model) * sum(map(stored_bytes, last_group(model).parameters())))
