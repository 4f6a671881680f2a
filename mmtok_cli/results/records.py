"""The records of a run as they are written to its directory: plain data from which all tables are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field
from pydantic_core import to_jsonable_python

from mmtok_cli.budget import TokenCounts
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.samples import Sample
from mmtok_cli.results.schedule import Rotation
from mmtok_cli.results.schema import CaseId, Environment, FlopCoverage, OfCase, Record
from mmtok_cli.rules import Positions, Rules


class GpuState(Record):
    """The state of the card at one moment: clocks in MHz, power limit in watts, reasons for throttling, other users.

    joules: per repetition of what was run just before. None where the card does not report a value.
    """

    clock: float | None
    memory_clock: float | None
    full_clock: float | None
    power_limit: float | None
    throttled: list[str]
    other_processes: int | None
    joules: float | None = None


class TimedRun(Record):
    """One case in one round: a number of repetitions on one batch of samples.

    case: its number in the plan. batch: the number of the batch among those of its size. samples: their names.
    seconds: by stage, the median of the repetitions, all of which are in `repetitions`. steps: tokens decoded for the
    longest answer. Bytes are those of the batch.
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
    steps: int
    kv_cache: int
    peak: int | None
    reserved: int | None
    host: int
    gpu: GpuState | None = None


class CountedFlops(Record):
    """FLOPs per sample by stage, counted once for each case, and how many operators they cover."""

    case: int
    key: str
    flops: dict[str, float]
    coverage: FlopCoverage


class CaseFailure(Record):
    """Why a case was given up. case: its number in the plan. refused: the case cannot be run on one of the samples."""

    case: int
    reason: Literal["out of memory", "refused"]
    message: str


class TimingFailure(CaseFailure):
    """A case that failed while it was timed. round: None for the warm-up."""

    key: str
    round: int | None


class Closeness(Record):
    """How close the logits of one sample's answer are to those of the unreduced model.

    kl: divergence of the next token's distribution in nats, mean over the answer's tokens. top1: share of its tokens
    that are the most likely ones here too. same: whether all of them are. Greedy decoding then gives the same answer,
    since each token follows from those before it.
    """

    kl: float
    top1: float
    same: bool


class Prediction(Record):
    """What one case answered to one sample of the dataset.

    case, sample: numbers in the plan and in the dataset. score: None where there is no reference answer.
    """

    case: int
    sample: int
    answer: str
    score: float | None
    closeness: Closeness


class UnreadableSample(Record):
    """A sample whose images cannot be read or whose prompt is too long, which is left out of every case."""

    sample: int
    problem: str


class SampleLabel(Record):
    """What the summary needs to know of a sample: the names of its images, its reference answer and its kind."""

    sample: int
    images: tuple[str, ...]
    answer: str | None
    kind: str | None


class PredictionBatch(Record):
    """The predictions of all cases for one batch of samples.

    key: a digest of the plan's cases. failures: cases that could not be evaluated on this batch.
    """

    batch: int
    batch_size: int
    key: str
    samples: list[SampleLabel]
    predictions: list[Prediction]
    unreadable: list[UnreadableSample]
    failures: list[CaseFailure]


class PlannedCase(OfCase):
    """A case with a digest of its description and of everything else that its figures depend on."""

    key: str


class Plan(Record):
    """The content of `plan.json`: the resolved settings of a run, and what it is measured on.

    options: those of the command line that define what is measured. data_digest: a digest of the samples.
    order: the cases of the planned rounds, in the order in which they run. samples: how many are evaluated; timed: how
    many of them the rounds cycle through, all if None. quality: whether answers are evaluated besides being timed.
    metric: how answers are scored. left_out: a line for each part of the data that could not be used.
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
    metric: MetricName | None = None
    left_out: list[str] = Field(default=[])

    def rotation(self) -> Rotation:
        """Which cases run in which round."""
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
    """A name that identifies a sample within its dataset: its images and its question."""
    return " ".join([*sample.image_ids, sample.question])


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """Of names, questions and reference answers, in their order; the content of the images is not part of it."""
    return digest([[s.image_ids, s.question, s.answer, s.answers, s.kind] for s in samples])


def planned_case(case: CaseId, environment: Environment, common: Mapping[str, Any]) -> PlannedCase:
    """The case with a digest of its description, the settings that all cases share, and the environment."""
    where = environment.model_dump(exclude={"command"})
    return PlannedCase(case=case, key=digest([case.model_dump(), where, dict(common)]))
