"""The shape of what is reported: seconds and bytes, raw values kept. `--json` prints these objects.

Each object that is printed names its `schema`. The number behind the slash goes up when a key changes its meaning or
goes away; keys may be added without that. What is printed can be read back: `from_json(Comparison, text)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mmtok_cli.rules import Positions, Rules

CONFIDENCE = 0.95  # of all intervals


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Kind = TypeVar("Kind", bound=Record)


def json_text(value: BaseModel | Mapping[str, Any], indent: int | None = None) -> str:
    """One JSON object that any file can hold.

    Undecodable bytes, which names and the command line may hold, are escaped; what is not a number is a string.
    """
    plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
    separators = None if indent else (",", ":")
    text = json.dumps(_finite(plain), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def from_json(kind: type[Kind], text: str) -> Kind:
    """What `json_text` was given. Raises ValueError for text that is something else."""
    return kind.model_validate(json.loads(text))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Times(Record):
    """Seconds of one stage over all rounds.

    values: one for each round, the median of its repetitions. repetitions: all raw values by round, where a case was
    run more than once in a round.
    """

    median: float
    p10: float
    p90: float
    values: list[float]
    repetitions: list[list[float]] = []


class Speedup(Record):
    """Baseline seconds / method seconds, paired within rounds; low and high bound a 95 % interval."""

    median: float
    low: float | None
    high: float | None
    conclusive: bool


class Drift(Record):
    """A steady change of a case's seconds from the first round to the last.

    change: as a share of their median, above 0 where it became slower. p: how likely chance alone is to do that.
    """

    change: float
    p: float


class Tokens(Record):
    """Per sample, on average: vision tokens before reduction, into the language model and per decoder layer; text
    tokens of the prompt; tokens decoded, those of the longest answer of a batch."""

    total: float
    kept: float
    text: float
    layer_average: float
    new: float


class Memory(Record):
    """Bytes: peak of a batch above the weights (None where the device does not count it), KV cache per sample, and
    what the whole process held resident on the host, which is the same story for every case.

    reserved: what the device's allocator held at most, weights and unused blocks included.
    """

    peak: int | None
    kv_cache: int
    host: int
    reserved: int | None = None


class GpuUse(Record):
    """What the GPU's driver said after the runs of a case; None where it does not tell.

    clock, memory_clock: MHz, medians. full_clock: the highest that the card may run at. power_limit: watts. throttled:
    by reason, in how many rounds the clock was held down. other_processes: how many at most. joules: per sample,
    by the card's energy counter.
    """

    clock: float | None
    memory_clock: float | None
    full_clock: float | None
    power_limit: float | None
    throttled: dict[str, int]
    other_processes: int | None
    joules: float | None


class FlopCoverage(Record):
    """Which operators the FLOPs are made of.

    calls: of all operators. counted: calls of those that torch has a formula for. missed: calls of those that multiply
    matrices, by their names, and for which it has none; where there are some, the FLOPs are too few.
    """

    calls: int
    counted: dict[str, int]
    missed: dict[str, int]

    @property
    def share(self) -> float:
        return sum(self.counted.values()) / self.calls if self.calls else 0.0


class Flops(Record):
    """FLOPs per sample by stage, and their sum as `total`."""

    stages: dict[str, float]
    coverage: FlopCoverage


class Fidelity(Record):
    """Closeness to the unreduced model, means over samples.

    kl: divergence of the next token's distribution in nats. top1: agreement on the likeliest token. Both over all
    tokens of the unreduced model's answer, which is read back to the reduced one. same: the share of identical
    answers.
    """

    kl: float
    top1: float
    same: float | None = None


class Score(Record):
    """Right answers, by kind of question too. Not whole numbers where an answer may be partly right."""

    right: int | float
    asked: int
    by_kind: dict[str, tuple[int | float, int]] = {}

    @property
    def share(self) -> float:
        return self.right / self.asked


class YesNo(Record):
    """POPE's scores; "yes" is the positive answer. 0 stands where a ratio has nothing below the line.

    yes_ratio: share of the answers that say yes.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


class Flips(Record):
    """Samples by what the baseline's answer was and what the method's is.

    p_value: McNemar's exact test of whether answers get lost as often as they are gained. Small means that the two
    differ by more than chance.
    """

    right_right: int
    right_wrong: int
    wrong_right: int
    wrong_wrong: int
    p_value: float


class CaseId(Record):
    """A case, which is a row of every table: a method with its parameters, at a budget and a batch size.

    budget: "64", "10%"; None where the method takes none. again: the baseline measured a second time as if it were a
    method, so that what it gains or loses is noise. run: the label of the run, where several runs are merged.
    """

    method: str
    parameters: dict[str, Any]
    budget: str | None
    batch_size: int = 1
    again: bool = False
    run: str | None = None

    def __str__(self) -> str:
        return self.title if self.budget is None else f"{self.title} @ {self.budget}"

    @property
    def title(self) -> str:
        """The case without its budget, for tables that have a column for it."""
        name = f"{self.method} (again)" if self.again else self.method
        return f"{self.run}: {name}" if self.run else name

    @property
    def label(self) -> str:
        """The case with its batch size, if that is not 1."""
        return str(self) if self.batch_size == 1 else f"{self} x {self.batch_size}"

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unreduced model that the others are compared with."""
        return self.method == "full" and not self.again


class OfCase(Record):
    """Anything that is said of one case, and is shown under its name."""

    case: CaseId

    def __str__(self) -> str:
        return str(self.case)


class CaseResult(OfCase):
    """What was measured of a case. FLOPs are per sample, by stage, counted on the first batch.

    positions: whether kept tokens kept their positions. overhead: seconds of select / (encode + prefill), median.
    decode_tokens_per_second: (new tokens - 1) / seconds of decode, median; None where nothing was decoded after the
    first token. outliers: which of the values of `ttft` are far above the rest. drift: of `ttft`, if there is any.
    score: F1 where answers are yes or no, else the mean; it and all below belong to the method and its budget, whatever
    the batch size, and are None where they were not asked for. retention_low, retention_high: 95 %.
    """

    positions: Positions
    tokens: Tokens
    seconds: dict[str, Times]
    speedup: dict[str, Speedup]
    overhead: float
    decode_tokens_per_second: float | None = None
    memory: Memory
    flops: dict[str, float]
    flop_coverage: FlopCoverage | None = None
    gpu: GpuUse | None = None
    outliers: list[int] = []
    drift: Drift | None = None
    score: float | None = None
    score_counts: Score | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    flips: Flips | None = None
    yes_no: YesNo | None = None
    fidelity: Fidelity | None = None


class FailedCase(OfCase):
    """A case that could not be run to its end, and so has no result; or, among `unevaluated`, no quality.

    round: during which it failed, counted from 0; None while it was warming up, or asked. reason: "out of memory",
    or "refused" where a sample was such that the case could not be run on it.
    """

    round: int | None
    reason: Literal["out of memory", "refused"]
    message: str


class Environment(Record):
    """What the figures were measured on.

    driver and cuda: versions, where there is an NVIDIA GPU. layers: decoder layers that were run, and those of the
    model, where these are more: times of prefill and decode, KV cache and FLOPs are estimates then.
    """

    mmtok: str
    git_commit: str | None
    git_dirty: bool | None
    python: str
    torch: str
    transformers: str
    platform: str
    processor: str
    device: str
    weights: str
    dtype: str
    attention: str
    threads: int
    command: list[str]
    driver: str | None = None
    cuda: str | None = None
    layers: tuple[int, int] | None = None


class Schedule(Record):
    """What was asked and in which order: order[round] lists the cases in the order in which they ran.

    seed: of the order, and of methods that draw, unless their parameters say otherwise. samples: how many were asked,
    of `planned_samples`; timed: between how many the rounds went round. data_digest: of names, questions and answers.
    batch_size: a list where there were several, and each result names its own. rounds: those that were finished. runs:
    repetitions of each case within a round. min_time: the seconds that rounds were to go on for, at least.
    """

    data: str
    seed: int
    max_new_tokens: int
    samples: int
    batch_size: int | list[int]
    rounds: int
    warmup: int
    order: list[list[int]]
    runs: int = 1
    min_time: float | None = None
    data_digest: str | None = None
    planned_samples: int | None = None
    timed: int | None = None


class Comparison(Record):
    """What `mmtok compare --json` prints.

    results: first the unreduced baseline, then the cases that go with it; so for each batch size, unless the baseline
    itself is among the failures. planned_rounds: how many there were to be at least. unevaluated: cases that were timed
    and could not be evaluated. left_out: a line for each part of the data that could not be used. remarks:
    what else there is to know, a line each.
    """

    schema_: Literal["mmtok.compare/2"] = Field(default="mmtok.compare/2", alias="schema")
    model: str
    rules: Rules
    environment: Environment
    schedule: Schedule
    interrupted: bool
    results: list[CaseResult]
    failures: list[FailedCase] = []
    planned_rounds: int | None = None
    run_directory: str | None = None
    unevaluated: list[FailedCase] = []
    left_out: list[str] = []
    remarks: list[str] = []


class Operator(Record):
    """One operator within one stage of the profiler trace of a case."""

    case: str
    stage: str
    name: str
    calls: int
    cpu_seconds: float
    device_seconds: float


class Profile(Record):
    """What `mmtok profile --json` prints. stage_peaks: bytes by case and stage, from the traces."""

    schema_: Literal["mmtok.profile/2"] = Field(default="mmtok.profile/2", alias="schema")
    model: str
    parameters: int
    rules: Rules
    environment: Environment
    schedule: Schedule
    interrupted: bool
    cases: list[CaseResult]
    stage_peaks: dict[str, dict[str, int]]
    operators: list[Operator]
    trace: str
