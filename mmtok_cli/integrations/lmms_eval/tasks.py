"""Tasks of lmms-eval as a dataset of `mmtok compare`: their prompts, lengths of answers and scores."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.samples import ClosedImages, Sample
from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.integrations.lmms_eval.requests import Generation, Place, document_of, generation_of, sample_of
from mmtok_cli.results.records import PredictionBatch, TaskScores
from mmtok_cli.video import Visual

MODEL = "mmtok"  # for which tasks may have prompts of their own
SEED = 1234  # of few-shot examples, as lmms-eval's command line has it
PROBED = 8  # documents on which a task is tried
REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'  # left out of answers, as by its command line
CLOSE = 1e-6

Metrics = dict[tuple[str, str], Any]  # what a task makes of one answer, by metric and filter


@dataclass(frozen=True, eq=False)
class Task:
    """A task of lmms-eval that asks for texts.

    source: lmms-eval's object. name: as lmms-eval calls it.
    """

    name: str
    source: Any

    @property
    def documents(self) -> Mapping[str, Any]:
        """By task and split, as lmms-eval gives them to a model."""
        return {self.name: self.source.dataset, self.source.config.task: self.source.dataset}

    def requests(self, limit: int) -> list[Any]:
        """The requests about the first documents."""
        if self.source.get_config("num_fewshot") is None:
            self.source.set_config(key="num_fewshot", value=0)
        self.source.set_fewshot_seed(seed=SEED)
        self.source.build_all_requests(limit=limit, rank=0, world_size=1)
        return list(self.source.instances)

    def metrics_of(self, request: Any, answer: str) -> Metrics:
        """What the task makes of an answer, which may be anything that its aggregation understands."""
        from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags

        answered = copy(request)
        answered.resps, answered.filtered_resps = [generation_of(request).cut(answer).strip()], {}
        tags = parse_reasoning_tags_config(REASONING, getattr(self.source.config, "reasoning_tags", None))
        found: Metrics = {}
        for ensemble in self.source._filters:
            ensemble.apply([answered], self.source.task_docs)
            text = answered.filtered_resps[ensemble.name]
            if tags and isinstance(text, str):
                text = strip_reasoning_tags(text, tags)
            values = self.source.process_results(self._document(request), [text])
            found |= {(metric, ensemble.name): value for metric, value in values.items()}
        return found

    def aggregated(self, metric: tuple[str, str], values: Sequence[Any]) -> float | None:
        """A metric of all answers together; None for one that is not a number, or is not computed but written."""
        aggregate = self.source.aggregation().get(metric[0])
        if aggregate is None or "args" in inspect.signature(aggregate).parameters:
            return None
        value = aggregate(list(values))
        is_number = isinstance(value, (int, float)) or hasattr(value, "__float__")
        return float(value) if is_number and math.isfinite(float(value)) else None

    @cached_property
    def paired(self) -> tuple[str, str] | None:
        """The first metric that is the mean of one number from 0 to 1 for each answer, as some answers show.

        None where there is none. Raises MMTokError for a task that cannot score answers here.
        """
        tried = [
            self.metrics_of(request, answer)
            for request in self.source.instances[:PROBED]
            for answer in (self._right_answer(request), "")
        ]
        for metric in tried[0]:
            values = [each[metric] for each in tried if metric in each]
            single = [self.aggregated(metric, [value]) for value in values]
            numbers = [number for number in single if number is not None and 0 <= number <= 1]
            whole = self.aggregated(metric, values)
            if len(numbers) < len(tried) or whole is None or abs(whole - fmean(numbers)) >= CLOSE:
                continue
            if min(numbers) < max(numbers) or self._is_usual_mean(metric[0]):  # equal numbers show nothing
                return metric
        return None

    def _is_usual_mean(self, metric: str) -> bool:
        from lmms_eval.api.registry import get_aggregation

        return self.source.aggregation()[metric] is get_aggregation("mean")

    def _right_answer(self, request: Any) -> str:
        document = self._document(request)
        target = self.source.doc_to_target(document)
        if isinstance(target, int) and self.source.config.doc_to_choice is not None:
            target = self.source.doc_to_choice(document)[target]
        return str(target[0] if isinstance(target, list) and target else target)

    def _document(self, request: Any) -> Any:
        return document_of(Place.of(request), self.documents)


@dataclass(frozen=True, eq=False)
class TaskJudge:
    """How a task judges answers to one of its requests."""

    task: Task
    request: Any

    def __call__(self, answer: str) -> float:
        """The score of an answer by the task's paired metric. Raises MMTokError where the task fails on it."""
        metric = self.task.paired
        assert metric is not None, "only samples of tasks with such a metric have references"
        with errors_of(Place.of(self.request)), redirect_stdout(sys.stderr):
            value = self.task.aggregated(metric, [self.task.metrics_of(self.request, answer)[metric]])
        return math.nan if value is None else value


def open_tasks(names: Sequence[str], limit: int, include_path: Path | None = None) -> Dataset:
    """The first `limit` samples of each task or group of tasks.

    include_path: a folder with further tasks. Every sample has the name of its task as its kind. Raises MMTokError
    where lmms-eval is not installed, for unknown tasks, and for those that cannot be loaded or asked here.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    with redirect_stdout(sys.stderr):  # tasks print
        for task in _load(names, include_path):
            kind = task.source.OUTPUT_TYPE
            if kind != "generate_until":
                raise MMTokError(
                    f"the task {task.name} asks for {kind}, and compare evaluates tasks that ask for a text once",
                    f"evaluate it with: python -m lmms_eval --model mmtok --force_simple --tasks {task.name}",
                )
            with errors_of(task.name):
                requests = task.requests(limit)
                paired = task.paired
            for request in requests:
                try:
                    samples.append(_sample(task, request, judged=paired is not None))
                except MMTokError as error:
                    problems.append(error.message)
    if not samples:
        raise MMTokError(
            problems[0] if problems else f"{', '.join(names)}: there are no documents", "choose other tasks"
        )
    metric: MetricName | None = "task" if any(sample.references for sample in samples) else None
    return Dataset(",".join(names), samples, metric, problems=tuple(problems))


def score_tasks(samples: Sequence[Sample], batches: Sequence[PredictionBatch], key: str) -> TaskScores:
    """The scores of each case by each task, as lmms-eval computes them of all answers together.

    batches: the predictions of all cases. key: see TaskScores.
    """
    found: dict[tuple[int, Task], dict[tuple[str, str], list[Any]]] = {}
    remarks: dict[str, None] = {}
    with redirect_stdout(sys.stderr):
        for prediction in (each for batch in batches for each in batch.predictions):
            judge = samples[prediction.sample].judge
            assert isinstance(judge, TaskJudge)
            collected = found.setdefault((prediction.case, judge.task), defaultdict(list))
            with errors_of(Place.of(judge.request)):
                for metric, value in judge.task.metrics_of(judge.request, prediction.answer).items():
                    collected[metric].append(value)
        scores: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
        for (case, task), by_metric in found.items():
            scores[case][task.name] = {}
            for metric, values in by_metric.items():
                with errors_of(task.name):
                    score = task.aggregated(metric, values)
                if score is None:
                    remarks[f"{task.name}: {metric[0]} is not a number that is computed here, and is not shown"] = None
                else:
                    scores[case][task.name][_title(metric)] = score
    tasks = {task.name: task for _, task in found}
    paired = {name: _title(task.paired) if task.paired else None for name, task in tasks.items()}
    return TaskScores(key=key, paired=paired, scores=dict(scores), remarks=list(remarks))


def _title(metric: tuple[str, str]) -> str:
    """A metric, with its filter if that is not the usual one."""
    return metric[0] if metric[1] == "none" else f"{metric[0]} ({metric[1]})"


def _load(names: Sequence[str], include_path: Path | None) -> Iterator[Task]:
    """The tasks of the names, those of groups included."""
    try:
        from lmms_eval.evaluator_utils import get_task_list
        from lmms_eval.tasks import TaskManager, get_task_dict
        from lmms_eval.utils import eval_logger
    except ImportError as error:
        raise MMTokError(f"--tasks needs lmms-eval ({first_line(error)})", "pip install 'mmtok[lmms]'") from error
    if include_path is not None and not include_path.is_dir():
        raise MMTokError(f"--include-path {include_path} is not a folder", "name the folder of the tasks' YAML files")
    eval_logger.remove()  # it writes to standard output
    eval_logger.add(sys.stderr, level="ERROR", format="{message}")
    with errors_of("the tasks of lmms-eval"):
        manager = TaskManager(
            "ERROR", include_path=None if include_path is None else str(include_path), model_name=MODEL
        )
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise MMTokError(f"lmms-eval has no task {name!r}", f"{meant}`lmms-eval tasks list` lists them all")
    with errors_of(f"{', '.join(names)} cannot be loaded"):
        loaded = get_task_list(get_task_dict(manager.match_tasks(list(names)), manager, "chat"))
    yield from (Task(each.task_name, each.task) for each in loaded if each.task is not None)


def _sample(task: Task, request: Any, *, judged: bool) -> Sample:
    """The sample of a request, whose images are made again each time they are used."""
    generation: Generation = generation_of(request)
    sample = sample_of(request, task.documents)
    readers = tuple(partial(_image, request, task, number) for number in range(len(sample.images)))
    target = task.source.doc_to_target(document_of(Place.of(request), task.documents))
    return replace(
        sample,
        images=ClosedImages(readers),
        kind=task.name,
        answer=str(target) if judged else None,
        judge=TaskJudge(task, request),
        max_new_tokens=generation.max_new_tokens,
    )


def _image(request: Any, task: Task, number: int) -> Visual:
    return sample_of(request, task.documents).images[number]


@contextmanager
def errors_of(what: object) -> Iterator[None]:
    """Errors of lmms-eval and its tasks as one clear line that begins with `what`."""
    try:
        yield
    except MMTokError:
        raise
    except Exception as error:  # tasks are anyone's code
        attempt = getattr(error, "last_attempt", None)  # of what lmms-eval tried several times
        cause = attempt.exception() if attempt else error
        raise MMTokError(
            f"{what}: {type(cause).__name__}: {first_line(cause)}", "the network, a key or a package may be missing"
        ) from error
