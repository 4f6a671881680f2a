"""The registry of columns: what the terminal, Markdown, the CSV and the HTML page show of a case.

A new column takes two steps: compute its value in the summary of a case, and add one entry to `COLUMNS`. The order of
the entries is that of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mmtok_cli.report.cells import (
    Cell,
    Column,
    CsvColumn,
    Section,
    TableName,
    Value,
    draft_cell,
    encoded_cell,
    flips_cell,
    group_cell,
    kept_cell,
    largest_batch_cell,
    retention_cell,
    speedup_cell,
)
from mmtok_cli.report.units import count, number, p_value, rate, seconds, share, size
from mmtok_cli.stages import DECODE_VIDEO, DRAFT, PREVIEW

if TYPE_CHECKING:
    from mmtok_cli.results.schema import (
        CaseResult,
        Comparison,
        DraftEffect,
        Fidelity,
        Flips,
        GpuUse,
        PairedAccuracy,
        ResizeGroups,
        Score,
        Speedup,
        Times,
        YesNo,
    )

STAGES = ("prepare", "encode", "select", "prefill", "ttft", "decode", "total")  # ttft and total are sums of stages
COMPARED = (*(stage for stage in STAGES if stage != "select"), "tpot")  # the baseline selects nothing
OPTIONAL = (DECODE_VIDEO, DRAFT, PREVIEW)  # before them, in cases that have them


def stages_of(seconds: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The stages of several cases, each given by its seconds."""
    found = {stage for stages in seconds for stage in stages}
    return (*(stage for stage in OPTIONAL if stage in found), *STAGES)


class LayerCounts(Protocol):
    """Vision tokens of a sample, or their means over samples."""

    @property
    def kept(self) -> float: ...

    @property
    def layer_average(self) -> float: ...


def layers_differ(tokens: Iterable[LayerCounts]) -> bool:
    """Whether the tokens kept and their average over the decoder layers differ for any case."""
    return any(abs(each.layer_average - each.kept) > 0.05 for each in tokens)


def is_scored(comparison: Comparison) -> bool:
    """Whether reference answers are known; if not, quality is agreement with the unreduced model."""
    return any(case.score is not None for case in comparison.results)


def stage_seconds(case: CaseResult, stage: str) -> float | None:
    """Median seconds of a stage; None where it was not measured."""
    times = case.seconds.get(stage)
    return times.median if times else None


# When a column is shown.


def _scaled(comparison: Comparison) -> bool:
    return any(case.case.image_scale is not None for case in comparison.results)


def _not_scored(comparison: Comparison) -> bool:
    return not is_scored(comparison)


def _never(comparison: Comparison) -> bool:
    return False


def _several_batch_sizes(comparison: Comparison) -> bool:
    return isinstance(comparison.schedule.batch_size, list)


def _batched(comparison: Comparison) -> bool:
    return any(case.case.batch_size > 1 for case in comparison.results)


def _layer_average_differs(comparison: Comparison) -> bool:
    return layers_differ(case.tokens for case in comparison.results if case.seconds)


# Values of parts of a result, each None where the part is missing.


def _of_times(stage: str, value: Callable[[Times], float]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.seconds[stage]) if stage in case.seconds else None


def _of_speedup(stage: str, value: Callable[[Speedup], float | None]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.speedup[stage]) if stage in case.speedup else None


def _of_counts(value: Callable[[Score], float]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.score_counts) if case.score_counts else None


def _of_fidelity(value: Callable[[Fidelity], float | None]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.fidelity) if case.fidelity else None


def _of_flips(value: Callable[[Flips], float]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.flips) if case.flips else None


def _of_draft(value: Callable[[DraftEffect], float | None]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.draft) if case.draft else None


def _of_gpu(value: Callable[[GpuUse], float | None]) -> Callable[[CaseResult], Value]:
    return lambda case: value(case.gpu) if case.gpu else None


def _yes_no(name: str, heading: str, meaning: str, value: Callable[[YesNo], float]) -> Column:
    return Column(
        f"yes_no_{name}",
        meaning,
        lambda case: value(case.yes_no) if case.yes_no else None,
        heading=heading,
        show=share,
        table="yes-no",
    )


def _paired(
    name: str, heading: str, meaning: str, value: Callable[[PairedAccuracy], float], show: Callable[[Any], str] = share
) -> Column:
    return Column(
        f"paired_{name}",
        meaning,
        lambda case: value(case.paired) if case.paired else None,
        heading=heading,
        show=show,
        table="yes-no",
    )


def _group(
    name: str, meaning: str, counts: Callable[[ResizeGroups], tuple[int, int]]
) -> Iterator[CsvColumn[CaseResult]]:
    """The share of correct answers in a group of samples, and the size of the group."""

    def cell(case: CaseResult) -> Cell:
        return group_cell(*counts(case.groups)) if case.groups else Cell()

    yield Column(
        f"group_{name}",
        meaning,
        lambda case: cell(case).value,
        heading=f"group {name.upper()}",
        cell=cell,
        table="groups",
        section="quality",
    )
    yield CsvColumn(
        f"group_{name}_samples",
        f"samples in group {name.upper()}",
        lambda case: counts(case.groups)[1] if case.groups else None,
    )


def _stage(
    stage: str,
    words: str,
    heading: str = "",
    place: TableName | None = "speed",
    *,
    always: bool = True,
    shown: Callable[[Comparison], bool] | None = None,
) -> Iterator[CsvColumn[CaseResult]]:
    """Seconds of a stage and its speedup; stages without a heading are in the CSV only. place: the terminal's table."""
    table: TableName | None = place if heading else None
    section: Section | None = "cost" if heading else None
    name = stage.replace(" ", "_")
    yield Column(
        f"{name}_median_s",
        f"{words}, median",
        _of_times(stage, lambda times: times.median),
        always=bool(heading) and always and stage not in OPTIONAL,
        heading=heading,
        show=seconds,
        table=table,
        section=section,
        shown=shown,
    )
    yield CsvColumn(f"{name}_p10_s", f"{stage}, 10th percentile over rounds", _of_times(stage, lambda t: t.p10))
    yield CsvColumn(f"{name}_p90_s", f"{stage}, 90th percentile over rounds", _of_times(stage, lambda t: t.p90))
    if stage not in COMPARED:
        return
    yield Column(
        f"speedup_{stage}_median",
        "baseline / method, paired within rounds, 95 % interval",
        _of_speedup(stage, lambda speedup: speedup.median),
        always=bool(heading) and always,
        heading=f"speedup ({heading})",
        cell=lambda case: speedup_cell(case.speedup.get(stage)),
        table=table,
        section=section,
        shown=shown,
        narrow=True,
    )
    interval = f"95 % interval of the speedup of {stage}"
    yield CsvColumn(f"speedup_{stage}_low", f"{interval}, lower end", _of_speedup(stage, lambda speedup: speedup.low))
    yield CsvColumn(f"speedup_{stage}_high", f"{interval}, upper end", _of_speedup(stage, lambda speedup: speedup.high))


def _saved(stage: str, heading: str) -> Column:
    return Column(
        f"{stage}_saved_s",
        f"{stage} of the unreduced model - {stage} of the case, median of the differences within rounds",
        lambda case: case.saved.get(stage),
        heading=f"{heading} saved",
        show=lambda saved: f"{'-' * (saved < 0)}{seconds(abs(saved))}",
        table="scale",
        section="cost",
        shown=_scaled,
        narrow=True,
    )


# The columns that other modules need by name.

BATCH = Column(
    "",
    "samples in a batch",
    lambda case: case.case.batch_size,
    heading="batch",
    section="cost",
    shown=_several_batch_sizes,
)
KEPT = Column(
    "kept_tokens",
    "vision tokens after the last reduction, of those of the image",
    lambda case: case.tokens.kept,
    always=True,
    heading="kept",
    cell=kept_cell,
    section="cost",
)

# All columns.

COLUMNS: tuple[CsvColumn[CaseResult], ...] = (
    BATCH,
    KEPT,
    CsvColumn("total_tokens", "vision tokens of the image", lambda case: case.tokens.total, always=True),
    Column(
        "encoded_tokens",
        "vision tokens that the encoder made of the images, of those at their own size",
        lambda case: case.tokens.total if case.tokens.encoded is None else case.tokens.encoded,
        heading="encoded",
        cell=encoded_cell,
        table="scale",
        section="cost",
        shown=_scaled,
    ),
    Column(
        "layer_average_tokens",
        "vision tokens per decoder layer, on average",
        lambda case: case.tokens.layer_average,
        heading="avg",
        show=lambda tokens: number(round(tokens, 1)),
        table="cost",
        section="cost",
        shown=_layer_average_differs,
    ),
    CsvColumn("text_tokens", "text tokens of the prompt", lambda case: case.tokens.text, always=True),
    CsvColumn(
        "new_tokens", "tokens decoded, of the longest answer of a batch", lambda case: case.tokens.new, always=True
    ),
    # Seconds and speedups, stage by stage.
    *_stage(DECODE_VIDEO, "decoding videos", "video"),
    *_stage(DRAFT, "writing a first answer that the method reads", "draft"),
    *_stage(PREVIEW, "looking at images, whose detail decides their size", "preview", "scale"),
    *_stage("prepare", "image processing and tokenisation"),
    *_stage("encode", "vision encoder and projector", "encode", None, always=False, shown=_scaled),
    *_stage("select", "selecting tokens and assembling the shorter prompt", "select"),
    CsvColumn("select_overhead", "select / (encode + prefill), median", lambda case: case.overhead),
    *_stage("prefill", "processing the prompt in the language model", "prefill"),
    *_stage("ttft", "time to first token: all stages before decode", "TTFT"),
    *(_saved(stage, heading) for stage, heading in (("encode", "encode"), ("prefill", "prefill"), ("ttft", "TTFT"))),
    *_stage("decode", "generating all tokens after the first"),
    *_stage("tpot", "time per output token: decode, per token after the first", "TPOT", "throughput", always=False),
    Column(
        "decode_tokens_per_s",
        "tokens decoded per second and sample after the first, median",
        lambda case: case.decode_tokens_per_second,
        heading="decode tok/s",
        show=rate,
        table="throughput",
        section="cost",
        narrow=True,
    ),
    Column(
        "batch_decode_tokens_per_s",
        "tokens decoded per second after the first by a whole batch, without padding, median",
        lambda case: case.batch_decode_tokens_per_second,
        heading="batch tok/s",
        show=rate,
        table="throughput",
        section="cost",
        shown=_batched,
        narrow=True,
    ),
    Column(
        "samples_per_s",
        "samples per second, all stages, median",
        lambda case: case.samples_per_second,
        heading="samples/s",
        show=rate,
        table="throughput",
        section="cost",
    ),
    Column(
        "largest_batch",
        "largest batch that fits into memory",
        lambda case: case.largest_batch.size if case.largest_batch else None,
        heading="largest batch",
        cell=largest_batch_cell,
        table="throughput",
        section="cost",
        narrow=True,
    ),
    CsvColumn(
        "largest_batch_measured",
        "whether the largest batch was run; otherwise it is computed",
        lambda case: case.largest_batch.measured if case.largest_batch else None,
    ),
    *_stage("total", "all stages"),
    # Quality.
    Column(
        "score",
        "score by the metric of the data: the mean over samples, F1 for POPE, accuracies of answers and pairs for MME",
        lambda case: case.score,
        heading="score",
        show=share,
        table="quality",
        section="quality",
        shown=is_scored,
    ),
    CsvColumn("score_right", "sum of scores", _of_counts(lambda counts: counts.right)),
    CsvColumn(
        "score_asked",
        "samples with a reference answer",
        _of_counts(lambda counts: counts.asked),
    ),
    Column(
        "retention",
        "score / score of the unreduced model, 95 % interval over images",
        lambda case: case.retention,
        heading="retention",
        cell=retention_cell,
        table="quality",
        section="quality",
        shown=is_scored,
    ),
    CsvColumn("retention_low", "retention, lower end of the 95 % interval", lambda case: case.retention_low),
    CsvColumn("retention_high", "retention, upper end of the 95 % interval", lambda case: case.retention_high),
    Column(
        "",
        "samples answered correctly by the unreduced model only, and by the reduced model only",
        _of_flips(lambda flips: flips.right_wrong - flips.wrong_right),
        heading="lost / gained",
        cell=flips_cell,
        section="quality",
        shown=is_scored,
        in_markdown=_never,
    ),
    CsvColumn("flips_right_right", "samples both answer correctly", _of_flips(lambda flips: flips.right_right)),
    Column(
        "flips_right_wrong",
        "lost: samples that only the unreduced model answers correctly",
        _of_flips(lambda flips: flips.right_wrong),
        heading="lost",
        table="quality",
        shown=is_scored,
    ),
    Column(
        "flips_wrong_right",
        "gained: samples that only the reduced model answers correctly",
        _of_flips(lambda flips: flips.wrong_right),
        heading="gained",
        table="quality",
        shown=is_scored,
    ),
    CsvColumn("flips_wrong_wrong", "samples neither answers correctly", _of_flips(lambda flips: flips.wrong_wrong)),
    Column(
        "flips_p_value",
        "probability of a difference this large by chance (McNemar's exact test of lost and gained)",
        _of_flips(lambda flips: flips.p_value),
        heading="p",
        show=p_value,
        table="quality",
        section="quality",
        shown=is_scored,
        in_markdown=_never,
    ),
    *_group(
        "a",
        "correct answers to samples that the unreduced model answers correctly and resize at the same budget does not",
        lambda groups: (groups.a_right, groups.a_samples),
    ),
    *_group(
        "b",
        "correct answers to samples that both the unreduced model and resize at the same budget answer correctly",
        lambda groups: (groups.b_right, groups.b_samples),
    ),
    Column(
        "draft_points",
        "score with the draft - score without it, in points, 95 % interval",
        _of_draft(lambda draft: draft.points),
        heading="by draft",
        cell=draft_cell,
        section="quality",
    ),
    CsvColumn("draft_points_low", "difference by the draft, lower end", _of_draft(lambda draft: draft.low)),
    CsvColumn("draft_points_high", "difference by the draft, upper end", _of_draft(lambda draft: draft.high)),
    CsvColumn("draft_gained", "samples answered correctly only with the draft", _of_draft(lambda draft: draft.gained)),
    CsvColumn("draft_lost", "samples answered correctly only without it", _of_draft(lambda draft: draft.lost)),
    CsvColumn(
        "draft_ttft_ratio",
        "time to first token with the draft / without it",
        _of_draft(lambda draft: draft.slowdown.median if draft.slowdown else None),
    ),
    _yes_no("accuracy", "accuracy", "share of correct answers", lambda scores: scores.accuracy),
    _yes_no("precision", "precision", "share of the answers yes that are correct", lambda scores: scores.precision),
    _yes_no(
        "recall", "recall", "share of the questions with answer yes that are answered yes", lambda scores: scores.recall
    ),
    _yes_no("f1", "F1", "harmonic mean of precision and recall", lambda scores: scores.f1),
    _yes_no("yes_ratio", "says yes", "share of the answers that are yes", lambda scores: scores.yes_ratio),
    _paired(
        "accuracy", "acc", "share of correct answers, mean over kinds of questions", lambda scores: scores.accuracy
    ),
    _paired(
        "accuracy_plus",
        "acc+",
        "share of images whose two questions are answered correctly, mean over kinds of questions",
        lambda scores: scores.accuracy_plus,
    ),
    _paired(
        "points",
        "MME",
        "sum of 100 x (acc + acc+) over kinds of questions",
        lambda scores: scores.points,
        "{:.1f}".format,
    ),
    Column(
        "same",
        "share of answers identical to the unreduced model's",
        _of_fidelity(lambda fidelity: fidelity.same),
        heading="same",
        show=share,
        table="cost",
        section="quality",
        in_markdown=_not_scored,
    ),
    Column(
        "top1",
        "agreement with the unreduced model on the most likely token, over the tokens of its answer",
        _of_fidelity(lambda fidelity: fidelity.top1),
        heading="top-1",
        show=share,
        table="cost",
        section="quality",
        in_markdown=_not_scored,
    ),
    Column(
        "kl_nats",
        "KL divergence from the unreduced model over the tokens of its answer, in nats",
        _of_fidelity(lambda fidelity: fidelity.kl),
        heading="KL",
        show="{:.3f}".format,
        table="cost",
        section="quality",
        in_markdown=_not_scored,
    ),
    # Memory, operations, energy.
    Column(
        "kv_cache_bytes",
        "KV cache, bytes per sample",
        lambda case: case.memory.kv_cache,
        always=True,
        heading="KV cache",
        show=size,
        table="cost",
        section="cost",
    ),
    Column(
        "peak_bytes",
        "peak memory of a batch above the weights, in bytes",
        lambda case: case.memory.peak,
        heading="peak",
        show=size,
        table="cost",
        section="cost",
        in_markdown=_never,
    ),
    CsvColumn(
        "reserved_bytes",
        "most memory held by the device's allocator, weights included",
        lambda case: case.memory.reserved,
    ),
    Column(
        "total_flops",
        "FLOPs per sample, all stages",
        lambda case: case.flops.get("total"),
        always=True,
        heading="FLOPs",
        show=count,
        table="cost",
        section="cost",
        in_markdown=_never,
    ),
    CsvColumn("gpu_joules", "energy per sample of the whole card, in joules", _of_gpu(lambda gpu: gpu.joules)),
    CsvColumn("gpu_clock_mhz", "clock of the GPU after the runs, median", _of_gpu(lambda gpu: gpu.clock)),
    CsvColumn(
        "gpu_throttled_rounds",
        "rounds in which the GPU throttled, the sum over reasons",
        _of_gpu(lambda gpu: sum(gpu.throttled.values())),
    ),
    CsvColumn("gpu_other_processes", "most processes of others on the GPU", _of_gpu(lambda gpu: gpu.other_processes)),
    CsvColumn("positions", "position ids of kept tokens: keep or renumber", lambda case: case.positions),
)


def terminal_columns(comparison: Comparison, table: TableName) -> list[Column]:
    """The columns of one table of the terminal; empty if the comparison has nothing for it."""
    return [column for column in _shown(comparison) if column.table == table]


def section_columns(comparison: Comparison, section: Section) -> list[Column]:
    """The columns of one section of the HTML page."""
    return [column for column in _shown(comparison) if column.section == section]


def markdown_columns(comparison: Comparison) -> list[Column]:
    """The columns of the one table in Markdown."""
    columns = [*section_columns(comparison, "cost"), *section_columns(comparison, "quality")]
    return [column for column in columns if column.in_markdown(comparison)]


def _shown(comparison: Comparison) -> list[Column]:
    return [column for column in COLUMNS if isinstance(column, Column) and column.is_shown(comparison)]


def kind_columns(comparison: Comparison) -> list[Column]:
    """Score by kind of question, where there are several kinds; not in the CSV, since kinds depend on the data."""
    counts = next((case.score_counts for case in comparison.results if case.score_counts), None)
    if counts is None or len(counts.by_kind) < 2:
        return []
    return [
        Column("", f"mean score of {asked} questions", _kind_share(kind), heading=kind, show=share)
        for kind, (_, asked) in counts.by_kind.items()
    ]


def _kind_share(kind: str) -> Callable[[CaseResult], float | None]:
    def value(case: CaseResult) -> float | None:
        right, asked = case.score_counts.by_kind.get(kind, (0, 0)) if case.score_counts else (0, 0)
        return right / asked if asked else None

    return value
