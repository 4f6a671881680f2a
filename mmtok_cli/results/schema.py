"""The results that `--json` prints, in seconds and bytes, with all raw values.

Every printed object names its `schema`. The number after the slash is raised when a key is removed or changes its
meaning; keys may be added without that. `from_json(Comparison, text)` reads a result back, and
`python -m mmtok_cli.results` prints the JSON Schemas of a comparison, of a profile and of a prediction.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mmtok_cli.budget import Budget
from mmtok_cli.rules import Positions, Rules, TurnPolicy

CONFIDENCE = 0.95  # of all intervals

# Limits beyond which a figure can only be damaged.
Number = Annotated[int, Field(ge=0, le=10**9)]  # of a case, a round, a sample; how many there are
Bytes = Annotated[int, Field(ge=0, le=10**16)]
Seconds = Annotated[float, Field(ge=0, le=10**9)]
Measure = Annotated[float, Field(ge=0, le=10**24)]  # of FLOPs, watts, megahertz, joules
Share = Annotated[float, Field(ge=0, le=1)]


# "refused": the case cannot be run on one of the samples. "error": anything else, a defect of the code.
FailureReason = Literal["out of memory", "refused", "error"]


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
    # An undecodable byte of a file name is a lone surrogate, which no reader of JSON accepts, not even escaped.
    return re.sub("[\ud800-\udfff]", lambda match: f"\\\\u{ord(match[0]):04x}", text)


def from_json(kind: type[Kind], text: str | bytes, *, strict: bool = False) -> Kind:
    """What `json_text` was given. strict: without conversions, such as that of "1" to 1.

    Raises ValueError for text that is something else, MMTokError for settings in it that are not valid.
    """
    return kind.model_validate_json(text, strict=strict or None)


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

    values: one per round, the median of its repetitions. repetitions: the raw values of each round, if cases were run
    more than once in a round. low, high: bounds of a 95 % interval of the median; None for fewer than six rounds.
    """

    median: float
    p10: float
    p90: float
    values: list[float]
    repetitions: list[list[float]] = []
    low: float | None = None
    high: float | None = None


class Speedup(Record):
    """Baseline seconds / method seconds, paired within rounds; low and high bound a 95 % interval."""

    median: float
    low: float | None
    high: float | None
    conclusive: bool


class Drift(Record):
    """A steady change of a case's seconds from the first round to the last.

    change: as a share of the median; above 0 if the case became slower. p: probability of such a change by chance.
    """

    change: float
    p: float


class Tokens(Record):
    """Per sample, on average: vision tokens before reduction, into the language model and per decoder layer; text
    tokens of the prompt; tokens decoded, those of the longest answer of a batch.

    encoded: vision tokens that the encoder made of the images; None where it saw all of them at their own size, and
    these are `total`.
    """

    total: float
    kept: float
    text: float
    layer_average: float
    new: float
    encoded: float | None = None


class Memory(Record):
    """Memory in bytes.

    peak: of a batch, above the weights; None if the device does not report it. kv_cache: per sample. host: resident
    memory of the whole process. reserved: the most that the device's allocator held in a run of this case alone,
    including weights and unused blocks.
    """

    peak: int | None
    kv_cache: int
    host: int
    reserved: int | None = None


class LargestBatch(Record):
    """The largest batch that fits into memory, with the prompt and the new tokens of the timed runs.

    measured: whether it was run; otherwise it is computed. Sizes up to 3 % larger were not tried. free: bytes beside
    the weights. fixed, per_sample: bytes of the peak, as a line through those of two small batches.
    """

    size: Number
    measured: bool
    free: Bytes
    fixed: Bytes
    per_sample: Bytes


class GpuUse(Record):
    """The state of the GPU during the runs of a case, as its driver reports it; None for values it does not report.

    clock, memory_clock: medians in MHz. full_clock: the highest allowed clock. power_limit: watts. throttled: number of
    rounds with throttling, by reason. other_processes: the largest number of them. joules: per sample, from the
    energy counter of the card.
    """

    clock: float | None
    memory_clock: float | None
    full_clock: float | None
    power_limit: float | None
    throttled: dict[str, int]
    other_processes: int | None
    joules: float | None


class MachineUse(Record):
    """The CPUs while the rounds were timed.

    cpus: logical ones of the machine. cores: physical ones that the process may use. others: CPUs that other processes
    kept busy, on average; others_by_round: the same in each round. stolen: share of the time of a CPU that a hypervisor
    gave to others. frequency: median in megahertz; frequency_drift: its change over the run, if any.
    """

    cpus: int
    cores: int
    others: float
    others_by_round: list[float]
    stolen: float
    frequency: float | None
    frequency_drift: Drift | None = None


class FlopCoverage(Record):
    """Which operators the FLOPs include.

    calls: of all operators. counted: calls of the operators that torch has a formula for. missed: calls of operators
    whose names say that they multiply matrices and that torch has no formula for; if there are any, the FLOPs are
    underestimated. encoder_attention: calls of attention kernels while images are encoded.
    """

    calls: Number
    counted: dict[str, Number]
    missed: dict[str, Number]
    encoder_attention: Number = 0

    @property
    def share(self) -> float:
        return sum(self.counted.values()) / self.calls if self.calls else 0.0


class Flops(Record):
    """FLOPs per sample by stage, and their sum as `total`."""

    stages: dict[str, float]
    coverage: FlopCoverage


class Fidelity(Record):
    """Closeness to the unreduced model, means over samples.

    kl: divergence of the next token's distribution in nats. top1: agreement on the most likely token. Both over all
    tokens of the unreduced model's answer, which is read back to the reduced one. same: the share of identical
    answers.
    """

    kl: float
    top1: float
    same: float | None = None


class Score(Record):
    """Correct answers, in total and by kind of question. Not whole numbers if answers can be partly correct."""

    right: int | float
    asked: int
    by_kind: dict[str, tuple[int | float, int]] = {}

    @property
    def share(self) -> float:
        return self.right / self.asked


class YesNo(Record):
    """POPE's scores, with "yes" as the positive answer. A ratio with denominator 0 is 0.

    yes_ratio: share of answers that are "yes".
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


class PairedAccuracy(Record):
    """MME's scores, means over the kinds of questions.

    accuracy: share of correct answers. accuracy_plus: share of images whose two questions are both answered correctly.
    points: the published score, the sum of 100 x (accuracy + accuracy_plus) over the kinds, at most 200 x `kinds`.
    """

    accuracy: float
    accuracy_plus: float
    points: float
    kinds: int


class Flips(Record):
    """Numbers of samples by whether the baseline's answer and the method's answer are correct.

    p_value: of McNemar's exact test: the probability of a difference this large by chance.
    """

    right_right: int
    right_wrong: int
    wrong_right: int
    wrong_wrong: int
    p_value: float


class CaseId(Record):
    """A case, which is a row of every table: a method with its parameters, at a budget and a batch size.

    budget: "64", "10%"; None where the method takes none. again: the second measurement of the baseline, as a
    check of the noise. run: the label of the run, where several runs are merged. draft: where the first answer comes
    from that the method reads as well: "self", the name of a model, or "text:" and the text; draft_tokens: the most
    that it may have. repeat: which of several draws it is, from 1, of a method that is drawn several times.
    image_scale: factor on both sides of the images, or "auto"; None at their own size.
    """

    method: str = Field(min_length=1)
    parameters: dict[str, Any]
    budget: str | None
    batch_size: Annotated[int, Field(ge=1)] = 1
    again: bool = False
    run: str | None = None
    draft: str | None = None
    draft_tokens: Annotated[int, Field(ge=1)] | None = None
    repeat: Annotated[int, Field(ge=1)] | None = None
    image_scale: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = None

    def __str__(self) -> str:
        return case_name(f"{self._method}{' (again)' * self.again}", self.budget, self.image_scale)

    @property
    def title(self) -> str:
        """The case without its budget, for tables that have a column for it."""
        return case_name(f"{self._method}{' (again)' * self.again}", None, self.image_scale)

    @property
    def _method(self) -> str:
        which = "" if self.repeat is None else f" (seed {self.parameters.get('seed')})"
        if "digest" in self.parameters and "file" in self.parameters:
            which = f" ({Path(self.parameters['file']).name})"
        name = f"{self.method}{which}{' + draft' * (self.draft is not None)}"
        return f"{self.run}: {name}" if self.run else name

    @property
    def label(self) -> str:
        """The case with its batch size, if that is not 1."""
        return str(self) if self.batch_size == 1 else f"{self} x {self.batch_size}"

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unreduced model that the others are compared with."""
        return self.method == "full" and self.budget is None and not self.again and self.image_scale is None

    @property
    def without_draft(self) -> CaseId:
        return self.model_copy(update={"draft": None, "draft_tokens": None})


def case_name(method: str, budget: object, image_scale: float | str | None) -> str:
    """ "mmtok @ 64, scale 0.5"; without what is None."""
    name = method if budget is None else f"{method} @ {budget}"
    return name if image_scale is None else f"{name}, scale {image_scale}"


def cases_without_draft(cases: Sequence[CaseId]) -> dict[int, int]:
    """The place of the same case without its draft, by the place of the one with it."""
    places = {case.model_dump_json(): place for place, case in enumerate(cases)}
    pairs = {place: places.get(case.without_draft.model_dump_json()) for place, case in enumerate(cases) if case.draft}
    return {place: plain for place, plain in pairs.items() if plain is not None}


def cases_with_resize(cases: Sequence[CaseId]) -> dict[int, int]:
    """The place of `resize` at the same budget, by the place of every other case that has a budget."""
    places = {
        (case.run, case.budget, case.batch_size): place for place, case in enumerate(cases) if case.method == "resize"
    }
    found = {
        place: places.get((case.run, case.budget, case.batch_size))
        for place, case in enumerate(cases)
        if case.budget is not None and case.method != "resize"
    }
    return {place: resize for place, resize in found.items() if resize is not None}


def equivalents_of(cases: Sequence[CaseId]) -> dict[str, dict[str, float]]:
    """The budgets of cases that are shares, each as settings of serving engines (see `Budget.engine_settings`)."""
    budgets = dict.fromkeys(case.budget for case in cases if case.budget is not None)
    found = {budget: Budget.parse(budget).engine_settings for budget in budgets}
    return {budget: settings for budget, settings in found.items() if settings}


class OfCase(Record):
    """Something about one case, shown under its name."""

    case: CaseId

    def __str__(self) -> str:
        return str(self.case)


class DraftEffect(Record):
    """A case with a draft, compared with the same one without.

    points: difference of the scores, times 100; low and high bound a 95 % interval, None where there is none, as for F1
    and MME. gained, lost: samples answered correctly only with the draft, only without it. slowdown: seconds to the
    first token with the draft / without it, paired within rounds.
    """

    points: float | None = None
    low: float | None = None
    high: float | None = None
    gained: int | None = None
    lost: int | None = None
    slowdown: Speedup | None = None


class ResizeGroups(Record):
    """Correct answers to samples that the unreduced model answers correctly, in two groups (VTC-Bench).

    Group A: those that `resize` at the same budget answers incorrectly. Group B: those that it answers correctly too.
    """

    a_right: Number
    a_samples: Number
    b_right: Number
    b_samples: Number


class CaseResult(OfCase):
    """What was measured of a case. FLOPs are per sample, by stage, counted on the first batch.

    positions: whether kept tokens kept their positions. overhead: seconds of select / (encode + prefill), median.
    decode_tokens_per_second: (new tokens - 1) / seconds of decode, median; None where nothing was decoded after the
    first token. batch_decode_tokens_per_second: the same for all samples of a batch together, without the padding
    behind shorter answers. samples_per_second: batch size / seconds of all stages, median. seconds, speedup: by stage,
    and `tpot`: seconds of decode per token after the first, in the rounds that decoded any. short: number of samples
    that do not meet the budget, since they have no more tokens that may be kept, or videos that cannot be made smaller:
    of those evaluated, otherwise of those timed. checked: the stage whose seconds show disturbances, `total` if all
    runs decode the same number of tokens. outliers: indices of its values that are far above the others. drift: of its
    values, if any.
    score: by the metric of the schedule: F1 for POPE, (accuracy + accuracy_plus) / 2 for MME, otherwise the mean over
    the samples. It and the fields below do not depend on the batch size; they are None if answers were not evaluated.
    retention_low, retention_high: bounds of a 95 % interval. draft: what the draft of the case is worth. groups: the
    answers by what `resize` at the same budget answers. saved: seconds that encode, prefill and ttft take less than
    those of the baseline, median of the differences within rounds.
    """

    positions: Positions
    tokens: Tokens
    seconds: dict[str, Times]
    speedup: dict[str, Speedup]
    overhead: float
    decode_tokens_per_second: float | None = None
    batch_decode_tokens_per_second: float | None = None
    samples_per_second: float | None = None
    largest_batch: LargestBatch | None = None
    memory: Memory
    flops: dict[str, float]
    flop_coverage: FlopCoverage | None = None
    gpu: GpuUse | None = None
    short: int = 0
    checked: Literal["ttft", "total"] = "ttft"
    outliers: list[int] = []
    drift: Drift | None = None
    score: float | None = None
    score_counts: Score | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    flips: Flips | None = None
    yes_no: YesNo | None = None
    paired: PairedAccuracy | None = None
    fidelity: Fidelity | None = None
    draft: DraftEffect | None = None
    groups: ResizeGroups | None = None
    saved: dict[str, float] = {}


class TurnResult(OfCase):
    """One turn of all conversations with a case under a policy for later turns.

    policy: None for the baseline. turn: from 1; None for all turns together, where seconds are those of a whole
    conversation, and tokens and bytes those of its last turn. conversations: how many have this turn. tokens: means, of
    the whole conversation up to the answer. seconds: by stage, one value for each conversation. speedup: paired within
    conversations. kv_cache, encoder_outputs: bytes, means; the latter are kept in memory for later turns.
    score: the mean over questions. retention: score / score of the baseline in the same turn, with bounds of a 95 %
    interval. same: share of answers identical to the baseline's.
    """

    policy: TurnPolicy | None
    turn: int | None
    conversations: int
    tokens: Tokens
    seconds: dict[str, Times]
    speedup: dict[str, Speedup]
    kv_cache: float
    encoder_outputs: float
    score: float | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    same: float | None = None


class TaskResult(OfCase):
    """One case on one task of lmms-eval.

    samples: how many answers were judged. metric: by which each answer was; score, retention (with bounds of a 95 %
    interval) and flips are of its mean, and None where the task has only metrics of all answers together. metrics: the
    task's own scores by metric, as lmms-eval computes them.
    """

    task: str
    samples: int
    metric: str | None
    score: float | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    flips: Flips | None = None
    metrics: dict[str, float] = {}


class FailedCase(OfCase):
    """A case that failed and has no result, or, among `unevaluated`, no quality.

    round: in which it failed, from 0; None for the warm-up and the evaluation.
    """

    round: int | None
    reason: FailureReason
    message: str


class Environment(Record):
    """Hardware, versions and settings of a measurement.

    weights_digest: of the model's weights, from a few values of each. quantization: how they were quantized. compiled:
    whether the language model was compiled. driver, cuda: versions, on an NVIDIA GPU. layers:
    decoder layers that were run, and those of the model, if only some were run; prefill, decode, KV cache and FLOPs are
    then estimates. fallback: what `mmtok profile` measured in place of the model as it is, and why. pixels: the
    resolution of images, as with --pixels: "native" or "fixed:2048"; None for models of fixed resolution.
    encoder_attention: the kernel of the vision encoder, if it is not `attention`.
    linear_layers: how many of the decoder layers that were run have linear attention, whose state has a fixed size.
    linear_reference: whether these ran in transformers' reference code, since there were no kernels for them.
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
    threads: Annotated[Number, Field(ge=1)]
    command: list[str]
    driver: str | None = None
    cuda: str | None = None
    weights_digest: str | None = None
    quantization: str | None = None
    compiled: bool = False
    layers: tuple[int, int] | None = None
    fallback: str | None = None
    pixels: str | None = None
    encoder_attention: str | None = None
    linear_layers: Annotated[Number, Field(ge=0)] = 0
    linear_reference: bool = False


class Schedule(Record):
    """What was run and in which order.

    order: order[round] lists the cases in the order in which they ran. seed: of the order, and of random methods unless
    their parameters set one. samples: number of samples that were evaluated, of `planned_samples`. timed: number of
    samples that the rounds cycle through. data_digest: of names, questions and answers. batch_size: a list if there are
    several. rounds: completed rounds. runs: repetitions of each case within a round. min_time: minimum seconds of
    timed runs. new_tokens, prompt_tokens: exact numbers of new tokens and of text tokens per prompt in timed runs, None
    where they were not fixed; evaluated answers are not affected. metric: name of the metric that judges the answers,
    None if they are not judged; metric_title: what it is, in words. conversations: number of them that were evaluated,
    of `planned_samples`; None without --turns. image_size: width and height in pixels of the one image of a profile.
    sampling: how many frames of a video were sampled, in words; None without videos.
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
    metric: str | None = None
    metric_title: str | None = None
    new_tokens: int | None = None
    prompt_tokens: int | None = None
    conversations: int | None = None
    image_size: tuple[int, int] | None = None
    sampling: str | None = None


class SamplePrediction(Record):
    """What one case answered to one sample: a line of `--export FILE.jsonl`.

    run: label of the run, if several are reported together. sample: its number in the data, from 0. id: its name in the
    data, if it has one. question, references (the reference answers) and id are null in runs of versions that did not
    record them. batch_size: of the evaluation. draft, draft_tokens, image_scale: as in a CaseId. baseline_prediction,
    baseline_score: of the unreduced model. kept, total: vision tokens. encoded: vision tokens of each image at the
    size at which it was encoded, if that is not its own. score: of this answer, by the metric; null without reference
    answers. flip: "lost" if only the unreduced model's answer is right, "gained" if only this one is,
    otherwise empty. kl, top1, same: closeness to the unreduced model, as in a Fidelity, of this sample alone (null for
    answers of a serving engine); a divergence that is not finite is a string.
    """

    schema_: Literal["mmtok.predictions/1"] = Field(default="mmtok.predictions/1", alias="schema")
    run: str | None
    sample: int
    id: str | None
    images: tuple[str, ...]
    kind: str | None
    question: str | None
    references: tuple[str, ...] | None
    method: str
    parameters: dict[str, Any]
    budget: str | None
    batch_size: int
    again: bool
    draft: str | None
    draft_tokens: int | None
    image_scale: float | str | None = None
    prediction: str
    baseline_prediction: str
    kept: int | None
    total: int | None
    encoded: list[int] | None = None
    score: float | None
    baseline_score: float | None
    flip: Literal["lost", "gained", ""]
    kl: float | None
    top1: float | None
    same: bool


class Comparison(Record):
    """What `mmtok compare --json` prints.

    results: for each batch size the unreduced baseline, unless it failed, then the other cases. planned_rounds: minimum
    number of rounds. unevaluated: cases that were timed but could not be evaluated. turns: for each case and policy its
    turns, then all of them together; empty without --turns. tasks: for each task of --tasks its cases. left_out: one
    line for each part of the data that could not be used. remarks: further lines about the results. machine: None where
    the system reports nothing, and for several runs. equivalents: budgets that are shares, as settings of serving
    engines.
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
    turns: list[TurnResult] = []
    tasks: list[TaskResult] = []
    left_out: list[str] = []
    remarks: list[str] = []
    machine: MachineUse | None = None
    equivalents: dict[str, dict[str, float]] = {}
