"""Timing a plan: warm-up, then rounds until there are enough. Every result is saved as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

from mmtok_cli.cases import Case, failure_of, release_memory
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.records import CaseFailure, CountedFlops, TimingFailure
from mmtok_cli.results.run_directory import NotWrittenError, RunDirectory
from mmtok_cli.results.schema import LargestBatch
from mmtok_cli.settings import AnswerLength
from mmtok_cli.timing.capacity import largest_batch
from mmtok_cli.timing.flops import measure_flops
from mmtok_cli.timing.gpu import Gpu, Gpus
from mmtok_cli.timing.machine import Machine
from mmtok_cli.timing.runner import reserved_memory, run_case, run_round

QUICK = 2.0  # seconds; a shorter first run is mostly start-up

Result = TypeVar("Result")


def shape_of(model: VisionLanguageModel, batch: Sequence[Sample]) -> tuple[Any, ...]:
    """The shape of a batch's unreduced prompt, and of its images as the encoder sees them."""
    samples = [sample.open() for sample in batch]
    images = [sample.images for sample in samples]
    flat = [image for group in images for image in group]
    tokens = model.tokenize([sample.question for sample in samples], images, [None] * len(flat))
    grids = [model.whole_grid(image) if model.any_resolution else None for image in flat]
    return tuple(tokens["input_ids"].shape), tuple(map(model.total, flat)), tuple(grids)


@dataclass(frozen=True)
class Measurement:
    """Times the runs of a plan that are not in its run directory yet.

    cases: those of the plan, in its order. batches: the samples, by batch size. A case that fails is given up; the
    others continue.
    """

    model: VisionLanguageModel
    cases: Sequence[Case]
    batches: dict[int, list[list[Sample]]]
    store: RunDirectory
    gpu: Gpu | Gpus | None = None

    def warm_up(self) -> Iterator[Case]:
        """Count the FLOPs of each case and run it a few times untimed; yields each case that is ready."""
        opened: dict[int, list[Sample]] = {}
        for i, case in enumerate(self.cases):
            if case.batch_size not in opened:
                opened[case.batch_size] = self._first_batch(case)
            if i not in self.store.failures:
                self._attempt(i, None, partial(self._warm_up_case, i, opened[case.batch_size]))
            yield case

    def _warm_up_case(self, i: int, samples: list[Sample]) -> None:
        plan = self.store.plan
        if i not in self.store.counted:
            flops = measure_flops(self.model, self.cases[i], samples, **plan.options.timed_length)
            fits = self._largest_batch(i, samples[0]) if plan.options.find_batch else None
            self.store.add_flops(
                CountedFlops(
                    case=i,
                    key=plan.cases[i].key,
                    flops=flops.stages,
                    coverage=flops.coverage,
                    largest_batch=fits,
                    reserved=reserved_memory(self.model, self.cases[i], samples, **plan.options.timed_length),
                )
            )
        for _ in range(plan.warmup):
            run_case(self.model, self.cases[i], samples, **plan.options.timed_length)
        if plan.warmup:
            for batch in self._other_shapes(self.cases[i].batch_size):
                run_case(self.model, self.cases[i], [s.open() for s in batch], **plan.options.timed_length)

    def _other_shapes(self, size: int) -> list[list[Sample]]:
        """A batch of each shape beside that of the first one: a GPU chooses kernels, and allocates memory, by shapes.

        Nothing on a CPU, which does not.
        """
        if self.model.device.type == "cpu":
            return []
        shapes: dict[tuple[Any, ...], list[Sample]] = {}
        for batch in self.batches[size]:
            shapes.setdefault(shape_of(self.model, batch), batch)
        return list(shapes.values())[1:]

    def _largest_batch(self, number: int, sample: Sample) -> LargestBatch | None:
        """Found once for a method and budget, whatever the batch size."""
        case = self.cases[number]
        for other, counted in self.store.counted.items():
            if replace(self.cases[other], batch_size=case.batch_size) == case:
                return counted.largest_batch
        return largest_batch(self.model, case, sample, self.store.plan.options.timed_length)

    def estimate(self, *, evaluated: bool = False) -> list[float | CaseFailure]:
        """Seconds of one run of each case, or why it failed. Raises MMTokError for a case that is refused.

        evaluated: of a run whose prompts and answers are as long as those that are evaluated.
        """
        options = self.store.plan.options
        length = AnswerLength(max_new_tokens=options.max_new_tokens, ignore_eos=False)
        found = []
        for number, case in enumerate(self.cases):
            samples = self._first_batch(case)
            if evaluated:
                samples = [replace(each, question=each.unpadded_question or each.question) for each in samples]
            found.append(self._seconds_of(number, samples, length if evaluated else options.timed_length))
        return found

    def _seconds_of(self, number: int, samples: list[Sample], length: AnswerLength) -> float | CaseFailure:
        """Seconds of the first run, or of a second one where the first was so short that it was mostly start-up."""
        taken = 0.0
        for _ in range(2):
            start = time.perf_counter()
            try:
                run_case(self.model, self.cases[number], samples, **length)
            except MMTokError:
                raise
            except Exception as error:
                failure = CaseFailure(case=number, **failure_of(error))
                break
            taken = time.perf_counter() - start
            if taken > QUICK:
                return taken
        else:
            return taken
        release_memory(self.model.device)
        return failure

    def rounds(self) -> Iterator[int]:
        """Time round after round, skipping what is in the directory; yields the number of each complete round."""
        plan, store = self.store.plan, self.store
        seconds = sum(sum(run.repetitions["total"]) for run in store.runs.values())
        machine = Machine()
        for number, turns in zip(count(), plan.rotation().turns(), strict=False):
            if number >= plan.rounds and seconds >= (plan.min_time or 0.0):
                return
            if len(store.failures) == len(self.cases):
                return
            left = [turn for turn in turns if (number, turn.case) not in store.runs and turn.case not in store.failures]
            for run in run_round(
                self.model,
                self.cases,
                self.batches,
                number,
                left,
                **plan.options.timed_length,
                runs=plan.runs,
                gpu=self.gpu,
                attempt=self._attempt,
            ):
                seconds += sum(run.repetitions["total"])
                store.add_run(run.model_copy(update={"key": plan.cases[run.case].key, "machine": machine.state()}))
            yield number

    def _first_batch(self, case: Case) -> list[Sample]:
        return [sample.open() for sample in self.batches[case.batch_size][0]]

    def _attempt(self, case: int, number: int | None, work: Callable[[], Result]) -> Result | None:
        """Do the work of a case, or give the case up where it cannot be done.

        A baseline that is refused in the warm-up, on the very first batch, is an error of the user's and is raised.
        """
        try:
            return work()
        except NotWrittenError:
            raise
        except Exception as error:
            is_baseline = self.store.plan.baseline_of(case) == case
            if isinstance(error, MMTokError) and is_baseline and number is None:
                raise
            key = self.store.plan.cases[case].key
            failure = TimingFailure(case=case, key=key, round=number, **failure_of(error))
        self.store.add_failure(failure)
        release_memory(self.model.device)  # only here, since the error holds on to the memory of the failed run
        return None
