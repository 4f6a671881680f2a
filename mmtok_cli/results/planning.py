"""Making a plan of what was asked, and seeing whether a plan made earlier can be gone on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field

from mmtok_cli.cases import Case
from mmtok_cli.data.datasets import Metric
from mmtok_cli.data.samples import Sample, batches
from mmtok_cli.errors import MMTokError
from mmtok_cli.results.records import Plan, digest_of_samples, planned_case
from mmtok_cli.results.schedule import rotation
from mmtok_cli.results.schema import CaseId, Environment, OfCase, Record
from mmtok_cli.rules import Rules

SHOWN_ROUNDS = 5
MOST_ROUNDS = 30  # unless more are asked for: by then intervals are as narrow as the machine's own unrest allows


class EstimatedCase(OfCase):
    """A case, in how many rounds it runs, and the seconds of one run; None where it ran out of memory."""

    rounds: int
    seconds: float | None


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


def at_batch_sizes(cases: Sequence[Case], sizes: Sequence[int]) -> list[Case]:
    """Every case at every batch size; those of one size together, the baseline first."""
    return [replace(case, batch_size=size) for size in sizes for case in cases]


def require_whole_batches(samples: int, sizes: Sequence[int]) -> None:
    """Refuse sizes of which so many samples do not fill one batch. Raises MMTokError."""
    for size in sizes:
        if size > samples:
            count = "1 sample is" if samples == 1 else f"{samples} samples are"
            raise MMTokError(f"{count} less than one batch of {size}", "raise --limit, or lower --batch-size")


def timed_samples(samples: Sequence[Sample], sizes: Sequence[int], rounds: int | None) -> list[Sample]:
    """The first samples whose images can be read, as many as the rounds take.

    Images are looked at and let go. Raises MMTokError where too few can be read for one batch of each size.
    """
    found: list[Sample] = []
    problem = ""
    for sample in samples:
        if len(found) == (rounds or MOST_ROUNDS) * max(sizes):
            break
        try:
            sample.open()
        except MMTokError as error:
            problem = problem or error.message
        else:
            found.append(sample)
    if len(found) < max(sizes):
        raise MMTokError(f"only {len(found)} of {len(samples)} samples can be read: {problem}", "check the image files")
    return found


def in_batches(samples: Sequence[Sample], sizes: Sequence[int]) -> dict[int, list[list[Sample]]]:
    """The samples in whole batches, by their size."""
    return {size: list(batches(samples[: len(samples) - len(samples) % size], size)) for size in sizes}


def make_plan(
    cases: Sequence[Case],
    samples: Sequence[Sample],
    environment: Environment,
    *,
    model: str,
    rules: Rules,
    options: Mapping[str, Any],
    data: str,
    seed: int,
    max_new_tokens: int,
    rounds: int | None,
    runs: int,
    warmup: int,
    min_time: float | None,
    timed: int | None = None,
    quality: bool = True,
    metric: Metric | None = None,
    left_out: Sequence[str] = (),
) -> Plan:
    """Resolve what was asked. rounds: None for as many as it takes to time every sample, or MOST_ROUNDS."""
    turns = rotation([case.batch_size for case in cases], timed or len(samples), rounds, seed, MOST_ROUNDS)
    common = {
        "model": model,
        "rules": asdict(rules),
        "data": digest_of_samples(samples),
        "max_new_tokens": max_new_tokens,
        "runs": runs,
        "seed": seed,
        "rounds": rounds,
        "layers": options.get("layers"),
        "device_map": options.get("device_map"),
    }
    return Plan(
        model=model,
        options=dict(options),
        rules=rules,
        cases=[planned_case(case.id, environment, common) for case in cases],
        environment=environment,
        data=data,
        data_digest=common["data"],
        samples=len(samples),
        seed=seed,
        max_new_tokens=max_new_tokens,
        rounds=turns.rounds,
        every_round=turns.every_round,
        runs=runs,
        warmup=warmup,
        min_time=min_time,
        order=turns.first(turns.rounds),
        timed=timed,
        quality=quality,
        metric=metric,
        left_out=list(left_out),
    )


def require_same(then: Plan, now: Plan) -> None:
    """Refuse to go on with a plan elsewhere than where it was begun. Raises MMTokError that says what differs."""
    differences = _differences(_where(then.environment), _where(now.environment))
    if differences:
        raise MMTokError(
            f"the run was begun in another environment: {'; '.join(differences)}",
            "restore that and resume, or begin a new run without --resume; figures of the two do not belong together",
        )
    for before, after in zip(then.cases, now.cases, strict=False):
        differences = _differences(_resolved(before.case) | vars(then.rules), _resolved(after.case) | vars(now.rules))
        if differences:
            raise MMTokError(f"{before} has changed: {'; '.join(differences)}", "begin a new run without --resume")
    if [case.key for case in then.cases] != [case.key for case in now.cases]:
        raise MMTokError(f"the samples of {then.data} have changed", "begin a new run without --resume")


def estimate(plan: Plan, seconds: Sequence[float | None]) -> Estimate:
    """How long a plan takes, given the seconds of one run of each case."""
    turns = plan.rotation()
    measured = sum(one * turns.turns_of(i) * plan.runs for i, one in enumerate(seconds) if one is not None)
    before = sum(one * (1 + plan.warmup) for one in seconds if one is not None)  # FLOPs are counted in a run as well
    after = _quality_seconds(plan, seconds)
    return Estimate(
        model=plan.model,
        environment=plan.environment,
        cases=[
            EstimatedCase(
                case=planned.case,
                rounds=turns.turns_of(i),
                seconds=seconds[i],
            )
            for i, planned in enumerate(plan.cases)
        ],
        samples=plan.samples,
        seed=plan.seed,
        rounds=plan.rounds,
        runs=plan.runs,
        warmup=plan.warmup,
        min_time=plan.min_time,
        order=plan.order[:SHOWN_ROUNDS],
        seconds=before + max(measured, plan.min_time or 0.0) + after,
        quality_seconds=after,
    )


def _quality_seconds(plan: Plan, seconds: Sequence[float | None]) -> float:
    """Every sample is read back to each case and then answered, which is two runs."""
    if not plan.quality:
        return 0.0
    size = max(planned.case.batch_size for planned in plan.cases)
    batches = -(-plan.samples // size)
    return sum(
        2 * batches * one
        for planned, one in zip(plan.cases, seconds, strict=True)
        if one is not None and planned.case.batch_size == size and not planned.case.again
    )


def _where(environment: Environment) -> dict[str, Any]:
    return environment.model_dump(exclude={"command"})


def _resolved(case: CaseId) -> dict[str, Any]:
    return {**case.model_dump(exclude={"parameters"}), **case.parameters}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = dict.fromkeys([*then, *now])
    return [
        f"{key.replace('_', ' ')} {then.get(key)} then, {now.get(key)} now"
        for key in keys
        if then.get(key) != now.get(key)
    ]
