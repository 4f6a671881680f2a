"""The shape of what is reported: seconds and bytes, raw values kept. `--json` prints these objects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmtok_cli.rules import Positions, Rules


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Times(Record):
    """Seconds of one stage over all rounds."""

    median: float
    p10: float
    p90: float
    values: list[float]


class Speedup(Record):
    """Baseline seconds / method seconds, paired within rounds; low and high bound a 95 % interval."""

    median: float
    low: float | None
    high: float | None
    conclusive: bool


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
    what the whole process held resident on the host, which is the same story for every case."""

    peak: int | None
    kv_cache: int
    host: int


class Fidelity(Record):
    """Closeness to the unreduced model on the answer's first token: mean KL divergence in nats, top-1 agreement."""

    kl: float
    top1: float


class Score(Record):
    """Right answers, by kind of question too."""

    right: int
    asked: int
    by_kind: dict[str, tuple[int, int]] = {}

    @property
    def share(self) -> float:
        return self.right / self.asked


class CaseResult(Record):
    """One method at one budget. FLOPs are per sample, by stage, counted on the first batch.

    positions: whether kept tokens kept their positions. overhead: seconds of select / (encode + prefill), median.
    """

    method: str
    parameters: dict[str, Any]
    budget: str | None
    positions: Positions
    tokens: Tokens
    seconds: dict[str, Times]
    speedup: dict[str, Speedup]
    overhead: float
    memory: Memory
    flops: dict[str, float]
    score: float | None = None
    score_counts: Score | None = None
    retention: float | None = None
    fidelity: Fidelity | None = None

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method} @ {self.budget}"


class Environment(Record):
    """What the figures were measured on."""

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


class Schedule(Record):
    """What was asked and in which order: order[round] lists the cases in the order in which they ran."""

    data: str
    seed: int
    max_new_tokens: int
    samples: int
    batch_size: int
    rounds: int
    warmup: int
    order: list[list[int]]


class Comparison(Record):
    """What `mmtok compare --json` prints."""

    schema_: Literal["mmtok.compare/1"] = Field(default="mmtok.compare/1", alias="schema")
    model: str
    rules: Rules
    environment: Environment
    schedule: Schedule
    interrupted: bool
    results: list[CaseResult]


class Operator(Record):
    """One operator within one stage of a profiler trace."""

    method: str
    stage: str
    name: str
    calls: int
    cpu_seconds: float
    device_seconds: float


class Profile(Record):
    """What `mmtok profile --json` prints. stage_peaks: bytes by case and stage, from the traces."""

    schema_: Literal["mmtok.profile/1"] = Field(default="mmtok.profile/1", alias="schema")
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
