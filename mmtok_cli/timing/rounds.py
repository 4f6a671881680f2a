"""Measuring a plan: warm-up, then rounds until there are enough; everything is written down as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.records import Counted, Failure
from mmtok_cli.results.run_directory import NotWrittenError, RunDirectory
from mmtok_cli.results.schedule import Turn
from mmtok_cli.timing.flops import measure_flops
from mmtok_cli.timing.gpu import Gpu
from mmtok_cli.timing.memory import first_line, is_out_of_memory, release_memory
from mmtok_cli.timing.runner import Case, run_case

QUICK = 2.0  # seconds


@dataclass
class Measurement:
    """Runs what the plan of a directory asks for and the directory does not hold yet.

    cases: those of the plan, in its order. batches: the samples, by batch size; their images are read before the clock
    starts. A case that runs out of memory is given up and the others go on.
    """

    model: VisionLanguageModel
    cases: Sequence[Case]
    batches: dict[int, list[list[Sample]]]
    store: RunDirectory
    gpu: Gpu | None = None
    _seconds: float = field(default=0.0, init=False)
    _opened: dict[tuple[int, int], list[Sample]] = field(default_factory=dict, init=False)

    def warm_up(self) -> Iterator[Case]:
        """Count the operations of each case and run it a few times unseen; yields each case that is ready."""
        plan = self.store.plan
        for i, case in enumerate(self.cases):
            samples = self._samples(case.batch_size, 0)

            def prepare(i: int = i, case: Case = case, samples: list[Sample] = samples) -> None:
                if i not in self.store.counted:
                    flops = measure_flops(self.model, case, samples, plan.max_new_tokens)
                    key = plan.cases[i].key
                    self.store.count(Counted(case=i, key=key, flops=flops.stages, coverage=flops.coverage))
                for _ in range(plan.warmup):
                    run_case(self.model, case, samples, plan.max_new_tokens)

            if i not in self.store.failures:
                self._attempt(i, None, prepare)
            yield case
        self._opened.clear()

    def estimate(self) -> list[float | None]:
        """Seconds of one run of each case; None where it ran out of memory.

        The first run of something quick is mostly a matter of getting started, so it is given a second one.
        """
        return [self._time(case) for case in self.cases]

    def _time(self, case: Case) -> float | None:
        taken = 0.0
        for _ in range(2):
            start = time.perf_counter()
            try:
                run_case(self.model, case, self._samples(case.batch_size, 0), self.store.plan.max_new_tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            taken = time.perf_counter() - start
            if taken > QUICK:
                return taken
        else:
            return taken
        release_memory(self.model.device)
        return None

    def rounds(self) -> Iterator[int]:
        """Measure round after round, skipping what is there; yields the number of each round that is whole."""
        plan = self.store.plan
        self._seconds = sum(sum(run.repetitions["total"]) for run in self.store.runs.values())
        for number, turns in zip(count(), plan.rotation().turns(), strict=False):
            if number >= plan.rounds and self._seconds >= (plan.min_time or 0.0):
                return
            if len(self.store.failures) == len(self.cases):
                return
            self._round(number, turns)
            yield number

    def _round(self, number: int, turns: list[Turn]) -> None:
        for turn in turns:
            if (number, turn.case) not in self.store.runs and turn.case not in self.store.failures:
                self._attempt(turn.case, number, partial(self._measure, number, turn))
        self._opened.clear()

    def _measure(self, number: int, turn: Turn) -> None:
        plan, case = self.store.plan, self.cases[turn.case]
        run, _ = run_case(
            self.model,
            case,
            self._samples(case.batch_size, turn.batch),
            plan.max_new_tokens,
            turn.case,
            runs=plan.runs,
            gpu=self.gpu,
        )
        self._seconds += sum(run.repetitions["total"])
        place = {"round": number, "batch": turn.batch, "key": plan.cases[turn.case].key}
        self.store.add(run.model_copy(update=place))

    def _samples(self, size: int, batch: int) -> list[Sample]:
        """A batch with its images read, which are held until the round is over."""
        if (size, batch) not in self._opened:
            self._opened[size, batch] = [sample.open() for sample in self.batches[size][batch]]
        return self._opened[size, batch]

    def _attempt(self, case: int, number: int | None, work: Callable[[], None]) -> None:
        """Do what belongs to a case, and give the case up where that cannot be done.

        What cannot be done even on the first batch is for the user to know before anything is measured.
        """
        try:
            work()
        except NotWrittenError:
            raise
        except Exception as error:
            exhausted = is_out_of_memory(error)
            if not exhausted and (number is None or not isinstance(error, MMTokError)):
                raise
            said = error.message if isinstance(error, MMTokError) else first_line(error)
            key, reason = self.store.plan.cases[case].key, "out of memory" if exhausted else "refused"
            self.store.fail(Failure(case=case, key=key, round=number, reason=reason, message=said))
        else:
            return
        release_memory(self.model.device)  # here, where the error no longer holds what it failed with
