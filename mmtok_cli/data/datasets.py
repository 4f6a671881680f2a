"""Opening a dataset of any kind by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from mmtok_cli.data.hub import HubRows
from mmtok_cli.data.json_lines import POPE, JsonLines, is_pope
from mmtok_cli.data.pictures import SUFFIXES, is_pattern, pictures
from mmtok_cli.data.rows import Columns, require_columns
from mmtok_cli.data.samples import Sample, demo_samples
from mmtok_cli.errors import MMTokError

Metric = Literal["exact", "yes-no", "vqa"]

DEMO_QUESTIONS = 1200
KINDS = "demo, FILE.jsonl, pope:FILE, a folder of images, hub:NAME or hub:NAME:SPLIT"


@dataclass(frozen=True)
class Dataset:
    """Samples, whose images are read when they are needed, and what had to be left out.

    metric: how answers are scored, None without reference answers. missing: number of image files that do not exist;
    left_out: number of samples that need them. problems: a message for each line or row that could not be read.
    """

    name: str
    samples: Sequence[Sample]
    metric: Metric | None
    missing: int = 0
    left_out: int = 0
    problems: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What a reader of its scores should know, one line each."""
        notes = [f"left out: {problem}" for problem in self.problems]
        if self.missing:
            notes.append(
                f"{self.name}: image files missing: {self.missing}; samples left out because of that: {self.left_out}"
            )
        return notes


def open_dataset(
    text: str,
    *,
    image_root: Path | None = None,
    limit: int | None = None,
    question: str | None = None,
    columns: Columns | None = None,
) -> Dataset:
    """The dataset that `text` names; see KINDS.

    image_root: directory of the image files, by default that of the file that names them. limit: maximum number of
    samples. question: for images without one, or a template with `{question}` for their own. columns: field -> its name
    in the dataset, where the two differ.

    Raises MMTokError if there is no usable sample.
    """
    columns = columns or {}
    require_columns(columns)
    kind, _, rest = text.partition(":")
    if text == "demo":
        return _demo(limit, question, columns)
    if kind == "hub":
        rows = HubRows(rest, question=question, columns=columns)
        samples = _take(rows.samples(), limit)
        return Dataset(rest, samples, metric_of(samples), problems=tuple(rows.problems))
    path = Path(rest if kind == "pope" else text)
    if kind != "pope" and (path.is_dir() or is_pattern(text) or path.suffix.lower() in SUFFIXES):
        return Dataset(text, _take(pictures(text, question), limit), metric=None)
    if not path.is_file():
        raise MMTokError(f"there is no dataset {text!r}", f"name one of: {KINDS}")
    if kind == "pope" or (not columns and is_pope(path)):
        columns = {**POPE, **columns}
    lines = JsonLines(path, image_root=image_root, question=question, columns=columns)
    samples = _take(lines.samples(), limit)
    return Dataset(
        path.name, samples, metric_of(samples), len(lines.missing), lines.left_out, problems=tuple(lines.problems)
    )


def metric_of(samples: Sequence[Sample]) -> Metric | None:
    """The metric that suits the reference answers: VQA's soft accuracy if there are several for a question, POPE's
    scores if all are yes or no and both occur, exact match otherwise."""
    if any(sample.answers for sample in samples):
        return "vqa"
    known = {sample.answer.strip().lower() for sample in samples if sample.answer is not None}
    if known == {"yes", "no"}:
        return "yes-no"
    return "exact" if known else None


def _take(samples: Iterable[Sample], limit: int | None) -> tuple[Sample, ...]:
    return tuple(islice(samples, limit))


def _demo(limit: int | None, question: str | None, columns: Columns) -> Dataset:
    if question is not None or columns:
        raise MMTokError("the demo questions are fixed", "leave --question and --columns out")
    return Dataset("demo", demo_samples(min(limit or DEMO_QUESTIONS, DEMO_QUESTIONS)), "exact")
