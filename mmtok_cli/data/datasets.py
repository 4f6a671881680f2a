"""One entry to all kinds of datasets."""

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
    """Samples whose images are read when they are looked at, and what of the source could not be used.

    metric: how answers are scored, None where none is known. missing: image files that are not there, with `left_out`
    samples about them. problems: one line for each line or row that could not be read.
    """

    name: str
    samples: Sequence[Sample]
    metric: Metric | None
    missing: int = 0
    left_out: int = 0
    problems: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What somebody must know who reads a score of this dataset, a line each."""
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

    image_root: where image files lie, by default beside the file that names them. limit: how many samples at most.
    question: what to ask of images that come without, or a frame around their own, which takes the place of
    `{question}`. columns: field -> its name in the dataset, where that is another.

    Raises MMTokError where nothing can be asked.
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
    """What the known answers ask for: soft accuracy where several people answered, POPE's scores where every answer is
    yes or no and both occur, exact matches otherwise."""
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
    return Dataset("demo", demo_samples(DEMO_QUESTIONS if limit is None else limit), "exact")
