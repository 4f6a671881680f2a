"""Running a comparison: prepare, plan, time, evaluate. Everything measured goes into the run directory at once."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path

from mmtok_cli import precision
from mmtok_cli.cases import Case
from mmtok_cli.configuration import cases_of, configured_model, with_writer
from mmtok_cli.conversation import check_conversation, require_policy
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.conversations import hold_conversations
from mmtok_cli.evaluation.metrics import with_metric
from mmtok_cli.evaluation.predictions import evaluate
from mmtok_cli.evaluation.processes import Processes
from mmtok_cli.files import require_writable_directory
from mmtok_cli.lengths import of_prompt_length
from mmtok_cli.methods.kept import Replay
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.overlays import has_overlays, save_overlays
from mmtok_cli.pipeline import check_sample
from mmtok_cli.planning import (
    Estimate,
    dataset_of,
    estimate,
    in_batches,
    make_plan,
    require_conversations,
    require_same,
    require_whole_batches,
    timed_samples,
    with_absolute_paths,
)
from mmtok_cli.progress import Progress
from mmtok_cli.results.progress import (
    Remaining,
    RemainingConversations,
    evaluated_batches,
    is_finished,
    is_timed,
    left_to_converse,
    left_to_evaluate,
    whole_rounds,
)
from mmtok_cli.results.records import Plan
from mmtok_cli.results.run_directory import PLAN, NotWrittenError, RunDirectory, read_plan, require_no_run
from mmtok_cli.results.schema import Comparison
from mmtok_cli.settings import CompareSettings, option_name
from mmtok_cli.summary import summarise_run
from mmtok_cli.timing.gpu import open_gpus
from mmtok_cli.timing.rounds import Measurement
from mmtok_cli.timing.turns import run_conversation

Stop = MMTokError | KeyboardInterrupt  # what ends a run early but not what was measured before

RUNS = Path("runs")
MOST_NOTES = 10

Batches = dict[int, list[list[Sample]]]  # by their size


@dataclass(frozen=True)
class Prepared:
    """What is measured."""

    model: VisionLanguageModel
    cases: list[Case]
    dataset: Dataset


class ComparisonRun:
    """One run of a comparison, new or resumed.

    run_dir: where it is saved; a new directory in `runs` unless given. resume: whether to continue the run in it.
    overlays: whether to draw the tokens that each case keeps. model: if it is loaded already.
    """

    def __init__(
        self,
        settings: CompareSettings,
        run_dir: Path | None = None,
        progress: Progress | None = None,
        *,
        resume: bool = False,
        overlays: bool = False,
        model: VisionLanguageModel | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.named = run_dir is not None
        self.directory = run_dir or next(new_directories(settings.model))
        self.progress = progress or Progress()
        self.resume = resume
        self.overlays = overlays

    @classmethod
    def resumed(
        cls,
        settings: CompareSettings,
        given: Collection[str],
        directory: Path,
        progress: Progress,
        *,
        overlays: bool = False,
    ) -> ComparisonRun:
        """The run in a directory, to be continued with its own settings.

        given: names of settings that the user spelled out. Raises MMTokError where there is no run, and where one of
        these differs.
        """
        then = read_plan(directory).options
        require_same_settings(with_absolute_paths(then), with_absolute_paths(settings), given, directory)
        return cls(then, directory, progress, resume=True, overlays=overlays)

    def estimate(self) -> Estimate:
        """The plan and the time that it takes, after one run of each case. Nothing is written."""
        prepared = self._prepare()
        plan, batches = self._plan(prepared)
        if self.resume:
            require_same(read_plan(self.directory), plan)
        measurement = self._measurement(prepared, batches, RunDirectory(self.directory, plan))
        with self.progress.task("one run of each case"):
            runs = measurement.estimate()
            differ = plan.quality and plan.options.has_exact_lengths
            return estimate(plan, runs, measurement.estimate(evaluated=True) if differ else runs)

    def measure(self, processes: Processes) -> tuple[Comparison, Stop | None]:
        """Measure what is missing: times by this process, answers by all. To be called in the writer alone.

        The run directory is locked throughout, and a run that is resumed is read under the lock. Returns the result,
        and the error or interruption that stopped the run on the way; raises it if not even one round is complete.
        """
        if self.resume:
            with RunDirectory.resume(self.directory) as store:
                self._tell_failures(store)
                if is_finished(store) and not self._lacks_output(store):
                    self.progress.note(f"run {self.directory} is already complete")
                    processes.tell([None])
                    if store.plan.options.turns:
                        processes.tell([None])
                    return summarise_run(store), None
                prepared = self._prepare()
                plan, batches = self._plan(prepared)
                require_same(store.plan, plan)
                return self._complete(prepared, batches, store, processes)
        if self.named:
            require_no_run(self.directory)
        require_writable_directory(self.directory, "--run-dir")
        prepared = self._prepare()
        plan, batches = self._plan(prepared)
        if not self.named:
            self.directory = make_directory(self.settings.model)
        try:
            with RunDirectory.create(self.directory, plan) as store:
                return self._complete(prepared, batches, store, processes)
        except MMTokError:
            if not self.named:
                with contextlib.suppress(OSError):  # it is not empty
                    self.directory.rmdir()
            raise

    def _complete(
        self, prepared: Prepared, batches: Batches, store: RunDirectory, processes: Processes
    ) -> tuple[Comparison, Stop | None]:
        """Measure what is missing in a run directory, and summarise it."""
        measurement = self._measurement(prepared, batches, store)
        stopped = self._until_stopped(store, lambda: self._time(measurement))
        remaining = None if stopped else left_to_evaluate(store)
        stopped_too = self._until_stopped(store, lambda: self._evaluate(prepared, remaining, processes, store))
        if not stopped_too and self.settings.turns:
            talks = None if stopped else left_to_converse(store)
            stopped_too = self._until_stopped(store, lambda: self._converse(prepared, talks, processes, store))
        stopped = stopped or stopped_too
        if not stopped and self._lacks_task_scores(store):
            stopped = self._until_stopped(store, lambda: self._score_tasks(prepared, store))
        if not stopped:
            stopped = self._until_stopped(store, lambda: self._compare_precision(prepared, store))
        if not stopped and self.overlays:
            stopped = self._until_stopped(store, lambda: self._draw(prepared, store))
        comparison = summarise_run(store)
        try:
            store.write_result(comparison)
        except NotWrittenError as error:
            stopped = stopped or error
        if comparison.interrupted:
            self._how_to_resume()
        return comparison, stopped

    def help(self, processes: Processes) -> None:
        """Evaluate, in a process other than the writer, the batches that the writer distributes."""
        with contextlib.suppress(KeyboardInterrupt):
            prepared = self._prepare()
            self._evaluate(prepared, None, processes, None)
            if self.settings.turns:
                self._converse(prepared, None, processes, None)

    def _until_stopped(self, store: RunDirectory, work: Callable[[], None]) -> Stop | None:
        """What stopped the work; None if it was done."""
        try:
            work()
        except (KeyboardInterrupt, MMTokError) as error:
            if not whole_rounds(store):
                if store.runs or isinstance(error, KeyboardInterrupt):
                    self._how_to_resume()
                raise
            return error
        except Exception:
            if store.runs:
                self._how_to_resume()
            raise
        return None

    def _lacks_output(self, store: RunDirectory) -> bool:
        """Whether something is left to be made of a run that is measured."""
        return (self.overlays and not has_overlays(self.directory)) or self._lacks_task_scores(store)

    def _lacks_task_scores(self, store: RunDirectory) -> bool:
        return self.settings.tasks is not None and self.settings.measures_quality and store.task_scores is None

    def _score_tasks(self, prepared: Prepared, store: RunDirectory) -> None:
        """Let the tasks score the answers of each case."""
        from mmtok_cli.integrations.lmms_eval.tasks import score_tasks  # an extra

        with self.progress.task("scoring by task"):
            store.add_task_scores(score_tasks(prepared.dataset.samples, evaluated_batches(store), store.key))

    def _compare_precision(self, prepared: Prepared, store: RunDirectory) -> None:
        """Find out what the data type changes about the selections."""
        if not (store.path / precision.FILE).exists():
            found = precision.measure_overlaps(prepared.model, prepared.cases, prepared.dataset.samples)
            if found:
                precision.save_overlaps(store, found)

    def _draw(self, prepared: Prepared, store: RunDirectory) -> None:
        """Draw the kept tokens."""
        with self.progress.task("drawing overlays"):
            save_overlays(prepared.model, prepared.cases, prepared.dataset, store, self.progress)

    def _tell_failures(self, store: RunDirectory) -> None:
        """Say which cases failed before, since they are not run again."""
        for case, failure in sorted(store.failures.items()):
            self.progress.note(
                f"{store.plan.cases[case].case.label} failed before ({failure.reason}) and is left out; "
                f"to try it again, delete {store.path / 'failures' / failure.file_name}"
            )

    def _how_to_resume(self) -> None:
        if (self.directory / PLAN).exists():  # not where it was renamed or deleted
            self.progress.note(f"resume with: mmtok compare --run-dir {self.directory} --resume")

    def _prepare(self) -> Prepared:
        return prepare_comparison(self.settings, self.progress, self.model)

    def _plan(self, prepared: Prepared) -> tuple[Plan, Batches]:
        """The plan, and the batches of each size that the rounds cycle through. Raises MMTokError for a budget that
        cannot be met."""
        model, cases, sizes = prepared.model, prepared.cases, self.settings.batch_size
        as_timed = partial(self._as_timed, model)
        timed, left_out = timed_samples(prepared.dataset.samples, sizes, self.settings.rounds, as_timed)
        for problem in left_out[:MOST_NOTES]:
            self.progress.note(problem)
        groups = in_batches(timed, sizes)
        for case in cases:
            case.check(model, (sample.open() for sample in timed))
        return make_plan(self.settings, cases, prepared.dataset, environment_of(model), len(timed)), groups

    def _as_timed(self, model: VisionLanguageModel, sample: Sample) -> Sample:
        """The sample at the length of timed prompts. Raises MMTokError for one that the model cannot read."""
        settings = self.settings
        if settings.prompt_tokens is not None:
            sample = of_prompt_length(model, sample, settings.prompt_tokens)
        check_sample(model, sample.open(), **settings.timed_length)
        return sample

    def _measurement(self, prepared: Prepared, batches: Batches, store: RunDirectory) -> Measurement:
        return Measurement(prepared.model, prepared.cases, batches, store, open_gpus(prepared.model.devices))

    def _time(self, measurement: Measurement) -> None:
        plan = measurement.store.plan
        if is_timed(measurement.store):
            return
        with self.progress.task("warming up", len(measurement.cases)) as update:
            for number, _ in enumerate(measurement.warm_up(), 1):
                update(number)
        with self.progress.task("timing", plan.rounds) as update:
            for number in measurement.rounds():
                update(number + 1, max(plan.rounds, number + 1))

    def _evaluate(
        self, prepared: Prepared, remaining: Remaining | None, processes: Processes, store: RunDirectory | None
    ) -> None:
        samples = len(prepared.dataset.samples)
        left = 0 if remaining is None else min(samples, len(remaining.batches) * remaining.batch_size)
        done = samples - left
        with self.progress.task("evaluating", samples, done) as update:
            for more in evaluate(
                prepared.model,
                prepared.cases,
                prepared.dataset,
                remaining,
                processes=processes,
                store=store,
                max_new_tokens=self.settings.max_new_tokens,
            ):
                done += more
                update(done)

    def _converse(
        self,
        prepared: Prepared,
        remaining: RemainingConversations | None,
        processes: Processes,
        store: RunDirectory | None,
    ) -> None:
        settings, samples = self.settings, len(prepared.dataset.samples)
        done = samples - (len(remaining.samples) if remaining else 0)
        hold = partial(
            run_conversation,
            prepared.model,
            max_new_tokens=settings.max_new_tokens,
            encode_again=settings.encode_again,
        )
        with self.progress.task("conversations", samples, done) as update:
            for more in hold_conversations(
                prepared.model,
                prepared.cases,
                prepared.dataset,
                remaining,
                hold,
                processes=processes,
                store=store,
                seed=settings.seed,
            ):
                done += more
                update(done)


def prepare_comparison(
    settings: CompareSettings, progress: Progress, model: VisionLanguageModel | None = None
) -> Prepared:
    """What every process needs. model: if it is loaded already. Raises MMTokError for what cannot be done, the cheapest
    checks first."""
    cases = cases_of(settings)
    for case in cases:
        for policy in settings.turns or ():
            require_policy(case.method, policy)
    dataset = _dataset(settings, progress)
    if not settings.turns:  # only the first question of a conversation counts
        dataset = replace(dataset, samples=[replace(s, later=()) if s.later else s for s in dataset.samples])
    dataset = with_metric(dataset, settings.metric)
    require_whole_batches(len(dataset.samples), settings.batch_size)
    for case in cases:
        if isinstance(case.method, Replay):
            for sample in dataset.samples:
                case.method.require(sample.image_ids, [turn.question for turn in sample.turns])
    model = model or configured_model(settings, progress, settings.layers, compiled=settings.compile_model)
    if settings.turns:
        require_conversations(dataset.samples, settings, partial(check_conversation, model))
    cases = with_writer(cases, settings, progress)
    for note in dataset.notes()[:MOST_NOTES]:
        progress.note(note)
    if settings.layers is not None and not settings.no_quality:
        progress.note("--layers runs a part of the model, so answers are not evaluated")
    return Prepared(model, cases, dataset)


def _dataset(settings: CompareSettings, progress: Progress) -> Dataset:
    """The samples of --tasks or --data. Raises MMTokError where there is none."""
    if settings.tasks is None:
        return dataset_of(settings)
    from mmtok_cli.integrations.lmms_eval.tasks import open_tasks  # an extra

    with progress.task(f"loading {', '.join(settings.tasks)}"):
        return open_tasks(settings.tasks, settings.sample_limit, settings.include_path)


def require_same_settings(then: CompareSettings, now: CompareSettings, given: Collection[str], directory: Path) -> None:
    for name in given:
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            option = option_name(CompareSettings, name)
            raise MMTokError(
                f"{option} is {_shown(after)} here and {_shown(before)} in the run in {directory}",
                f"omit {option}, or start a new run without --resume",
            )


def new_directories(model: str) -> Iterator[Path]:
    """Directories named after the time and the model, which do not exist yet."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name) or "model"
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name[:60]}"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return (path for path in (RUNS / name for name in names) if not path.exists())


def make_directory(model: str) -> Path:
    """A new directory for a run, which no other process takes that starts in the same second."""
    for path in new_directories(model):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise MMTokError(
                f"{path} cannot be created: {error.strerror}", "name a directory with --run-dir"
            ) from error
        return path
    raise AssertionError("the names are endless")


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "missing"
    return "missing" if value is None else str(value)
