"""A comparison as CSV: one row for each case, columns with stable names and units."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtok_cli.report.cells import CsvColumn, Source, Value
from mmtok_cli.report.columns import COLUMNS
from mmtok_cli.report.text import printable_record
from mmtok_cli.report.turns import TURN_COLUMNS
from mmtok_cli.report.units import picture_size

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseId, Comparison, FailedCase

FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")  # full-width signs count as well where they are typed

# Which case it is, also for cases that failed.

IDENTITY: tuple[CsvColumn[CaseId], ...] = (
    CsvColumn("method", "name of the method", lambda case: case.method, always=True),
    CsvColumn("again", "the baseline measured a second time, as a noise check", lambda case: case.again or None),
    CsvColumn("run", "label of the run, where several runs are merged", lambda case: case.run),
    CsvColumn(
        "parameters", "of the method, as JSON", lambda case: json.dumps(case.parameters, default=str), always=True
    ),
    CsvColumn(
        "budget", "vision tokens to keep, as given; empty for methods without one", lambda c: c.budget, always=True
    ),
    CsvColumn("draft", "first answer that the method reads: self, a model or a text", lambda case: case.draft),
    CsvColumn(
        "image_scale", "factor on both sides of the images, or auto; empty at their own size", lambda c: c.image_scale
    ),
    CsvColumn("batch_size", "samples in a batch", lambda case: case.batch_size, always=True),
)

# Why a case has no measurements.

FAILURE: tuple[CsvColumn[FailedCase], ...] = (
    CsvColumn("failure_reason", "why the case has no measurements", lambda failed: failed.reason),
    CsvColumn("failure_message", "the error message", lambda failed: failed.message),
    CsvColumn("failure_round", "round of the failure, from 0; empty: during warm-up", lambda failed: failed.round),
)

# What everything was measured on and how, so that rows of several files can be put together.

CONTEXT: tuple[CsvColumn[Comparison], ...] = (
    CsvColumn("model", "name of the model", lambda c: c.model, always=True),
    CsvColumn("data", "dataset", lambda c: c.schedule.data, always=True),
    CsvColumn("image_size", "width and height of the image in pixels", lambda c: picture_size(c.schedule.image_size)),
    CsvColumn(
        "pixels", "resolution of images: native, or fixed and a number of tokens", lambda c: c.environment.pixels
    ),
    CsvColumn("sampling", "how many frames of each video were sampled", lambda c: c.schedule.sampling),
    CsvColumn("samples", "samples that were evaluated", lambda c: c.schedule.samples, always=True),
    CsvColumn("metric", "metric that judges the answers", lambda c: c.schedule.metric, always=True),
    CsvColumn("rounds", "timed rounds over all cases", lambda c: c.schedule.rounds, always=True),
    CsvColumn("seed", "random seed", lambda c: c.schedule.seed, always=True),
    CsvColumn("max_new_tokens", "maximum number of new tokens", lambda c: c.schedule.max_new_tokens, always=True),
    CsvColumn(
        "exact_new_tokens", "new tokens of timed runs, if their number was fixed", lambda c: c.schedule.new_tokens
    ),
    CsvColumn(
        "prompt_tokens", "text tokens of timed prompts, if their number was fixed", lambda c: c.schedule.prompt_tokens
    ),
    CsvColumn("track", "rules: released or harmonised", lambda c: c.rules.track, always=True),
    CsvColumn(
        "budget_means", "what a budget counts: final or layer-average", lambda c: c.rules.budget_means, always=True
    ),
    CsvColumn(
        "budget_per",
        "frame, where budgets are spread over the frames of videos",
        lambda c: None if c.rules.budget_per == "image" else c.rules.budget_per,
    ),
    CsvColumn("processor", "name of the GPU or CPU", lambda c: c.environment.processor, always=True),
    CsvColumn("device", "torch device", lambda c: c.environment.device, always=True),
    CsvColumn("dtype", "data type of the weights", lambda c: c.environment.dtype, always=True),
    CsvColumn("attention", "attention implementation", lambda c: c.environment.attention, always=True),
    CsvColumn(
        "encoder_attention",
        "attention implementation of the vision encoder, if it is another",
        lambda c: c.environment.encoder_attention,
    ),
    CsvColumn("quantization", "how the weights were quantized", lambda c: c.environment.quantization),
    CsvColumn(
        "compiled", "whether the language model was compiled", lambda c: True if c.environment.compiled else None
    ),
    CsvColumn("weights", "pretrained or random", lambda c: c.environment.weights, always=True),
    CsvColumn(
        "layers_run",
        "decoder layers that were run, if not all: prefill, decode, KV cache and FLOPs are estimates",
        lambda c: c.environment.layers[0] if c.environment.layers else None,
    ),
    CsvColumn(
        "fallback", "what was measured in place of the model as it is, and why", lambda c: c.environment.fallback
    ),
    CsvColumn("torch", "version of torch", lambda c: c.environment.torch, always=True),
    CsvColumn("transformers", "version of transformers", lambda c: c.environment.transformers, always=True),
    CsvColumn("mmtok", "version of mmtok", lambda c: c.environment.mmtok, always=True),
)

CSV_COLUMNS: tuple[CsvColumn[Any], ...] = (
    *IDENTITY,
    *(column for column in TURN_COLUMNS if column.name not in {other.name for other in COLUMNS}),
    *(column for column in COLUMNS if column.name),
    *FAILURE,
    *CONTEXT,
)


def csv_text(comparison: Comparison) -> str:
    """One row for each case, failed ones last, then one for each turn of conversations. Columns without a value in any
    row are left out.

    Raw values and scores by kind of question are in the JSON only. A text that a spreadsheet would take for a formula
    begins with an apostrophe.
    """
    comparison = printable_record(comparison)
    context = _values(CONTEXT, comparison)
    rows = [
        _values(IDENTITY, case.case) | (_values(COLUMNS, case) if case.seconds else {}) | context
        for case in comparison.results
    ]
    rows += [_values(IDENTITY, failed.case) | _values(FAILURE, failed) | context for failed in comparison.failures]
    rows += [_values(IDENTITY, result.case) | _values(TURN_COLUMNS, result) | context for result in comparison.turns]
    names = [column.name for column in CSV_COLUMNS if column.always or _has_values(column.name, rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _values(columns: Sequence[CsvColumn[Source]], source: Source) -> dict[str, Value]:
    return {column.name: without_formula(column.value(source)) for column in columns if column.name}


def without_formula(value: Value) -> Value:
    """A value that a spreadsheet shows as it is; numbers are never formulas."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _has_values(name: str, rows: Sequence[Mapping[str, Value]]) -> bool:
    return any(row.get(name) is not None for row in rows)


def csv_documentation() -> str:
    """The columns of the CSV with their meanings, as a Markdown table."""
    lines = [f"| `{column.name}` | {column.meaning} |" for column in CSV_COLUMNS]
    return "\n".join(["| column | meaning |", "| --- | --- |", *lines])
