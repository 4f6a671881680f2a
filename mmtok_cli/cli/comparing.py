"""The steps of `mmtok compare`: plan, measure, show, judge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from mmtok_cli.bench.gpu import open_gpu
from mmtok_cli.bench.measurement import Measurement
from mmtok_cli.bench.planning import (
    at_batch_sizes,
    estimate,
    in_batches,
    make_plan,
    require_same,
    require_whole_batches,
)
from mmtok_cli.bench.records import Plan
from mmtok_cli.bench.results import Comparison
from mmtok_cli.bench.runner import Case
from mmtok_cli.bench.store import PLAN, NotWrittenError, RunDirectory, newest_run
from mmtok_cli.bench.summary import is_finished, summarise_run, whole_rounds
from mmtok_cli.bench.verdict import shortfalls
from mmtok_cli.budget import parse_budgets
from mmtok_cli.cli.request import RUNS, Request, new_directory
from mmtok_cli.cli.session import Setup, make_case, make_cases, make_setup, open_model
from mmtok_cli.data.samples import Sample, demo_samples
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.files import require_writable_directory
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.report import checks, console, tables


class Session:
    """One call of the command: a request and, where a run is resumed, what is known of it."""

    def __init__(self, request: Request, run_dir: Path | None, quiet: bool, store: RunDirectory | None = None) -> None:
        self.request = request
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
        measurement = self._prepare(RunDirectory)
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

    def measure(self) -> tuple[Comparison, NotWrittenError | None]:
        """Measure what is missing. Returns the result, and why nothing more could be written down if that is so.

        Where not even one round is whole when it has to stop, that is raised: KeyboardInterrupt or NotWrittenError.
        """
        if self.store and is_finished(self.store):
            self.notes.print(f"nothing is left to measure in {console.printable(self.directory)}", soft_wrap=True)
            return summarise_run(self.store), None
        if self.store is None:
            if (self.directory / PLAN).exists():
                raise MMTokError(f"{self.directory} holds a run already", "go on with it by --resume, or name another")
            require_writable_directory(self.directory, "--run-dir")
        measurement = self._prepare(RunDirectory.create)
        with measurement.store.locked():
            stopped = self._until_stopped(measurement)
        comparison = summarise_run(measurement.store)
        try:
            measurement.store.write_result(comparison)
        except NotWrittenError as error:
            stopped = stopped or error
        return comparison, stopped

    def _until_stopped(self, measurement: Measurement) -> NotWrittenError | None:
        try:
            self._measure(measurement)
        except (KeyboardInterrupt, NotWrittenError) as error:
            if not whole_rounds(measurement.store):
                self._how_to_resume()
                raise
            return error if isinstance(error, NotWrittenError) else None
        except Exception:
            if measurement.store.runs:
                self._how_to_resume()
            raise
        return None

    def plot(self, comparison: Comparison, path: Path) -> None:
        """Plot the cases of the first batch size. Raises MMTokError where there is nothing to plot."""
        from mmtok_cli.report.plots import save_tradeoff

        first, *others = tables.by_batch_size(comparison)
        if not first.results or not tables.is_baseline(first.results[0]) or len(first.results) < 2:
            raise MMTokError("there is nothing to plot", "it takes the unreduced baseline and one case more")
        save_tradeoff(first, path)
        which = f" (batches of {first.schedule.batch_size})" if others else ""
        self.notes.print(f"wrote {console.printable(path)}{which}", soft_wrap=True)

    def tell_how_to_resume(self, comparison: Comparison) -> None:
        if comparison.interrupted:
            self._how_to_resume()

    def _how_to_resume(self) -> None:
        directory = console.printable(self.directory)
        self.notes.print(f"• go on with: mmtok compare --run-dir {directory} --resume", soft_wrap=True)

    def _prepare(self, create: Callable[[Path, Plan], RunDirectory]) -> Measurement:
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
        require_whole_batches(request.limit, sizes)
        model = open_model(request.model, request.device, request.dtype, request.weights, self.quiet)
        samples = demo_samples(request.limit)
        groups = in_batches(samples, sizes)
        for size, batches in groups.items():
            if len(batches) * size < request.limit:
                self.notes.print(
                    f"asking {len(batches) * size} of {request.limit} samples: whole batches of {size}, so that all "
                    "runs are alike"
                )
        for case in cases:
            case.check(model, [sample for batch in groups[case.batch_size] for sample in batch])
        plan = self._plan(cases, samples, model, setup)
        if self.store is not None:
            require_same(self.store.plan, plan)
        store = self.store or create(self.directory, plan)
        return Measurement(model, cases, groups, store, open_gpu(model.device))

    def _plan(self, cases: Sequence[Case], samples: Sequence[Sample], model: VisionLanguageModel, setup: Setup) -> Plan:
        request = self.request
        return make_plan(
            cases,
            samples,
            environment_of(model),
            model=request.model,
            rules=setup.rules,
            options=request.model_dump(),
            data="demo",
            seed=request.seed,
            max_new_tokens=request.max_new_tokens,
            rounds=request.rounds,
            runs=request.runs,
            warmup=request.warmup,
            min_time=request.min_time,
        )

    def _measure(self, measurement: Measurement) -> None:
        plan = measurement.store.plan
        with console.progress_bar(self.quiet) as progress:
            task = progress.add_task("warming up", total=len(measurement.cases))
            for _ in measurement.warm_up():
                progress.advance(task)
            progress.update(task, description="measuring", total=plan.rounds, completed=0)
            for number in measurement.rounds():
                progress.update(task, completed=number + 1, total=max(plan.rounds, number + 1))


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


def show(comparison: Comparison, settings: Sequence[str], as_json: bool, quiet: bool) -> None:
    """JSON, or tables for each batch size and notes on how to read them."""
    if as_json:
        console.print_json(comparison)
        return
    out, notes = console.results_console(), console.notes_console(quiet)
    rules = tables.rules_text(comparison.rules, settings)
    for part in tables.by_batch_size(comparison):
        schedule = part.schedule
        out.print(
            f"{console.printable(part.model)}: {schedule.samples} samples, batches of {schedule.batch_size}, "
            f"seed {schedule.seed}" + (f"; {rules}" if rules else "")
        )
        out.print(tables.speed_table(part))
        if part.results:
            out.print(tables.quality_table(part))
            if kinds := tables.kind_table(part):
                out.print(kinds)
    out.print(tables.environment_line(comparison.model, comparison.environment))
    for note in checks.notes(comparison):
        notes.print(f"• {note}")


def _with_baseline_again(cases: list[Case], names: Sequence[str], setup: Setup) -> list[Case]:
    """The cases, and the baseline once more where it was named as a method."""
    if "full" not in names:
        return cases
    return [*cases, replace(make_case("full", None, setup), again=True)]
