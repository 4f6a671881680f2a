"""Making the plan of a comparison, estimating its time, and checking whether an earlier plan can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmtok_cli.cases import Case
from mmtok_cli.data.datasets import Dataset, open_dataset
from mmtok_cli.data.names import parse_name
from mmtok_cli.data.samples import Sample, batches
from mmtok_cli.errors import MMTokError
from mmtok_cli.option_values import column_names
from mmtok_cli.profiles import known_profiles
from mmtok_cli.results.records import CaseFailure, Plan, digest_of_samples, planned_case
from mmtok_cli.results.schedule import rotation
from mmtok_cli.results.schema import CaseId, Environment, OfCase, Record
from mmtok_cli.rules import NATIVE
from mmtok_cli.settings import CompareSettings

SHOWN_ROUNDS = 5
DEFAULT_ROUNDS = 30  # unless more are asked for: more would hardly narrow the intervals


class EstimatedCase(OfCase):
    """A case, in how many rounds it runs, and the seconds of one run; None where it failed. failure: why, in a line."""

    rounds: int
    seconds: float | None
    failure: str | None = None


class Estimate(Record):
    """What `mmtok compare --dry-run --json` prints: the plan, and how long it will take, warm-up and quality included.

    order: the first rounds, each the places of its cases in the order in which they run.
    """

    schema_: Literal["mmtok.estimate/2"] = Field(default="mmtok.estimate/2", alias="schema")
    model: str
    environment: Environment
    cases: list[EstimatedCase]
    samples: int
    seed: int
    rounds: int
    runs: int
    warmup: int
    min_time: float | None
    order: list[list[int]]
    seconds: float
    quality_seconds: float = 0.0
    new_tokens: int | None = None
    prompt_tokens: int | None = None


def dataset_of(settings: CompareSettings) -> Dataset:
    """The samples of --data. Raises MMTokError for data that cannot be read."""
    return open_dataset(
        settings.data,
        image_root=settings.image_root,
        limit=settings.sample_limit,
        question=settings.question,
        columns=column_names(settings.columns),
        find_metric=settings.metric is None,
        sampling=settings.sampling,
    )


def require_whole_batches(samples: int, sizes: Sequence[int]) -> None:
    """Raises MMTokError for a batch size that is larger than the number of samples."""
    for size in sizes:
        if size > samples:
            raise MMTokError(
                f"batch size {size} is larger than the number of samples ({samples})",
                "raise --limit, or lower --batch-size",
            )


def timed_samples(
    samples: Sequence[Sample], sizes: Sequence[int], rounds: int | None, prepare: Callable[[Sample], Sample]
) -> tuple[list[Sample], list[str]]:
    """The first samples that can be timed, as many as the rounds take, and why others before them cannot.

    prepare: the sample as it is timed, padded for example; raises MMTokError for one that the model cannot read. Images
    are looked at and let go. Raises MMTokError where there are too few samples for one batch of each size.
    """
    found: list[Sample] = []
    problems: list[tuple[int, MMTokError]] = []
    for number, sample in enumerate(samples, 1):
        if len(found) == (rounds or DEFAULT_ROUNDS) * max(sizes):
            break
        try:
            found.append(prepare(sample))
        except MMTokError as error:
            problems.append((number, error))
    if len(found) < max(sizes):
        first = problems[0][1]
        raise MMTokError(
            f"only {len(found)} of {len(samples)} samples can be used: {first.message}",
            first.hint if len(problems) == len(samples) else "check the images and questions of the data",
        )
    return found, [f"sample {number} is left out: {problem.message}" for number, problem in problems]


def require_conversations(
    samples: Sequence[Sample], settings: CompareSettings, check: Callable[[Sample], None]
) -> None:
    """Raises MMTokError where no sample is a conversation that can be held. check: raises it for one that cannot."""
    first: MMTokError | None = None
    for sample in samples:
        if sample.later:
            try:
                check(sample)
            except MMTokError as error:
                first = first or error
            else:
                return
    raise first or MMTokError(
        f"--turns needs several questions per image, and {settings.data} has one",
        "use --data demo:conversations"
        if settings.data == "demo"
        else 'write them as "questions": [...], "answers": [...], one list for each image',
    )


def in_batches(samples: Sequence[Sample], sizes: Sequence[int]) -> dict[int, list[list[Sample]]]:
    """The samples in whole batches, by their size."""
    return {size: list(batches(samples[: len(samples) - len(samples) % size], size)) for size in sizes}


def with_absolute_paths(settings: CompareSettings) -> CompareSettings:
    """The same settings in words that do not depend on the working directory: of the model, the data and the images."""
    model, root = settings.model, settings.image_root
    # Unlike those of pathlib, these functions leave the name of an unknown user, and one that is too long, as it is.
    directory = os.path.expanduser(model)  # noqa: PTH111
    if model not in known_profiles() and os.path.isdir(directory):  # noqa: PTH112
        model = _absolute(directory)
    return settings.model_copy(
        update={
            "model": model,
            "data": absolute_data(settings.data),
            "image_root": None if root is None else Path(_absolute(str(root))),
            "kept": tuple(Path(_absolute(str(file))) for file in settings.kept),
            "include_path": None if settings.include_path is None else Path(_absolute(str(settings.include_path))),
        }
    )


def absolute_data(text: str) -> str:
    """The name of a dataset with absolute paths. Raises MMTokError where `parse_name` does."""
    name = parse_name(text)
    return str(replace(name, names=tuple(map(_absolute, name.names)))) if name.paths else text


def _absolute(text: str) -> str:
    """A path with its directory resolved. Its own name stays, since its suffix tells the format, if it is a link."""
    path = Path(text)
    try:
        return str(path.parent.resolve() / path.name)
    except (RuntimeError, ValueError):  # a circle of links, or a null character: nothing can have this name
        return text


def make_plan(
    settings: CompareSettings, cases: Sequence[Case], dataset: Dataset, environment: Environment, timed: int
) -> Plan:
    """Everything that a run will do. timed: how many of the samples the rounds cycle through."""
    fixed = with_absolute_paths(settings)
    turns = rotation([case.batch_size for case in cases], timed, settings.rounds, settings.seed, DEFAULT_ROUNDS)
    data_digest = digest_of_samples(dataset.samples)
    common = {
        "rules": {k: v for k, v in asdict(settings.rules).items() if k != "budget_per" or v != "image"},
        "data": data_digest,
        **fixed.model_dump(include={"model", "max_new_tokens", "runs", "seed", "rounds", "layers", "device_map"}),
        **fixed.model_dump(include={"new_tokens", "prompt_tokens"}, exclude_none=True),
        **(fixed.model_dump(include={"turns", "encode_again"}) if fixed.turns else {}),
    }
    return Plan(
        model=settings.model,
        options=fixed,
        rules=settings.rules,
        cases=[planned_case(case.id, environment, common) for case in cases],
        environment=environment,
        data=dataset.name,
        data_digest=data_digest,
        samples=len(dataset.samples),
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        rounds=turns.rounds,
        every_round=turns.every_round,
        runs=settings.runs,
        warmup=settings.warmup,
        min_time=settings.min_time,
        order=turns.first(turns.rounds),
        timed=timed,
        quality=settings.measures_quality,
        metric=dataset.metric,
        questions=sum(len(sample.turns) for sample in dataset.samples) if settings.turns else 0,
        left_out=dataset.notes(),
    )


def require_same(then: Plan, now: Plan) -> None:
    """Raises MMTokError that says what differs if a run cannot be resumed here, or with these samples."""
    require_same_environment(then.environment, now.environment)
    for before, after in zip(then.cases, now.cases, strict=False):
        differences = _differences(_resolved(before.case) | vars(then.rules), _resolved(after.case) | vars(now.rules))
        if differences:
            raise MMTokError(f"{before} has changed: {'; '.join(differences)}", "start a new run without --resume")
    if _measured(then) != _measured(now):
        raise MMTokError(f"the samples of {then.data} have changed", "start a new run without --resume")


def require_same_environment(then: Environment, now: Environment) -> None:
    """Raises MMTokError that says what differs."""
    differences = _differences(_where(then), _where(now))
    if differences:
        raise MMTokError(
            f"the run was started in another environment: {'; '.join(differences)}",
            "restore that environment, or start a new run without --resume; results would not be comparable",
        )


def _measured(plan: Plan) -> tuple[object, ...]:
    """What is measured, on which samples and in which order."""
    return [case.key for case in plan.cases], plan.samples, plan.timed, plan.metric, plan.order


def estimate(plan: Plan, runs: Sequence[float | CaseFailure], evaluated: Sequence[float | CaseFailure]) -> Estimate:
    """How long a plan takes, given the seconds of one run of each case, or why it failed.

    evaluated: the same at the lengths of prompts and answers that are evaluated.
    """
    seconds, answering = ([None if isinstance(one, CaseFailure) else one for one in each] for each in (runs, evaluated))
    turns = plan.rotation()
    measured = sum(one * turns.turns_of(i) * plan.runs for i, one in enumerate(seconds) if one is not None)
    before = sum(one * (1 + plan.warmup) for one in seconds if one is not None)  # FLOPs are counted in a run as well
    if plan.options.find_batch:  # batches of 1 and 2, or more of them on a GPU
        before += sum(3 * one / case.case.batch_size for one, case in zip(seconds, plan.cases, strict=True) if one)
    after = _quality_seconds(plan, answering)
    return Estimate(
        model=plan.model,
        environment=plan.environment,
        cases=[
            EstimatedCase(
                case=planned.case,
                rounds=turns.turns_of(i),
                seconds=seconds[i],
                failure=f"{one.reason}: {one.message}" if isinstance(one := runs[i], CaseFailure) else None,
            )
            for i, planned in enumerate(plan.cases)
        ],
        samples=plan.samples,
        seed=plan.seed,
        rounds=plan.rounds,
        runs=plan.runs,
        warmup=plan.warmup,
        min_time=plan.min_time,
        new_tokens=plan.options.new_tokens,
        prompt_tokens=plan.options.prompt_tokens,
        order=plan.order[:SHOWN_ROUNDS],
        seconds=before + max(measured, plan.min_time or 0.0) + after,
        quality_seconds=after,
    )


def _quality_seconds(plan: Plan, seconds: Sequence[float | None]) -> float:
    """Every sample is read back to each case and then answered, which is two runs. A turn of a conversation is one."""
    if not plan.quality:
        return 0.0
    talking = plan.questions * sum(seconds[case] or 0.0 for case, _ in plan.conversation_cases)
    size = max(planned.case.batch_size for planned in plan.cases)
    batches = -(-plan.samples // size)
    return talking + sum(
        2 * batches * one
        for planned, one in zip(plan.cases, seconds, strict=True)
        if one is not None and planned.case.batch_size == size and not planned.case.again
    )


def _where(environment: Environment) -> dict[str, Any]:
    where = environment.model_dump(exclude={"command"})
    return {**where, "pixels": where["pixels"] or NATIVE}  # older runs do not say it


def _resolved(case: CaseId) -> dict[str, Any]:
    return {**case.model_dump(exclude={"parameters"}), **case.parameters}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*then, *now])
    return [
        f"{key.replace('_', ' ')} {then.get(key)} then, {now.get(key)} now"
        for key in keys
        if then.get(key) != now.get(key)
    ]
