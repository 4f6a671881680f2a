"""The steps of `mmtok compare`: plan, measure, show, judge."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmtok_cli.budget import parse_budgets
from mmtok_cli.cases import Case
from mmtok_cli.cli.pictures import has_pictures, save_pictures
from mmtok_cli.cli.request import RUNS, Request, new_directory
from mmtok_cli.cli.session import Setup, make_case, make_cases, make_setup, open_model
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import ClosedImages
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.predictions import evaluate
from mmtok_cli.evaluation.processes import Processes
from mmtok_cli.files import require_writable_directory
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.report import checks, console, tables
from mmtok_cli.results.planning import (
    at_batch_sizes,
    estimate,
    in_batches,
    make_plan,
    require_same,
    require_whole_batches,
    timed_samples,
)
from mmtok_cli.results.progress import Remaining, is_finished, is_timed, left_to_evaluate, whole_rounds
from mmtok_cli.results.records import Plan
from mmtok_cli.results.run_directory import PLAN, NotWrittenError, RunDirectory, newest_run
from mmtok_cli.results.schema import Comparison
from mmtok_cli.results.shortfalls import shortfalls
from mmtok_cli.summary import summarise_run
from mmtok_cli.timing.gpu import open_gpu
from mmtok_cli.timing.rounds import Measurement

MOST_NOTES = 10


@dataclass(frozen=True)
class Prepared:
    """What is measured: a model, the cases of the plan, a dataset."""

    model: VisionLanguageModel
    cases: list[Case]
    dataset: Dataset
    setup: Setup


class Session:
    """One call of the command: a request and, where a run is resumed, what is known of it.

    pictures: whether to draw what is kept.
    """

    def __init__(self, request: Request, run_dir: Path | None, quiet: bool, store: RunDirectory | None = None) -> None:
        self.request = request
        self.pictures = False
        self.quiet = quiet
        self.store = store
        self.directory = run_dir or new_directory(request.model)
        self.notes = console.notes_console(quiet)

    @classmethod
    def resumed(cls, request: Request, given: Collection[str], run_dir: Path | None, quiet: bool) -> Session:
        """Go on with a run. Raises MMTokError where there is none, or the options say something else."""
        store = RunDirectory.open(run_dir or newest_run(RUNS))
        return cls(request.resumed(store.plan, given, store.path), store.path, quiet, store)

    def preview(self, as_json: bool) -> None:
        """Print the plan and the time that it takes, after one run of each case."""
        measurement = self._measurement(self._prepare(), RunDirectory)
        with console.progress_bar(self.quiet) as progress:
            progress.add_task("one run of each case", total=None)
            plan = estimate(measurement.store.plan, measurement.estimate())
        if as_json:
            console.print_json(plan)
            return
        out = console.results_console()
        out.print(checks.plan_table(plan))
        for line in checks.plan_lines(plan):
            out.print(line)

    def measure(self, processes: Processes) -> tuple[Comparison, NotWrittenError | None]:
        """Measure what is missing: times by this process, quality by all. To be called in the writer alone.

        Returns the result, and why nothing more could be written down if that is so. Where not even one round is whole
        when it has to stop, that is raised: KeyboardInterrupt or NotWrittenError.
        """
        if self.store and is_finished(self.store) and not (self.pictures and not has_pictures(self.directory)):
            self.notes.print(f"nothing is left to measure in {console.printable(self.directory)}", soft_wrap=True)
            processes.tell([None])
            return summarise_run(self.store), None
        if self.store is None:
            if (self.directory / PLAN).exists():
                raise MMTokError(f"{self.directory} holds a run already", "go on with it by --resume, or name another")
            require_writable_directory(self.directory, "--run-dir")
        prepared = self._prepare()
        measurement = self._measurement(prepared, RunDirectory.create)
        store = measurement.store
        with store.locked():
            timed, stopped = self._until_stopped(store, lambda: self._time(measurement))
            remaining = left_to_evaluate(store) if timed else None
            evaluated, stopped_too = self._until_stopped(
                store, lambda: self._evaluate(prepared, remaining, processes, store)
            )
            stopped = stopped or stopped_too
            if timed and evaluated and self.pictures:
                self._until_stopped(store, lambda: self._draw(prepared, store))
        comparison = summarise_run(store)
        try:
            store.write_result(comparison)
        except NotWrittenError as error:
            stopped = stopped or error
        return comparison, stopped

    def help(self, processes: Processes) -> None:
        """Evaluate, in a process other than the writer, the batches that the writer hands out."""
        with contextlib.suppress(KeyboardInterrupt):
            self._evaluate(self._prepare(), None, processes, None)

    def _until_stopped(self, store: RunDirectory, work: Callable[[], None]) -> tuple[bool, NotWrittenError | None]:
        """Whether the work was done, and why nothing could be written down if that is what stopped it."""
        try:
            work()
        except (KeyboardInterrupt, NotWrittenError) as error:
            if not whole_rounds(store):
                self._how_to_resume()
                raise
            return False, error if isinstance(error, NotWrittenError) else None
        except Exception:
            if store.runs:
                self._how_to_resume()
            raise
        return True, None

    def _draw(self, prepared: Prepared, store: RunDirectory) -> None:
        """Draw what is kept. What was measured does not hang on it, so that a fault is told and no more."""
        with self.notes.status("drawing what is kept"):
            try:
                save_pictures(prepared.model, prepared.cases, prepared.dataset, store)
            except MMTokError as error:
                console.print_error(error)

    def plot(self, comparison: Comparison, path: Path) -> None:
        """Plot the cases of the first batch size. Raises MMTokError where there is nothing to plot."""
        from mmtok_cli.report.plots import save_tradeoff

        first, *others = tables.by_batch_size(comparison)
        if not first.results or not first.results[0].case.is_baseline or len(first.results) < 2:
            raise MMTokError("there is nothing to plot", "it takes the unreduced baseline and one case more")
        if not any(result.fidelity for result in first.results):
            raise MMTokError("there is nothing to plot", "it takes quality: leave --no-quality and --layers out")
        save_tradeoff(first, path)
        which = f" (batches of {first.schedule.batch_size})" if others else ""
        self.notes.print(f"wrote {console.printable(path)}{which}", soft_wrap=True)

    def tell_how_to_resume(self, comparison: Comparison) -> None:
        if comparison.interrupted:
            self._how_to_resume()

    def _how_to_resume(self) -> None:
        directory = console.printable(self.directory)
        self.notes.print(f"• go on with: mmtok compare --run-dir {directory} --resume", soft_wrap=True)

    def _prepare(self) -> Prepared:
        """Everything that every process needs. Raises MMTokError for what cannot be done, the cheapest faults first."""
        request = self.request
        names, sizes = request.method_names(), request.batch_sizes()
        setup = make_setup(
            names,
            request.model,
            request.seed,
            track=request.track,
            positions=request.positions,
            budget_means=request.budget_means,
            settings=request.settings,
        )
        chosen = parse_budgets(request.budget) if request.budget is not None else None
        cases = at_batch_sizes(_with_baseline_again(make_cases(names, chosen, setup), names, setup), sizes)
        dataset = request.open_data()
        require_whole_batches(len(dataset.samples), sizes)
        for note in dataset.notes()[:MOST_NOTES]:
            self.notes.print(f"• {console.printable(note)}", soft_wrap=True)
        if request.layers is not None and not request.no_quality:
            self.notes.print("• the first layers alone answer nothing: quality is not measured with --layers")
        model = open_model(
            request.model,
            request.device,
            request.dtype,
            request.weights,
            self.quiet,
            layers=request.layers,
            attention=request.attention,
            device_map=request.device_map,
        )
        return Prepared(model, cases, dataset, setup)

    def _measurement(self, prepared: Prepared, create: Callable[[Path, Plan], RunDirectory]) -> Measurement:
        model, cases, sizes = prepared.model, prepared.cases, self.request.batch_sizes()
        samples = prepared.dataset.samples
        timed = timed_samples(samples, sizes, self.request.rounds)
        groups = in_batches(timed, sizes)
        for case in cases:
            whole = [sample for batch in in_batches(samples, sizes)[case.batch_size] for sample in batch]
            lazy = any(isinstance(sample.images, ClosedImages) for sample in whole)
            case.check(model, [sample.open() for sample in groups[case.batch_size][0]] if lazy else whole)
        plan = self._plan(prepared, len(timed))
        if self.store is not None:
            require_same(self.store.plan, plan)
        store = self.store or create(self.directory, plan)
        return Measurement(model, cases, groups, store, open_gpu(model.device))

    def _plan(self, prepared: Prepared, timed: int) -> Plan:
        request, dataset = self.request, prepared.dataset
        return make_plan(
            prepared.cases,
            dataset.samples,
            environment_of(prepared.model),
            model=request.model,
            rules=prepared.setup.rules,
            options=request.model_dump(),
            data=dataset.name,
            seed=request.seed,
            max_new_tokens=request.max_new_tokens,
            rounds=request.rounds,
            runs=request.runs,
            warmup=request.warmup,
            min_time=request.min_time,
            timed=timed,
            quality=not request.no_quality and request.layers is None,
            metric=dataset.metric,
            left_out=dataset.notes(),
        )

    def _time(self, measurement: Measurement) -> None:
        plan = measurement.store.plan
        if is_timed(measurement.store):
            return
        with console.progress_bar(self.quiet) as progress:
            task = progress.add_task("warming up", total=len(measurement.cases))
            for _ in measurement.warm_up():
                progress.advance(task)
            progress.update(task, description="timing", total=plan.rounds, completed=0)
            for number in measurement.rounds():
                progress.update(task, completed=number + 1, total=max(plan.rounds, number + 1))

    def _evaluate(
        self, prepared: Prepared, remaining: Remaining | None, processes: Processes, store: RunDirectory | None
    ) -> None:
        samples = len(prepared.dataset.samples)
        left = 0 if remaining is None else min(samples, len(remaining.batches) * remaining.batch_size)
        with console.progress_bar(self.quiet) as progress:
            task = progress.add_task("evaluating", total=samples, completed=samples - left)
            for done in evaluate(
                prepared.model,
                prepared.cases,
                prepared.dataset,
                remaining,
                processes=processes,
                store=store,
                max_new_tokens=self.request.max_new_tokens,
            ):
                progress.advance(task, done)


def check_verdict(least: float | None, stage: str) -> None:
    """Refuse a stage that there is no speedup of. Raises MMTokError."""
    if least is not None and stage not in tables.COMPARED:
        raise MMTokError(f"--fail-below-stage {stage!r} has no speedup", f"choose one of {', '.join(tables.COMPARED)}")


def judge(comparison: Comparison, least: float | None, stage: str) -> bool:
    """Whether all speedups are large enough; says which are not."""
    lines = [] if least is None else shortfalls(comparison, stage, least)
    for line in lines:
        console.notes_console().print(f"failed: {line}", soft_wrap=True)
    return not lines


def _with_baseline_again(cases: list[Case], names: Sequence[str], setup: Setup) -> list[Case]:
    """The cases, and the baseline once more where it was named as a method."""
    if "full" not in names:
        return cases
    return [*cases, replace(make_case("full", None, setup), again=True)]
