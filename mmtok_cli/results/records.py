"""The records of a run as they are written to its directory: plain data from which all tables are made."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import to_jsonable_python

from mmtok_cli.budget import Budget, TokenCounts
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.samples import ClosedImages, Sample
from mmtok_cli.results.schedule import Rotation
from mmtok_cli.results.schema import (
    Bytes,
    CaseId,
    Environment,
    FailureReason,
    FlopCoverage,
    LargestBatch,
    Measure,
    Number,
    OfCase,
    Record,
    Seconds,
    Share,
    cases_with_resize,
    cases_without_draft,
)
from mmtok_cli.rules import NATIVE, Positions, Rules, TurnPolicy
from mmtok_cli.settings import MOST_SAMPLES, CompareSettings
from mmtok_cli.stages import ALL_STAGES, STAGES

SUMS = ("ttft", "total")


def _read_number(value: Any) -> Any:
    """What `json_text` writes for a number that is not finite."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _require_plausible(tokens: TokenCounts) -> TokenCounts:
    if not (0 <= tokens.kept <= tokens.total <= 10**9 and 0 <= tokens.text <= 10**9):
        raise ValueError("token counts must not be negative, and no more can be kept than there are")
    if not tokens.kept - 1 <= tokens.layer_average <= tokens.total + 1:  # which allows for rounding
        raise ValueError("the layer average must be between the numbers of kept and of all vision tokens")
    if any(not 0 < one <= 10**9 for one in tokens.encoded):
        raise ValueError("an image must be encoded to at least one vision token")
    return tokens


Tokens = Annotated[TokenCounts, AfterValidator(_require_plausible)]


LARGEST_DIVERGENCE = 1e6  # nats; logits of real models differ by a few hundred


def _require_divergence(value: float) -> float:
    if value < 0:  # NaN is not
        raise ValueError("must not be negative")
    if LARGEST_DIVERGENCE < value < math.inf:
        raise ValueError(f"must not be above {LARGEST_DIVERGENCE:g}")
    return value


Divergence = Annotated[float, BeforeValidator(_read_number), AfterValidator(_require_divergence)]


class FileRecord(Record, ABC):
    """A record that is a file of its own."""

    @property
    @abstractmethod
    def file_name(self) -> str:
        """The file's name within its folder."""


class GpuState(Record):
    """The state of the card after a run: clocks in MHz, power limit in watts, other users.

    throttled: reasons for a reduced clock, during the run where the card counts them, otherwise after it. joules: per
    repetition of the run. None where the card does not report a value.
    """

    clock: Measure | None
    memory_clock: Measure | None
    full_clock: Measure | None
    power_limit: Measure | None
    throttled: list[str]
    other_processes: Number | None
    joules: Measure | None = None


class MachineState(Record):
    """The CPUs from the end of the run before to the end of this one.

    cpus: logical ones of the machine. cores: physical ones that this process may use. seconds: of the clock. others:
    CPU seconds of other processes. stolen: CPU seconds that a hypervisor gave to others. frequency: megahertz; None
    where it was not read.
    """

    cpus: Annotated[Number, Field(ge=1)]
    cores: Annotated[Number, Field(ge=1)]
    seconds: Seconds
    others: Seconds
    stolen: Seconds
    frequency: Measure | None


class TimedRun(FileRecord):
    """One case in one round: a number of repetitions on one batch of samples.

    case: its number in the plan. batch: the number of the batch among those of its size. samples: their names.
    seconds: by stage, the median of the repetitions, all of which are in `repetitions`. steps: tokens decoded for the
    longest answer. new_tokens: tokens of each answer, the one that ends it included; empty in records of versions that
    did not count them. Bytes are those of the batch; reserved holds what earlier runs left in the allocator's caches as
    well. drafts: of the samples, in a case with drafts.
    """

    case: Number
    round: Number = 0
    batch: Number = 0
    key: str = ""
    samples: list[str]
    seconds: dict[str, Seconds]
    repetitions: dict[str, list[Seconds]]
    tokens: list[Tokens]
    positions: Positions
    answers: list[str]
    steps: Number
    kv_cache: Bytes
    peak: Bytes | None
    reserved: Bytes | None
    host: Bytes
    gpu: GpuState | None = None
    machine: MachineState | None = None
    new_tokens: list[Number] = Field(default=[])
    drafts: list[str] = Field(default=[])

    @property
    def file_name(self) -> str:
        return f"{self.round:05d}-{self.case:03d}.json"

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _require_stages(self.seconds, *SUMS)
        if self.seconds.keys() != self.repetitions.keys():
            raise ValueError("seconds and repetitions do not have the same stages")
        for stage, values in self.repetitions.items():
            if not values or not math.isclose(self.seconds[stage], median(values), abs_tol=1e-12):
                raise ValueError(f"the seconds of {stage} are not the median of its repetitions")
        if len({len(values) for values in self.repetitions.values()}) > 1:
            raise ValueError("the stages differ in their number of repetitions")
        for number in range(len(self.repetitions["total"])):
            _require_sums({stage: values[number] for stage, values in self.repetitions.items()})
        if not (self.seconds["encode"] + self.seconds["prefill"] > 0 and self.seconds["ttft"] > 0):
            raise ValueError("the stages until the first token took no time")
        if not len(self.samples) == len(self.tokens) == len(self.answers) > 0:
            raise ValueError("samples, tokens and answers differ in number")
        if self.new_tokens and not len(self.new_tokens) == len(self.samples) <= sum(self.new_tokens):
            raise ValueError("the numbers of new tokens are not those of the samples")
        if max(self.new_tokens, default=0) > self.steps:
            raise ValueError("an answer has more tokens than were decoded")
        return self


class CountedFlops(FileRecord):
    """What is measured once for each case: FLOPs per sample by stage, how many operators they cover, the largest batch,
    if it was to be found, and the bytes that the allocator reserves for one batch; None where it does not say."""

    case: Number
    key: str
    flops: dict[str, Measure]
    coverage: FlopCoverage
    largest_batch: LargestBatch | None = None
    reserved: Bytes | None = None

    @property
    def file_name(self) -> str:
        return f"{self.case:03d}.json"

    @model_validator(mode="after")
    def _has_all_stages(self) -> Self:
        _require_stages(self.flops, "total")
        if not math.isclose(self.flops["total"], sum(self.flops.get(stage, 0.0) for stage in ALL_STAGES)):
            raise ValueError("the total is not the sum of the stages")
        return self


class CaseFailure(Record):
    """Why a case was given up. case: its number in the plan. traceback: of a defect of the code, otherwise empty."""

    case: Number
    reason: FailureReason
    message: str
    traceback: str = ""


class TimingFailure(CaseFailure, FileRecord):
    """A case that failed while it was timed. round: None for the warm-up."""

    key: str
    round: Number | None

    @property
    def file_name(self) -> str:
        return f"{self.case:03d}.json"


class Closeness(Record):
    """How close the logits of one sample's answer are to those of the unreduced model.

    kl: divergence of the next token's distribution in nats, mean over the answer's tokens. top1: share of its tokens
    that are the most likely ones here too. same: whether all of them are. Greedy decoding then gives the same answer,
    since each token follows from those before it. A serving engine gives no logits: then kl and top1 are None, and
    same compares the answers.
    """

    kl: Divergence | None
    top1: Share | None
    same: bool


class Prediction(Record):
    """What one case answered to one sample of the dataset.

    case, sample: numbers in the plan and in the dataset. score: None where there is no reference answer. tokens: of the
    prompt.
    """

    case: Number
    sample: Number
    answer: str
    score: Share | None
    closeness: Closeness
    tokens: Tokens | None = None


class UnreadableSample(Record):
    """A sample whose images cannot be read or whose prompt is too long, which is left out of every case."""

    sample: Number
    problem: str


class SampleLabel(Record):
    """What the summary and the export of predictions need to know of a sample.

    images: their names. answer: the first reference answer. references: all of them. id: its name within the data.
    question, references and id are None in runs of versions that did not record them.
    """

    sample: Number
    images: tuple[str, ...]
    answer: str | None
    kind: str | None
    question: str | None = None
    references: tuple[str, ...] | None = None
    id: str | None = None


class PredictionBatch(FileRecord):
    """The predictions of all cases for one batch of samples.

    key: a digest of the plan's cases. failures: cases that could not be evaluated on this batch.
    """

    batch: Number
    batch_size: Annotated[Number, Field(ge=1)]
    key: str
    samples: list[SampleLabel]
    predictions: list[Prediction]
    unreadable: list[UnreadableSample]
    failures: list[CaseFailure]

    @property
    def file_name(self) -> str:
        return f"{self.batch:06d}.json"

    @model_validator(mode="after")
    def _agrees_on_samples(self) -> Self:
        first = self.batch * self.batch_size
        numbers = [label.sample for label in self.samples]
        if not 0 < len(numbers) <= self.batch_size or numbers != list(range(first, first + len(numbers))):
            raise ValueError("samples are not those of the batch")
        if not {left_out.sample for left_out in self.unreadable} <= set(numbers):
            raise ValueError("a sample that was left out is not of the batch")
        predicted = {(prediction.case, prediction.sample) for prediction in self.predictions}
        if len(predicted) < len(self.predictions) or not {sample for _, sample in predicted} <= self.readable:
            raise ValueError("predictions are not of different samples of the batch")
        scored = {(prediction.sample, prediction.score is not None) for prediction in self.predictions}
        if len(scored) > len({sample for sample, _ in scored}):
            raise ValueError("a sample has scores for some cases only")
        return self

    @property
    def readable(self) -> set[int]:
        """The numbers of the samples that were not left out."""
        return {label.sample for label in self.samples} - {left_out.sample for left_out in self.unreadable}

    def predicted_by(self, case: int) -> set[int]:
        """The numbers of the samples that a case answered."""
        return {prediction.sample for prediction in self.predictions if prediction.case == case}


class TurnRun(Record):
    """One question of a conversation and its answer.

    score: None where there is no reference answer. seconds: by stage, zero for stages that the turn does without.
    tokens: of the whole conversation up to the answer. steps: new tokens. kv_cache: bytes after the answer.
    encoder_outputs: bytes that are kept in memory for later turns.
    """

    answer: str
    score: Share | None
    seconds: dict[str, Seconds]
    tokens: Tokens
    steps: Number
    kv_cache: Bytes
    encoder_outputs: Bytes

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _require_stages(self.seconds, *SUMS)
        _require_sums(self.seconds)
        return self


class ConversationRun(Record):
    """A conversation with one case under one policy; None for the baseline, which has no choice."""

    case: Number
    policy: TurnPolicy | None
    turns: list[TurnRun] = Field(min_length=1)


class ConversationFailure(CaseFailure):
    """A case that failed under a policy, and has no part in later conversations."""

    policy: TurnPolicy | None


class ConversationRecord(FileRecord):
    """A conversation with all cases, in the order in which they ran.

    conversation: the number of its sample. key: a digest of the plan's cases. images: their names. problem: why the
    conversation is left out of every case, if it is.
    """

    conversation: Number
    key: str
    images: tuple[str, ...]
    runs: list[ConversationRun] = Field(default=[])
    problem: str | None = None
    failures: list[ConversationFailure] = Field(default=[])

    @property
    def file_name(self) -> str:
        return f"{self.conversation:06d}.json"

    @property
    def by_case(self) -> dict[tuple[int, TurnPolicy | None], ConversationRun]:
        return {(run.case, run.policy): run for run in self.runs}

    @model_validator(mode="after")
    def _agrees_on_turns(self) -> Self:
        if len(self.by_case) < len(self.runs):
            raise ValueError("a case has several runs under one policy")
        if len({tuple(turn.score is None for turn in run.turns) for run in self.runs}) > 1:
            raise ValueError("the cases differ in their turns, or in which of them have scores")
        if self.problem is not None and self.runs:
            raise ValueError("a conversation that is left out has runs")
        return self


class TaskScores(Record):
    """The scores of a run by the tasks of lmms-eval: the content of `tasks.json`, once all answers are evaluated.

    key: a digest of the plan's cases. paired: the metric of each task by which every answer is judged; None where a
    task has only metrics of all answers together. scores: by case, in the plan, task and metric. remarks: lines about
    metrics that could not be computed.
    """

    schema_: Literal["mmtok.tasks/1"] = Field(default="mmtok.tasks/1", alias="schema")
    key: str
    paired: dict[str, str | None]
    scores: dict[Number, dict[str, dict[str, float]]]
    remarks: list[str] = Field(default=[])


class PlannedCase(OfCase):
    """A case with a digest of its description and of everything else that its figures depend on."""

    key: str


class Plan(Record):
    """The content of `plan.json`: the resolved settings of a run, and what it is measured on.

    options: those of the command line that define what is measured. data_digest: a digest of the samples.
    order: the cases of the planned rounds, in the order in which they run. samples: how many are evaluated; timed: how
    many of them the rounds cycle through, all if None. quality: whether answers are evaluated besides being timed.
    metric: how answers are scored. questions: of all conversations, 0 if only first questions are evaluated.
    left_out: a line for each part of the data that could not be used.
    """

    schema_: Literal["mmtok.plan/2"] = Field(default="mmtok.plan/2", alias="schema")
    model: str
    options: CompareSettings
    rules: Rules
    cases: list[PlannedCase] = Field(min_length=1)
    environment: Environment
    data: str
    data_digest: str
    samples: Annotated[Number, Field(ge=1)]
    seed: int
    max_new_tokens: int
    rounds: Annotated[Number, Field(ge=1)]
    every_round: bool
    runs: int
    warmup: int
    min_time: float | None
    order: list[list[int]]
    timed: Annotated[Number, Field(ge=1)] | None = None
    quality: bool = True
    metric: MetricName | None = None
    questions: Number = 0
    left_out: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """Raises MMTokError for a budget that is none."""
        differing = [name for name, value in self._copied_options() if value != getattr(self, name)]
        if differing:
            raise ValueError(f"{differing[0]} and the options contradict each other")
        if not (self.timed or 1) <= self.samples <= (MOST_SAMPLES if self.options.tasks else self.options.sample_limit):
            raise ValueError("the number of samples contradicts the options")
        if any(planned.case.run is not None for planned in self.cases):
            raise ValueError("its cases are of several runs")
        for number, planned in enumerate(self.cases):
            if planned.case.budget is not None:
                Budget.parse(planned.case.budget)
            if not self.cases[self.baseline_of(number)].case.is_baseline:
                raise ValueError(f"{planned.case.label} has no baseline")
            if planned.case.batch_size > (self.timed or self.samples):
                raise ValueError(f"{planned.case.label} needs more samples than there are")
        # The lists are compared last: only their lengths show that a number of rounds is not made up.
        if len(self.order) != self.rounds or self.order != self.rotation().first(self.rounds):
            raise ValueError("the order is not that of the rounds, cases and seed")
        return self

    def _copied_options(self) -> Iterator[tuple[str, Any]]:
        """The fields that the options decide, and their values there."""
        for name in ("rules", "seed", "max_new_tokens", "runs", "warmup", "min_time"):
            yield name, getattr(self.options, name)
        yield "quality", self.options.measures_quality
        yield "every_round", self.options.rounds is not None
        if self.options.rounds is not None:
            yield "rounds", self.options.rounds

    def rotation(self) -> Rotation:
        """Which cases run in which round."""
        sizes = tuple(planned.case.batch_size for planned in self.cases)
        batches = {size: (self.timed or self.samples) // size for size in sizes}
        return Rotation(sizes, batches, self.rounds, self.seed, self.every_round)

    @property
    def conversation_cases(self) -> list[tuple[int, TurnPolicy | None]]:
        """The cases that conversations are held with, each under every policy: the baseline first, which has none.

        They are those of the smallest batch size, since conversations are held one at a time. Empty without --turns.
        """
        if not self.options.turns:
            return []
        size = min(planned.case.batch_size for planned in self.cases)
        mine = [(number, each.case) for number, each in enumerate(self.cases) if each.case.batch_size == size]
        reduced = [number for number, case in mine if case.method != "full" or case.image_scale is not None]
        return [(mine[0][0], None), *((number, policy) for number in reduced for policy in self.options.turns)]

    @property
    def without_draft(self) -> dict[int, int]:
        """The same case without its draft, by the number of the one with it."""
        return cases_without_draft([planned.case for planned in self.cases])

    @property
    def with_resize(self) -> dict[int, int]:
        """The number of `resize` at the same budget, by that of the other case."""
        return cases_with_resize([planned.case for planned in self.cases])

    def baseline_of(self, case: int) -> int:
        """The unreduced case of the same batch size: the first that has this size."""
        size = self.cases[case].case.batch_size
        return next(i for i, other in enumerate(self.cases) if other.case.batch_size == size)


def _require_stages(values: Mapping[str, float], *sums: str) -> None:
    for name in (*STAGES, *sums):
        if name not in values:
            raise ValueError(f"{name} is missing")


def _require_sums(seconds: Mapping[str, float]) -> None:
    """Seconds of one repetition. Stages with the prefix `measured_` are contained in others."""
    total = seconds["total"]
    parts = [value for name, value in seconds.items() if name not in SUMS and not name.startswith("measured_")]
    if not math.isclose(total, sum(parts)):
        raise ValueError("the total is not the sum of the stages")
    if not math.isclose(seconds["ttft"], total - seconds["decode"], abs_tol=1e-9 * total):
        raise ValueError("ttft is not the sum of the stages before decode")


def parameters_of(method: Any) -> dict[str, Any]:
    """The parameters of a method, as plain data."""
    parameters: dict[str, Any] = to_jsonable_python(asdict(method))
    return parameters


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of plain data."""
    text = json.dumps(to_jsonable_python(value), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample_name(sample: Sample) -> str:
    """A name that identifies a sample within its dataset: its images and its question."""
    return " ".join([*sample.image_ids, sample.unpadded_question or sample.question])


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """Of names, questions, reference answers and the sizes of image files, in their order.

    The content of the images is not read.
    """
    return digest(
        [
            [s.image_ids, s.question, s.answer, s.answers, s.kind, _file_sizes(s), *([s.later] if s.later else [])]
            for s in samples
        ]
    )


def _file_sizes(sample: Sample) -> list[int | None]:
    files = sample.images.files if isinstance(sample.images, ClosedImages) else []
    return [file.stat().st_size if file.is_file() else None for file in files]


def planned_case(case: CaseId, environment: Environment, common: Mapping[str, Any]) -> PlannedCase:
    """The case with a digest of its description, the settings that all cases share, and the environment."""
    where = environment.model_dump(exclude={"command", "fallback"})  # which a comparison never has
    if where.get("pixels") in (None, NATIVE):
        where.pop("pixels", None)
    for name in ("encoder_attention", "linear_layers", "linear_reference"):
        if not where.get(name):
            where.pop(name, None)
    newer = ("draft", "draft_tokens", "repeat", "image_scale")  # keys of older runs know nothing of these
    without = {name for name in newer if getattr(case, name) is None}
    return PlannedCase(case=case, key=digest([case.model_dump(exclude=without), where, dict(common)]))
