"""The shape of what is measured through a serving engine: load runs and their summary, and the quality of answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mmtok_cli.results.schema import (
    Environment,
    Flips,
    Number,
    OfCase,
    PairedAccuracy,
    Record,
    SamplePrediction,
    Score,
    Seconds,
    Share,
    Speedup,
    YesNo,
)
from mmtok_cli.rules import Rules

# Stages of a request, as its client sees them: processing its image and text in the front end; waiting until the
# engine begins with it; then until the first token: encode, select and prefill of this and of the other requests in the
# same steps; then until the last token. Without decode they add up to the TTFT.
REQUEST_STAGES = ("preprocess", "queue", "first_step", "decode")

# Stages of the engine, which works on all requests at once. idle: no step ran.
ENGINE_STAGES = ("encode", "select", "prefill", "decode", "idle")


class ServedRequest(Record):
    """One request to an engine, and its answer.

    sample: number of the sample. seconds: REQUEST_STAGES, `ttft` and `total`. vision: vision tokens of the unreduced
    images. kept: of them, those in the prompt. prompt: all tokens of the prompt. new: tokens of the answer. preempted:
    how often the engine took its KV cache away again.
    """

    sample: Number
    seconds: dict[str, Seconds]
    vision: Number
    kept: Number
    prompt: Number
    new: Number
    answer: str = ""
    preempted: Number = 0

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is none."""
        return self.seconds["decode"] / (self.new - 1) if self.new > 1 else None


class LoadRun(Record):
    """Requests of one case, as many at a time as `concurrency` says: whenever one is answered, the next one is sent.

    seconds: from the first request to the last answer. busy: seconds of ENGINE_STAGES, which add up to about `seconds`.
    images: how many were encoded; encodings: in how many batches. steps: of the engine. kv_cache: largest share of the
    KV cache in use. round: None for the warm-up.
    """

    case: Number
    concurrency: Annotated[Number, Field(ge=1)]
    round: Number | None
    seconds: Seconds
    requests: list[ServedRequest] = Field(min_length=1)
    busy: dict[str, Seconds]
    images: Number
    encodings: Number
    steps: Number
    kv_cache: Share


class Latency(Record):
    """Seconds of requests. median, p99: over all requests of all rounds. by_round: the median of each round."""

    median: float
    p99: float
    by_round: list[float]


class Rate(Record):
    """Something per second. median: over rounds. by_round: the value of each round."""

    median: float
    by_round: list[float]


class LoadResult(OfCase):
    """One case at one concurrency.

    requests: all that were counted. vision, kept, prompt, new: tokens of a request, means. seconds: by stage of a
    request, and `ttft`, `tpot` (where there were further tokens) and `total`. busy: share of the time of all rounds
    that the engine spent in each of its stages; busy_seconds: the same per request. images: encoded per request.
    batch: images per encoding. kv_cache: largest share in use. speedup: `throughput`, `ttft` and `tpot` against the
    unreduced model, paired within rounds; empty for the unreduced model.
    """

    concurrency: int
    requests: int
    vision: float
    kept: float
    prompt: float
    new: float
    seconds: dict[str, Latency]
    requests_per_second: Rate
    output_tokens_per_second: Rate
    busy: dict[str, float]
    busy_seconds: dict[str, float]
    images: float
    batch: float
    kv_cache: float
    preempted: int
    speedup: dict[str, Speedup]


class EngineInfo(Record):
    """A serving engine and its settings.

    kv_cache_tokens: how many tokens its KV cache holds. settings: arguments of the engine that differ from its
    defaults. caches: which of its caches are off, or why they never answer.
    """

    name: str
    version: str
    kv_cache_tokens: int
    settings: dict[str, Any]
    caches: str


class LoadSchedule(Record):
    """What was sent to an engine and in which order.

    order: order[round] lists (case, concurrency), each place in `cases` of the result. requests: by concurrency, of a
    case in a round. samples: how many different ones. max_new_tokens: of an answer; exact: every answer has as many.
    prompt_tokens: text tokens of each prompt, None where they were not fixed. image_size: width and height of all
    images, None for a dataset's own.
    """

    data: str
    samples: int
    seed: int
    rounds: int
    planned_rounds: int
    warmup: int
    order: list[list[int]]
    requests: dict[str, int]
    max_new_tokens: int
    exact: bool
    prompt_tokens: int | None
    image_size: tuple[int, int] | None


class EngineProfile(Record):
    """What `mmtok profile --engine … --json` prints.

    cases: for each concurrency the unreduced model, then the others. equivalents: budgets that are shares, as settings
    of engines (see `Budget.engine_settings`). runs: raw values, without those of the warm-up. interrupted: by the
    user, before all rounds were measured. failure: why the engine failed before that.
    """

    schema_: Literal["mmtok.engine-profile/1"] = Field(default="mmtok.engine-profile/1", alias="schema")
    model: str
    engine: EngineInfo
    rules: Rules
    environment: Environment
    schedule: LoadSchedule
    interrupted: bool
    failure: str | None = None
    cases: list[LoadResult]
    equivalents: dict[str, dict[str, float]]
    runs: list[LoadRun]


class AnswerQuality(OfCase):
    """The answers of one case, with the meanings that the fields have in a CaseResult.

    vision, kept: vision tokens of a sample, means. same: share of answers identical to those of the unreduced model.
    """

    vision: float
    kept: float
    short: int
    score: float | None
    score_counts: Score | None
    retention: float | None
    retention_low: float | None
    retention_high: float | None
    flips: Flips | None
    yes_no: YesNo | None
    paired: PairedAccuracy | None
    same: float


class EngineComparison(Record):
    """What `mmtok compare --engine … --json` prints: quality alone.

    samples: how many were answered by all cases; left_out: a line for each that was not, and for each part of the data
    that could not be used. absent: what a comparison without an engine has and this one has not. predictions: of each
    sample and case.
    """

    schema_: Literal["mmtok.engine-compare/1"] = Field(default="mmtok.engine-compare/1", alias="schema")
    model: str
    engine: EngineInfo
    rules: Rules
    environment: Environment
    data: str
    samples: int
    seed: int
    max_new_tokens: int
    metric: str | None
    metric_title: str | None
    interrupted: bool
    cases: list[AnswerQuality]
    equivalents: dict[str, dict[str, float]]
    left_out: list[str]
    absent: list[str]
    predictions: list[SamplePrediction]
