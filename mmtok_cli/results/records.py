"""What is written down while a comparison runs: plain data, from which alone its tables can be made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field
from pydantic_core import to_jsonable_python

from mmtok_cli.data.datasets import Metric
from mmtok_cli.data.samples import Sample
from mmtok_cli.pipeline import TokenCounts
from mmtok_cli.results.schedule import Rotation
from mmtok_cli.results.schema import CaseId, Environment, FlopCoverage, OfCase, Record
from mmtok_cli.rules import Positions, Rules
from mmtok_cli.timing.gpu import GpuState


class Run(Record):
    """One case in one round: so many repetitions on one batch of samples.

    case: its place in the plan. batch: the place of the batch among those of its size. samples: what each is
    called. seconds: by stage, the median of the repetitions, all of which are in `repetitions`. steps: tokens
    decoded for the longest answer. right, kinds: one for each sample, None where no answer is known. kl, top1: one
    value for each sample; empty for the baseline, and until it has run too. Bytes are those of the batch.
    """

    case: int
    round: int = 0
    batch: int = 0
    key: str = ""
    samples: list[str]
    seconds: dict[str, float]
    repetitions: dict[str, list[float]]
    tokens: list[TokenCounts]
    positions: Positions
    answers: list[str]
    right: list[bool | None]
    kinds: list[str | None]
    steps: int
    kv_cache: int
    peak: int | None
    reserved: int | None
    host: int
    gpu: GpuState | None = None
    kl: list[float] = Field(default=[])
    top1: list[bool] = Field(default=[])


class Failure(Record):
    """Why a case was given up. round: None for the warm-up. refused: what the round asked of it could not be done."""

    case: int
    key: str
    round: int | None
    reason: Literal["out of memory", "refused"]
    message: str


class Counted(Record):
    """What is counted once for each case: FLOPs per sample by stage, and what they leave out."""

    case: int
    key: str
    flops: dict[str, float]
    coverage: FlopCoverage


class PlannedCase(OfCase):
    """A case with a digest of it and of everything else that its figures depend on."""

    key: str


class Plan(Record):
    """What `plan.json` holds: everything that was asked, resolved, and what it is measured on.

    options: those of the command line that say what is measured. data: a digest of the samples beside their name.
    order: the cases of the planned rounds, in the order in which they run. samples: that are asked; timed: how many of
    them the rounds go round, all if None. quality: whether they are asked apart from being timed. metric: how answers
    are scored. left_out: a line for each part of the data that could not be used.
    """

    schema_: Literal["mmtok.plan/2"] = Field(default="mmtok.plan/2", alias="schema")
    model: str
    options: dict[str, Any]
    rules: Rules
    cases: list[PlannedCase]
    environment: Environment
    data: str
    data_digest: str
    samples: int
    seed: int
    max_new_tokens: int
    rounds: int
    every_round: bool
    runs: int
    warmup: int
    min_time: float | None
    order: list[list[int]]
    timed: int | None = None
    quality: bool = True
    metric: Metric | None = None
    left_out: list[str] = Field(default=[])

    def rotation(self) -> Rotation:
        """Whose turn it is in which round."""
        sizes = tuple(planned.case.batch_size for planned in self.cases)
        batches = {size: (self.timed or self.samples) // size for size in sizes}
        return Rotation(sizes, batches, self.rounds, self.seed, self.every_round)

    def baseline_of(self, case: int) -> int:
        """The unreduced case of the same batch size: the first that has this size."""
        size = self.cases[case].case.batch_size
        return next(i for i, other in enumerate(self.cases) if other.case.batch_size == size)


def plain(value: Any) -> Any:
    """A value as it comes back from JSON, with lists for tuples."""
    return to_jsonable_python(value)


def parameters_of(method: Any) -> dict[str, Any]:
    """The parameters of a method, as plain data."""
    return plain(asdict(method))


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of plain data."""
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample_name(sample: Sample) -> str:
    """What tells a sample from the others of its set: its images and its question."""
    return " ".join([*sample.image_ids, sample.question])


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """Of names, questions and known answers, in their order; what is in the images is not looked at."""
    return digest([[s.image_ids, s.question, s.answer, s.answers, s.kind] for s in samples])


def planned_case(case: CaseId, environment: Environment, common: Mapping[str, Any]) -> PlannedCase:
    """The case with the digest of itself, what all cases have in common, and what it is measured on."""
    where = environment.model_dump(exclude={"command"})
    return PlannedCase(case=case, key=digest([case.model_dump(), where, dict(common)]))
