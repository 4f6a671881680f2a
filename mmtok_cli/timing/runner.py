"""Timing cases: one run, or one round of all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median

from mmtok_cli.cases import Case, release_memory
from mmtok_cli.data.samples import Sample, decoded_videos
from mmtok_cli.decoding import answer_mask
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Answers
from mmtok_cli.results.records import TimedRun, sample_name
from mmtok_cli.results.schedule import Turn
from mmtok_cli.timing.clock import Clock, with_sums
from mmtok_cli.timing.gpu import Gpu, Gpus
from mmtok_cli.timing.memory import Peak, host_memory, peak_memory
from mmtok_cli.timing.partial import last_layer, missing_groups, of_whole_model

# Does the work of a case in a round, or gives the case up and returns None.
Attempt = Callable[[int, int, Callable[[], TimedRun]], TimedRun | None]


def run_case(
    model: VisionLanguageModel,
    case: Case,
    samples: Sequence[Sample],
    max_new_tokens: int,
    index: int = 0,
    *,
    ignore_eos: bool = False,
    runs: int = 1,
    gpu: Gpu | Gpus | None = None,
) -> TimedRun:
    """Answer one batch `runs` times under the clock. index: the case's number in the record."""
    answers, peaks, repetitions = None, [], []
    before, violations = (gpu.joules(), gpu.violations()) if gpu else (None, None)
    for _ in range(runs):
        answers = None  # frees the memory of the last repetition before the next begins
        with peak_memory(*model.devices) as peak:
            clock = Clock(*model.devices)
            with last_layer(model, clock.now) as spans:
                decoded = decoded_videos(samples, clock.stage)
                answers = case.answer(model, decoded, max_new_tokens, clock.stage, ignore_eos=ignore_eos)
            stages = of_whole_model(clock.stages(), clock.sums(spans), missing_groups(model))
            repetitions.append(with_sums(stages))
        peaks.append(peak)
    assert answers is not None
    after = gpu.joules() if gpu else None
    joules = None if before is None or after is None else (after - before) / runs
    steps = answers.token_ids.shape[1]
    ended = answer_mask(answers.token_ids, model.eos_token_ids).sum(1).tolist()
    return _record(index, samples, answers, repetitions, peaks).model_copy(
        update={
            "new_tokens": [steps] * len(samples) if ignore_eos else ended,
            "gpu": gpu.state(joules, violations) if gpu else None,
        }
    )


def reserved_memory(
    model: VisionLanguageModel, case: Case, samples: Sequence[Sample], max_new_tokens: int, *, ignore_eos: bool = False
) -> int | None:
    """The most bytes that the allocator holds for one batch, from an untimed run that begins with empty caches.

    In the rounds it also holds what the cases before needed, and emptying its caches there would cost them time.
    """
    if model.device.type != "cuda":
        return None
    release_memory(model.device)
    return run_case(model, case, samples, max_new_tokens, ignore_eos=ignore_eos).reserved


def run_round(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    batches: Mapping[int, Sequence[Sequence[Sample]]],
    number: int,
    turns: Sequence[Turn],
    *,
    max_new_tokens: int,
    ignore_eos: bool = False,
    runs: int = 1,
    gpu: Gpu | Gpus | None = None,
    attempt: Attempt | None = None,
) -> Iterator[TimedRun]:
    """Time the cases of one round; yields each run as soon as it is done.

    batches: the samples by batch size. Their images are read before the clock starts and held until the round is over.
    attempt: called with the case, the round and the work; without it errors are raised.

    Raises MMTokError for an image that can no longer be read, which is not a failure of the case.
    """
    opened: dict[tuple[int, int], list[Sample]] = {}

    for turn in turns:
        case = cases[turn.case]
        batch = case.batch_size, turn.batch
        if batch not in opened:
            opened[batch] = [sample.open() for sample in batches[case.batch_size][turn.batch]]
        work = partial(
            run_case,
            model,
            case,
            opened[batch],
            max_new_tokens,
            turn.case,
            ignore_eos=ignore_eos,
            runs=runs,
            gpu=gpu,
        )
        run = attempt(turn.case, number, work) if attempt else work()
        if run is not None:
            yield run.model_copy(update={"round": number, "batch": turn.batch})


def _record(
    index: int,
    samples: Sequence[Sample],
    answers: Answers,
    repetitions: Sequence[dict[str, float]],
    peaks: Sequence[Peak],
) -> TimedRun:
    by_stage = {stage: [seconds[stage] for seconds in repetitions] for stage in repetitions[0]}
    return TimedRun(
        case=index,
        samples=[sample_name(sample) for sample in samples],
        seconds={stage: median(values) for stage, values in by_stage.items()},
        repetitions=by_stage,
        tokens=answers.reduced.tokens,
        positions=answers.reduced.positions,
        answers=answers.texts,
        steps=answers.token_ids.shape[1],
        kv_cache=answers.kv_cache_bytes,
        peak=_largest(peaks, "bytes"),
        reserved=_largest(peaks, "reserved"),
        host=host_memory(),
        drafts=list(answers.drafts),
    )


def _largest(peaks: Sequence[Peak], name: str) -> int | None:
    return max((value for peak in peaks if (value := getattr(peak, name)) is not None), default=None)
