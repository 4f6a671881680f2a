"""Evaluations by lmms-eval: its results, with the cost records beside them, from folders of its `--output_path`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mmtok_cli.errors import MMTokError
from mmtok_cli.results.costs import SUFFIX, CostHeader, SampleCost, read_costs
from mmtok_cli.results.run_directory import read_file, validation_message
from mmtok_cli.results.schema import CaseId, Environment, Record
from mmtok_cli.rules import NATIVE, Rules
from mmtok_cli.stages import STAGES

RESULTS = "_results.json"
DEPTHS = ("*", "*/*")  # of files below an output path: lmms-eval makes a folder for each model
HINT = "restore the file, or evaluate again with lmms-eval's --output_path"


class Configuration(BaseModel):
    """What lmms-eval writes of a run. model_args: a text, or a mapping where it was called from Python."""

    model: str
    model_args: Any = ""


class ResultsFile(BaseModel):
    """The part of lmms-eval's results that is read. results: of each task by "metric,filter", beside other entries."""

    results: dict[str, dict[str, Any]]
    config: Configuration
    date: str = ""
    higher_is_better: dict[str, dict[str, bool | None]] = {}
    samples: dict[str, dict[str, int | None]] = Field({}, alias="n-samples")


class TaskScore(Record):
    """One metric of one task.

    filter: of lmms-eval, by which answers are read. samples: None where it is not known. retention: value / that of
    the unreduced model on as many samples; None where there is none, and for metrics of which less is better.
    """

    task: str
    metric: str
    filter: str
    value: float
    samples: int | None = None
    higher_is_better: bool = True
    retention: float | None = None


class MeanCost(Record):
    """What a sample of one task, or of all, cost: means. seconds: by stage, and `ttft` and `total`. short: how many
    samples do not meet the budget."""

    samples: int
    short: int = 0
    kept: float
    total: float
    seconds: dict[str, float]
    kv_cache: float


class Evaluation(Record):
    """One run of lmms-eval.

    path: of its results. label: the case, or the name and the arguments of another model than ours. model, case, rules,
    environment and costs are None without cost records. costs: by task. retention: mean over the tasks of that of
    their first metric.
    """

    path: str
    date: str
    label: str
    model: str | None = None
    case: CaseId | None = None
    rules: Rules | None = None
    environment: Environment | None = None
    scores: list[TaskScore]
    cost: MeanCost | None = None
    costs: dict[str, MeanCost] = Field(default={})
    retention: float | None = None

    @property
    def is_baseline(self) -> bool:
        return self.case is not None and self.case.is_baseline

    @property
    def pixels(self) -> str:
        """The resolution of images."""
        return (self.environment and self.environment.pixels) or NATIVE


class Evaluations(Record):
    """What `mmtok report --json` prints of runs of lmms-eval. remarks: lines about what is missing or not shown."""

    schema_: Literal["mmtok.evaluations/1"] = Field(default="mmtok.evaluations/1", alias="schema")
    evaluations: list[Evaluation]
    remarks: list[str] = Field(default=[])


def holds_evaluations(path: Path) -> bool:
    """Whether a folder has results or cost records of lmms-eval."""
    if not os.path.isdir(path):  # noqa: PTH112 (which raises nothing for a name that cannot be)
        return False
    return any(True for suffix in (RESULTS, SUFFIX) for _ in _files(path, suffix))


def read_evaluations(paths: Sequence[Path]) -> Evaluations:
    """The evaluations in folders: those of the same case and tasks once, as they were run last.

    Raises MMTokError for a folder without results, and for a file that cannot be read.
    """
    found: list[Evaluation] = []
    for path in paths:
        files = list(_files(path, RESULTS))
        if not files:
            raise MMTokError(
                f"{path} has no results of lmms-eval (…{RESULTS})",
                "evaluate with --output_path, or name another folder",
            )
        costs = [read_costs(file) for file in _files(path, SUFFIX)]
        found += [_evaluation(file, costs) for file in files]
    newest: dict[Any, Evaluation] = {}
    for one in sorted(found, key=lambda one: one.date):
        tasks = tuple(sorted({score.task for score in one.scores}))
        newest[one.label, one.case and one.case.model_dump_json(), one.model, one.pixels, one.rules, tasks] = one
    kept = _distinct(sorted(newest.values(), key=lambda one: (not one.is_baseline, one.date)))
    remarks = []
    if len(kept) < len(found):
        remarks.append(f"evaluations of the same case and tasks: the last is shown, {len(found) - len(kept)} older not")
    if without := [one.label for one in kept if one.cost is None]:
        remarks.append(f"without cost records: {', '.join(without)}")
    remarks += [
        f"{one.label}: {one.cost.short} of {one.cost.samples} samples do not meet the budget"
        for one in kept
        if one.cost and one.cost.short
    ]
    done = [_with_retention(one, kept) for one in kept]
    lacking = [one.label for one in done if not one.is_baseline and all(s.retention is None for s in one.scores)]
    if lacking:
        remarks.append(
            f"no retention for {', '.join(lacking)}: it needs an evaluation with method=full of the same model, tasks "
            "and number of samples"
        )
    return Evaluations(evaluations=done, remarks=remarks)


def _distinct(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations, with labels that say what differs where several have the same."""
    found = []
    for one in evaluations:
        same = [_settings(other) for other in evaluations if other.label == one.label]
        mine = _settings(one)
        differing = [name for name, value in mine.items() if any(other.get(name) != value for other in same)]
        said = ", ".join(f"{name} {mine[name]}" for name in differing)
        found.append(one.model_copy(update={"label": f"{one.label} ({said})"}) if said else one)
    return found


def _settings(one: Evaluation) -> dict[str, Any]:
    """What may differ between evaluations of one method at one budget, by name."""
    if one.case is None or one.rules is None:
        return {}
    draft = {} if one.case.draft is None else {"draft": one.case.draft, "draft tokens": one.case.draft_tokens}
    scale = {} if one.case.image_scale is None else {"image scale": one.case.image_scale}
    rules = {"track": one.rules.track, "positions": one.rules.positions, "budgets mean": one.rules.budget_means}
    return {"model": one.model, "pixels": one.pixels, **one.case.parameters, **draft, **scale, **rules}


def _files(path: Path, suffix: str) -> Iterator[Path]:
    return (file for depth in DEPTHS for file in sorted(path.glob(f"{depth}{suffix}")))


def _evaluation(path: Path, costs: Sequence[tuple[CostHeader, list[SampleCost]]]) -> Evaluation:
    """The evaluation of a file of results, with the cost records that were written during it."""
    read = _results(path)
    scores = [
        TaskScore(
            task=task,
            metric=metric,
            filter=by,
            value=float(value),
            samples=read.samples.get(task, {}).get("effective"),
            higher_is_better=read.higher_is_better.get(task, {}).get(metric) is not False,
        )
        for task, entries in read.results.items()
        for name, value in entries.items()
        for metric, comma, by in [name.partition(",")]
        if comma and "_stderr" not in metric and _is_number(value)
    ]
    arguments = read.config.model_args
    mine = _written_during(read.date, arguments, costs)
    if not mine:
        label = read.config.model + (f" ({arguments})" if arguments else "")
        return Evaluation(path=str(path), date=read.date, label=label, scores=scores)
    header = mine[0][0]
    samples = [cost for _, part in mine for cost in part]
    return Evaluation(
        path=str(path),
        date=read.date,
        label=str(header.case),
        model=header.model,
        case=header.case.model_copy(update={"batch_size": 1}),
        rules=header.rules,
        environment=header.environment,
        scores=scores,
        cost=_mean(samples),
        costs={
            task: mean
            for task in dict.fromkeys(cost.task for cost in samples)
            if (mean := _mean([cost for cost in samples if cost.task == task]))
        },
    )


def _results(path: Path) -> ResultsFile:
    try:
        return ResultsFile.model_validate(json.loads(read_file(path)))
    except (ValidationError, ValueError) as error:
        raise MMTokError(f"{path} cannot be read: {validation_message(error)}", HINT) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _written_during(
    date: str, arguments: Any, costs: Sequence[tuple[CostHeader, list[SampleCost]]]
) -> list[tuple[CostHeader, list[SampleCost]]]:
    """The cost records of a run: for each process, the first that was started with its arguments after the run."""
    found: dict[int, tuple[CostHeader, list[SampleCost]]] = {}
    for header, records in sorted(costs, key=lambda each: each[0].started):
        if header.model_args == arguments and header.started >= date:
            found.setdefault(header.process, (header, records))
    count = found[min(found)][0].processes if found else 0
    return [found[process] for process in sorted(found) if process < count]


def _mean(costs: Sequence[SampleCost]) -> MeanCost | None:
    if not costs:
        return None
    stages = [*STAGES, "ttft", "total"]
    return MeanCost(
        samples=len(costs),
        short=sum(cost.tokens.short for cost in costs),
        kept=fmean(cost.tokens.kept for cost in costs),
        total=fmean(cost.tokens.total for cost in costs),
        seconds={stage: fmean(cost.seconds.get(stage, 0.0) for cost in costs) for stage in stages},
        kv_cache=fmean(cost.kv_cache for cost in costs),
    )


def _with_retention(one: Evaluation, others: Sequence[Evaluation]) -> Evaluation:
    """The evaluation relative to the unreduced model's, if that is among the others."""
    if one.case is None or one.is_baseline:
        return one
    base = {
        (score.task, score.metric, score.filter): score
        for other in others
        if other.is_baseline and (other.model, other.pixels) == (one.model, one.pixels)
        for score in other.scores
    }
    scores = [
        score.model_copy(update={"retention": _retention(score, base.get((score.task, score.metric, score.filter)))})
        for score in one.scores
    ]
    first = {score.task: score.retention for score in reversed(scores)}
    known = [retention for retention in first.values() if retention is not None]
    mean = fmean(known) if known and len(known) == len(first) else None
    return one.model_copy(update={"scores": scores, "retention": mean})


def _retention(score: TaskScore, base: TaskScore | None) -> float | None:
    if base is None or base.samples != score.samples or not base.value or not score.higher_is_better:
        return None
    return score.value / base.value
