"""`compare --retain`: the smallest budget of each method that keeps a share of the score, found by a search."""

from __future__ import annotations

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mmtok_cli.budget import Budget, UnmetBudgetError
from mmtok_cli.cases import Case
from mmtok_cli.comparison import (
    ComparisonRun,
    Prepared,
    Stop,
    make_directory,
    new_directories,
    prepare_comparison,
    require_same_settings,
)
from mmtok_cli.configuration import make_cases
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.processes import Processes
from mmtok_cli.evaluation.search import Searches, run_step, summarise_search
from mmtok_cli.files import require_writable_directory
from mmtok_cli.methods import method_class
from mmtok_cli.models import guiding_profile
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import check_budget
from mmtok_cli.planning import require_same_environment, timed_samples, with_absolute_paths
from mmtok_cli.progress import Progress
from mmtok_cli.results.records import digest_of_samples, planned_case
from mmtok_cli.results.retention import (
    Candidate,
    Retention,
    SearchDirectory,
    SearchPlan,
    SearchStep,
    read_search_plan,
)
from mmtok_cli.results.run_directory import PLAN, SEARCH_RESULT, SEARCH_TIMING, NotWrittenError, RunDirectory
from mmtok_cli.settings import CompareSettings
from mmtok_cli.summary import summarise_run

EVERYTHING = "all"  # the group of all questions
BATCH_IMAGES = 8  # after which the tests are looked at
LOOKED_AT = 16  # samples whose images tell how many vision tokens there are

# Fractions of a power of two, and shares in percent, between which the search refines. True: tried at once.
STEPS = {1.0: True, 0.875: False, 0.75: False, 0.625: False}
SHARES = {
    **{"50%": True, "40%": False, "30%": False, "25%": False, "20%": True, "18%": False, "15%": False, "12%": False},
    **{"10%": True, "8%": False, "7%": False, "6%": False, "5%": True, "4%": False, "3%": False, "2.5%": False},
    **{"2%": True, "1.8%": False, "1.5%": False, "1.2%": False, "1%": True},
}


class RetentionRun:
    """One search, new or resumed. run_dir: where it is saved; a new directory in `runs` unless given."""

    def __init__(
        self,
        settings: CompareSettings,
        run_dir: Path | None = None,
        progress: Progress | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.settings = settings
        self.named = run_dir is not None
        self.directory = run_dir or next(new_directories(settings.model))
        self.progress = progress or Progress()
        self.resume = resume

    @classmethod
    def resumed(
        cls, settings: CompareSettings, given: Collection[str], directory: Path, progress: Progress
    ) -> RetentionRun:
        """The search in a directory, to be continued with its own settings. given: names of settings that the user
        spelled out. Raises MMTokError where one of these differs."""
        then = read_search_plan(directory).options
        require_same_settings(with_absolute_paths(then), with_absolute_paths(settings), given, directory)
        return cls(then, directory, progress, resume=True)

    def measure(self, processes: Processes) -> tuple[Retention, Stop | None]:
        """Search, then time the budgets found; called in the writer alone. Returns the result, and the error or the
        interruption that stopped the run on the way."""
        if self.resume:
            with SearchDirectory.resume(self.directory) as store:
                return self._complete(*self._prepare(), store, processes)
        if self.named:
            require_writable_directory(self.directory, "--run-dir")
        prepared, plan = self._prepare()
        if not self.named:
            self.directory = make_directory(self.settings.model)
        with SearchDirectory.create(self.directory, plan) as store:
            return self._complete(prepared, plan, store, processes)

    def help(self, processes: Processes) -> None:
        """Search in a process other than the writer."""
        prepared, plan = self._prepare()
        with contextlib.suppress(KeyboardInterrupt):
            self._search(prepared, plan, None, processes)

    def _prepare(self) -> tuple[Prepared, SearchPlan]:
        prepared = prepare_comparison(self.settings, self.progress)
        return prepared, make_search_plan(self.settings, prepared.model, prepared.dataset, self.progress)

    def _complete(
        self, prepared: Prepared, plan: SearchPlan, store: SearchDirectory, processes: Processes
    ) -> tuple[Retention, Stop | None]:
        require_same_search(store.plan, plan)
        stopped: Stop | None = None
        try:
            self._search(prepared, store.plan, store, processes)
        except (KeyboardInterrupt, MMTokError) as error:
            if not store.steps:
                if isinstance(error, KeyboardInterrupt):
                    self._how_to_resume()
                raise
            stopped = error
        found = summarise_search(store, interrupted=stopped is not None)
        if not stopped:
            found, stopped = self._time(found, prepared)
        try:
            store.write_result(found, SEARCH_RESULT)
        except NotWrittenError as error:
            stopped = stopped or error
        if stopped:
            self._how_to_resume()
        return found, stopped

    def _how_to_resume(self) -> None:
        self.progress.note(f"resume with: mmtok compare --run-dir {self.directory} --resume")

    def _search(
        self, prepared: Prepared, plan: SearchPlan, store: SearchDirectory | None, processes: Processes
    ) -> None:
        """Run step after step, the same in all processes, which share the samples of each."""
        cases = cases_of_plan(self.settings, plan)
        (steps,) = processes.tell([store.steps if store else []])
        searches = Searches(plan)
        for step in steps:
            searches.add(step)
        with self.progress.task("searching", searches.budgets, searches.decided) as update:
            while wanted := searches.next():
                group, batch, numbers = wanted
                start = time.perf_counter()
                samples = [s for image in plan.batches(group)[batch] for s in image if s not in searches.unreadable]
                tried = {n: cases[n] for n in (0, *numbers)}
                done = run_step(prepared.model, prepared.dataset, tried, searches, samples, processes)
                step = SearchStep(
                    number=searches.count,
                    key=plan.key,
                    group=group,
                    batch=batch,
                    cases=numbers,
                    scores=done.scores,
                    unreadable=done.unreadable,
                    failures=done.failures,
                    seconds=time.perf_counter() - start,
                )
                if store:
                    store.add(step)
                searches.add(step)
                update(searches.decided, searches.budgets)

    def _time(self, found: Retention, prepared: Prepared) -> tuple[Retention, Stop | None]:
        """Time the budgets found beside the unreduced model, as an ordinary run without quality."""
        budgets = {method: found.budget_of(method) for method in dict.fromkeys(one.method for one in found.decisions)}
        methods = tuple(f"{method}@{budget}" for method, budget in budgets.items() if budget)
        if not methods:
            return found, None
        chosen = self.settings.parameters
        settings = self.settings.model_copy(
            update={
                "methods": methods,
                "parameters": tuple(text for text in chosen if budgets[text.partition(".")[0].strip()]),
                "budget": None,
                "retain": None,
                "by": None,
                "no_quality": True,
            }
        )
        directory = self.directory / SEARCH_TIMING
        run = ComparisonRun(
            settings, directory, self.progress, resume=(directory / PLAN).exists(), model=prepared.model
        )
        try:
            timing, stopped = run.measure(Processes())
        except (KeyboardInterrupt, MMTokError) as error:
            return found.model_copy(update={"interrupted": True}), error
        return found.model_copy(update={"timing": timing, "interrupted": timing.interrupted}), stopped


def make_search_plan(
    settings: CompareSettings, model: VisionLanguageModel, dataset: Dataset, progress: Progress
) -> SearchPlan:
    """What is searched. Raises MMTokError where nothing can be."""
    fixed = with_absolute_paths(settings)
    environment = environment_of(model)
    data_digest = digest_of_samples(dataset.samples)
    common = {
        "rules": asdict(settings.rules),
        "data": data_digest,
        **fixed.model_dump(include={"model", "max_new_tokens", "seed", "device_map"}),
    }
    cases = _candidates(settings, model, dataset, progress)
    size = settings.batch_size[0]
    groups = _groups(dataset, settings)
    return SearchPlan(
        model=settings.model,
        options=fixed,
        rules=settings.rules,
        cases=[Candidate(**dict(planned_case(case.id, environment, common)), coarse=coarse) for case, coarse in cases],
        environment=environment,
        data=dataset.name,
        data_digest=data_digest,
        groups=groups,
        batch_images=max(BATCH_IMAGES, size),
        metric=dataset.metric,
        left_out=dataset.notes(),
    )


def _methods(settings: CompareSettings, progress: Progress) -> list[str]:
    """The methods that take a budget."""
    found = []
    for name, budget in settings.named_methods:
        if budget:
            raise MMTokError(f"--retain finds the budget, and {name}@{budget} has one", f"name it {name}")
        if method_class(name).takes_budget:
            found.append(name)
        else:
            progress.note(f"{name} takes no budget and is left out of the search")
    if not found:
        raise MMTokError("none of the methods takes a budget", "name others with --methods, such as mmtok")
    return list(dict.fromkeys(found))


def _candidates(
    settings: CompareSettings, model: VisionLanguageModel, dataset: Dataset, progress: Progress
) -> list[tuple[Case, bool]]:
    """The baseline, then the cases of each method from the largest budget to the smallest, and whether each is tried at
    once. Budgets that no sample can meet are left out, unless they were named."""
    methods, given = _methods(settings, progress), settings.budgets
    readable, _ = timed_samples(dataset.samples, [1], LOOKED_AT, Sample.open)
    budgets = dict.fromkeys(given, True) if given else _ladder(settings, model, readable)
    ordered = sorted(budgets, key=lambda budget: budget.count or budget.percent or 0, reverse=True)
    if len({budget.count is None for budget in ordered}) > 1:
        raise MMTokError("--retain compares budgets, and some are counts and some are shares", "give one kind")
    baseline, *cases = _cases([(method, budget) for method in methods for budget in ordered], settings)
    found = [(baseline, True)]
    for case in cases:
        assert case.budget is not None
        try:
            check_budget(model, case.method, _readable(dataset), case.budget, case.rules)
        except UnmetBudgetError as error:
            if given:
                raise MMTokError(f"{case}: {error.message}", error.hint) from error
        else:
            found.append((case, budgets[case.budget]))
    for method in methods:
        if method not in {case.name for case, _ in found}:
            raise MMTokError(f"{method} can meet none of the budgets", "name some with --budget")
    return found


def _ladder(settings: CompareSettings, model: VisionLanguageModel, samples: Sequence[Sample]) -> dict[Budget, bool]:
    """Budgets and whether they are tried at once: shares for models whose images keep their size, otherwise numbers of
    tokens: powers of two up to half of the largest image of the samples, and three steps between them."""
    profile = guiding_profile(settings.model, model.family)
    if profile and any(budget.endswith("%") for budget in profile.budgets):
        return {Budget.parse(text): coarse for text, coarse in SHARES.items()}
    total = max(model.total(image) for sample in samples for image in sample.images)
    counts = {
        int(2**power * step): coarse and 2**power <= total / 2
        for power in range(total.bit_length() + 1)
        for step, coarse in STEPS.items()
        if (2**power * step).is_integer()
    }
    return {Budget(count=count): coarse for count, coarse in sorted(counts.items()) if count < total}


def _readable(dataset: Dataset) -> Iterator[Sample]:
    """The samples whose images can be read, one by one."""
    for sample in dataset.samples:
        try:
            opened = sample.open()
        except MMTokError:
            continue  # the search leaves it out, and says so
        yield opened


def _groups(dataset: Dataset, settings: CompareSettings) -> dict[str, list[list[int]]]:
    """The samples of each group, those about the same images together, in a random order of the images."""
    groups: dict[str, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, sample in enumerate(dataset.samples):
        if dataset.metric and not sample.references:
            continue
        group = (sample.kind or "other") if settings.by else EVERYTHING
        groups[group][sample.image_ids].append(number)
    order = random.Random(settings.seed)
    found = {}
    for group, images in sorted(groups.items()):
        found[group] = list(images.values())
        order.shuffle(found[group])
    return found


def cases_of_plan(settings: CompareSettings, plan: SearchPlan) -> dict[int, Case]:
    """The cases of a plan, by their numbers."""
    named = [(one.case.method, Budget.parse(one.case.budget or "")) for one in plan.cases[1:]]
    return dict(enumerate(_cases(named, settings)))


def _cases(named: Sequence[tuple[str, Budget]], settings: CompareSettings) -> list[Case]:
    """The baseline, then every method at its budget."""
    size = settings.batch_size[0]
    return [replace(case, batch_size=size) for case in make_cases(named, [Budget(count=1)], settings)]


def require_same_search(then: SearchPlan, now: SearchPlan) -> None:
    """Raises MMTokError that says what differs if a search cannot be resumed here."""
    require_same_environment(then.environment, now.environment)
    if then.key != now.key:
        what = "samples" if then.data_digest != now.data_digest else "methods or their parameters"
        raise MMTokError(f"the {what} have changed since the search was started", "start a new run without --resume")


def read_retention(path: Path) -> Retention:
    """The result of a saved search, with the times of the budgets found as far as they were measured."""
    found = summarise_search(SearchDirectory.open(path))
    timing = path / SEARCH_TIMING
    if not (timing / PLAN).is_file():
        return found
    times = summarise_run(RunDirectory.open(timing))
    return found.model_copy(update={"timing": times, "interrupted": found.interrupted or times.interrupted})
