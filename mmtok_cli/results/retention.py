"""The records and the result of a search for the smallest budgets that keep a share of the score."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mmtok_cli.data.layouts import MetricName
from mmtok_cli.errors import MMTokError
from mmtok_cli.files import remove_temporary_files
from mmtok_cli.results.records import CaseFailure, FileRecord, PlannedCase, Tokens, UnreadableSample, digest
from mmtok_cli.results.run_directory import (
    SEARCH,
    SEARCH_STEPS,
    RecordDirectory,
    locked,
    parsed,
    read_file,
    records_in,
)
from mmtok_cli.results.schema import Comparison, Environment, Number, OfCase, Record, Seconds, Share
from mmtok_cli.rules import Rules
from mmtok_cli.settings import CompareSettings

Verdict = Literal["kept", "lost", "open"]


class Candidate(PlannedCase):
    """A case that may be tried. coarse: it is tried at once; others only between two coarse ones."""

    coarse: bool = True


class SearchPlan(Record):
    """The content of `search.json`: what is searched, on which samples.

    cases: the baseline, then the budgets of each method, from the largest to the smallest. groups: the numbers of the
    samples of each group, image by image in the order in which they are used. batch_images: images in a batch.
    metric: how answers are scored; None for agreement with the unreduced model.
    """

    schema_: Literal["mmtok.search/1"] = Field(default="mmtok.search/1", alias="schema")
    model: str
    options: CompareSettings
    rules: Rules
    cases: list[Candidate] = Field(min_length=2)
    environment: Environment
    data: str
    data_digest: str
    groups: dict[str, list[list[Number]]]
    batch_images: Annotated[Number, Field(ge=1)]
    metric: MetricName | None
    left_out: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if self.options.retain is None:
            raise ValueError("options.retain is missing")
        return self

    @property
    def key(self) -> str:
        """A digest of the cases and the order of the samples, which the records carry."""
        return digest([[case.key for case in self.cases], self.groups, self.batch_images, self.data_digest])

    @property
    def samples(self) -> int:
        return sum(len(image) for group in self.groups.values() for image in group)

    def batches(self, group: str) -> list[list[list[int]]]:
        """The images of a group in batches, each the numbers of its samples."""
        images, size = self.groups[group], self.batch_images
        return [images[start : start + size] for start in range(0, len(images), size)]

    def methods(self) -> dict[str, list[int]]:
        """The numbers of the cases of each method, by its name."""
        found: dict[str, list[int]] = {}
        for number, planned in enumerate(self.cases[1:], 1):
            found.setdefault(planned.case.method, []).append(number)
        return found


class SearchScore(Record):
    """What one case answered to one sample, and its score. token_ids: of the unreduced model's answer where there are
    no reference answers."""

    case: Number
    sample: Number
    answer: str
    score: Share
    tokens: Tokens | None = None
    token_ids: list[int] = Field(default=[])


class SearchStep(FileRecord):
    """Some cases on one batch of a group. number: of the step. seconds: how long it took."""

    number: Number
    key: str
    group: str
    batch: Number
    cases: list[Number]
    scores: list[SearchScore]
    unreadable: list[UnreadableSample] = Field(default=[])
    failures: list[CaseFailure] = Field(default=[])
    seconds: Seconds

    @property
    def file_name(self) -> str:
        return f"{self.number:06d}.json"

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        failed = {failure.case for failure in self.failures}
        found = {(score.case, score.sample) for score in self.scores}
        if len(found) < len(self.scores):
            raise ValueError("a sample has two scores of one case")
        samples = {sample for _, sample in found}
        for case in self.cases:
            if case not in failed and {s for c, s in found if c == case} != samples:
                raise ValueError(f"scores of case {case} are missing")
        return self


class SearchDirectory(RecordDirectory):
    """A search in memory and on disk: `search.json`, and `search/STEP.json` for each step. `timing` is an ordinary run,
    of the budgets that were found."""

    def __init__(self, path: Path, plan: SearchPlan) -> None:
        super().__init__(path)
        self.plan = plan
        self.steps: list[SearchStep] = []

    @classmethod
    @contextmanager
    def create(cls, path: Path, plan: SearchPlan) -> Iterator[SearchDirectory]:
        """Start a search, locked until the context is left. Raises MMTokError where there is a run in the directory."""
        directory = cls(path, plan)
        with directory._started(SEARCH, plan):
            yield directory

    @property
    def _is_empty(self) -> bool:
        return not self.steps

    @classmethod
    @contextmanager
    def resume(cls, path: Path) -> Iterator[SearchDirectory]:
        """Lock the directory of a search and read it."""
        with locked(path) as lock:
            for folder in (path, path / SEARCH_STEPS):
                remove_temporary_files(folder)
            directory = cls.open(path)
            directory._lock = lock
            yield directory

    @classmethod
    def open(cls, path: Path) -> SearchDirectory:
        """Read a search. Raises MMTokError for a file that cannot be used."""
        directory = cls(path, read_search_plan(path))
        directory.steps = sorted(
            records_in(path / SEARCH_STEPS, SearchStep, directory._check), key=lambda step: step.number
        )
        if [step.number for step in directory.steps] != list(range(len(directory.steps))):
            raise MMTokError(
                f"a step is missing in {path / SEARCH_STEPS}",
                "delete the later steps and resume the run; they will be measured again",
            )
        unreduced: set[int] = set()
        for step in directory.steps:
            unreduced |= {score.sample for score in step.scores if score.case == 0}
            if not {score.sample for score in step.scores} <= unreduced:
                raise MMTokError(
                    f"{path / SEARCH_STEPS / step.file_name} cannot be used: scores of the unreduced model are missing",
                    "delete this step and the later ones and resume the run; they will be measured again",
                )
        return directory

    def add(self, step: SearchStep) -> None:
        """Save a step. Raises NotWrittenError where it cannot be written; it stays available in memory."""
        self.steps.append(step)
        self._write(f"{SEARCH_STEPS}/{step.file_name}", step)

    def _check(self, step: SearchStep) -> None:
        if step.key != self.plan.key:
            raise ValueError(f"it does not belong to the search of its {SEARCH}")
        if step.group not in self.plan.groups or step.batch >= len(self.plan.batches(step.group)):
            raise ValueError("there is no such batch")
        samples = {sample for image in self.plan.batches(step.group)[step.batch] for sample in image}
        if not {score.sample for score in step.scores} <= samples:
            raise ValueError("it has samples that are not of the batch")
        if not {score.case for score in step.scores} | set(step.cases) <= set(range(len(self.plan.cases))):
            raise ValueError("there is no such case")


def is_search(path: Path) -> bool:
    """Whether a directory is that of a search."""
    return os.path.isfile(path / SEARCH)  # noqa: PTH113 (which raises nothing for a name that cannot be)


def read_search_plan(path: Path) -> SearchPlan:
    """The plan of a search. Raises MMTokError for one that cannot be used."""
    content = read_file(path / SEARCH)
    return parsed(path / SEARCH, content, SearchPlan, "restore the file, or start a new run in another directory")


class Tried(OfCase):
    """A budget that was tried.

    kept: vision tokens kept, on average, of `total`; layer_average: per decoder layer. samples: how many it was tried
    on. retention: score / score of the unreduced model on these samples; without reference answers, the agreement with
    it. low, high: bounds, each of which holds with 97.5 % however many samples are added. verdict: "kept" if low
    reaches the target, "lost" if high is below it. samples_needed: about how many more a verdict takes, None if there
    is one, or none can be expected.
    """

    kept: float
    total: float
    layer_average: float
    samples: int
    retention: float | None
    low: float
    high: float | None
    verdict: Verdict
    samples_needed: int | None = None


class Decision(Record):
    """The answer for one method and one group of questions, None without groups.

    budget: the smallest that keeps the target with 95 % confidence; None if none was shown to. tried: from the largest
    to the smallest. failure: why the method cannot be run.
    """

    method: str
    group: str | None
    budget: str | None
    tried: list[Tried]
    failure: str | None = None

    @property
    def found(self) -> Tried | None:
        return next((one for one in self.tried if one.case.budget == self.budget), None) if self.budget else None

    @property
    def undecided(self) -> Tried | None:
        """The next smaller budget, if it may keep the target as well."""
        place = self.tried.index(self.found) + 1 if self.found else 0
        following = self.tried[place] if place < len(self.tried) else None
        return following if following and following.verdict == "open" else None


class Retention(Record):
    """What `mmtok compare --retain --json` prints.

    target: share of the unreduced model's score. measure: what is kept: the metric, or agreement. decisions: for each
    method, and each group. runs: answers of the model, one for each sample and case; grid_runs: what all budgets on as
    many samples would have taken. seconds: of the search. timing: times of the budgets found, beside the unreduced
    model. command: repeats the search.
    """

    schema_: Literal["mmtok.retain/1"] = Field(default="mmtok.retain/1", alias="schema")
    model: str
    rules: Rules
    environment: Environment
    data: str
    target: Share
    measure: str
    metric: MetricName | None
    baseline_score: float | None
    decisions: list[Decision]
    samples: int
    available: int
    seed: int
    runs: int
    grid_runs: int
    seconds: float
    interrupted: bool
    command: str
    timing: Comparison | None = None
    run_directory: str | None = None
    left_out: list[str] = Field(default=[])

    def budget_of(self, method: str) -> str | None:
        """The budget that keeps the target in every group: the largest of those found."""
        mine = [one for one in self.decisions if one.method == method]
        found = [one.found for one in mine]
        sure = [one for one in found if one]
        return max(sure, key=lambda one: one.kept).case.budget if len(sure) == len(mine) and sure else None

    def without_budget(self) -> list[str]:
        """The methods of which no budget was found that keeps the target in every group."""
        methods = dict.fromkeys(one.method for one in self.decisions)
        return [method for method in methods if self.budget_of(method) is None]

    def limiting(self, method: str) -> Sequence[str]:
        """The groups that need the budget of the method, where there are several."""
        budget = self.budget_of(method)
        groups = [one.group for one in self.decisions if one.method == method and one.group and one.budget == budget]
        return groups if budget else []
