"""Opening a dataset of any kind by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mmtok_cli.data.data_files import DataFile, entries_of, vqav2_file_entries
from mmtok_cli.data.hub import HubRows
from mmtok_cli.data.images import require_file
from mmtok_cli.data.layouts import POPE, VQAV2, Layout, MetricName
from mmtok_cli.data.names import parse_name
from mmtok_cli.data.pictures import SUFFIXES, is_pattern, pictures
from mmtok_cli.data.rows import Columns, require_columns
from mmtok_cli.data.samples import Sample, demo_conversations, demo_dense, demo_samples
from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.video import USUAL_SAMPLING, Sampling

DEMO_QUESTIONS, DEMO_CONVERSATIONS = 1200, 400
KINDS = (
    "demo, demo:dense, demo:conversations, a .jsonl, .json, .csv or .tsv file, pope:FILE, "
    "vqav2:QUESTIONS,ANNOTATIONS, a folder of images, hub:NAME or hub:NAME:SPLIT"
)


@dataclass(frozen=True)
class Dataset:
    """Samples, whose images are read when they are needed, and what had to be left out.

    metric: how answers are judged unless the user says otherwise: that of the format, or the one that suits the fields
    of the dataset, whatever part of it is taken; None without reference answers. missing: number of image files that do
    not exist; left_out: number of samples that need them. problems: a message for each line, row or file that could not
    be used. Neither counts what comes after the last sample where the number of samples is limited.
    """

    name: str
    samples: Sequence[Sample]
    metric: MetricName | None
    missing: int = 0
    left_out: int = 0
    problems: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What could not be used, one line each."""
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
    find_metric: bool = True,
    sampling: Sampling = USUAL_SAMPLING,
) -> Dataset:
    """The dataset that `text` names; see KINDS.

    image_root: directory of the image files, by default that of the file that names them. limit: maximum number of
    samples. question: for images without one, or a template with `{question}` for their own. columns: field -> its name
    in the dataset, where the two differ. find_metric: find out the metric, which may take
    reading more than the limit; without it, the metric is None. sampling: of the frames of videos.

    Raises MMTokError if there is no usable sample.
    """
    columns = columns or {}
    require_columns(columns)
    try:
        return _opened(text, image_root, limit, question, columns, find_metric, sampling)
    except OSError as error:  # such as a name that is too long, or a directory that may not be searched
        raise MMTokError(
            f"the dataset {text} cannot be read: {error.strerror or first_line(error)}", "check its path"
        ) from error


def _opened(
    text: str,
    image_root: Path | None,
    limit: int | None,
    question: str | None,
    columns: Columns,
    find_metric: bool,
    sampling: Sampling,
) -> Dataset:
    name = parse_name(text)
    if name.kind == "demo":
        return _demo(name.selectors, limit, question, columns)
    if name.kind == "hub":
        rows = HubRows(name, question=question, columns=columns)
        samples = _take(rows.samples(), limit)
        metric = rows.usual_metric() if find_metric else None
        return Dataset(rows.name, samples, metric, problems=tuple(rows.problems))
    path = name.paths[0]
    layout: Layout | None = None
    if name.kind == "vqav2":
        entries = vqav2_file_entries(*name.paths)
        layout = VQAV2
    elif name.kind == "path" and _holds_images(text):
        images, problems = pictures(text, question, limit)
        return Dataset(text, images, metric=None, problems=tuple(problems))
    else:
        _require_data(path, text)
        entries = entries_of(path)
        layout = POPE if name.kind == "pope" else None
    file = DataFile(
        path, entries, image_root=image_root, question=question, columns=columns, layout=layout, sampling=sampling
    )
    found = file.read(limit, find_metric=find_metric)
    return Dataset(path.name, found, file.metric, len(file.missing), file.left_out, tuple(file.problems))


def _holds_images(text: str) -> bool:
    """Whether a name is that of a folder, an image, or several images by a pattern."""
    path = Path(text)
    return path.is_dir() or path.suffix.lower() in SUFFIXES or (is_pattern(text) and not path.is_file())


def _require_data(path: Path, text: str) -> None:
    """Raises MMTokError for a file that does not exist. A name with a suffix or a folder is meant to be a file."""
    if not (path.suffix or len(path.parts) > 1 or path.is_file()):
        raise MMTokError(f"there is no dataset {text!r}", f"name one of: {KINDS}")
    require_file(path)


def _take(samples: Iterable[Sample], limit: int | None) -> tuple[Sample, ...]:
    return tuple(islice(samples, limit))


def _demo(selectors: Sequence[str], limit: int | None, question: str | None, columns: Columns) -> Dataset:
    if question is not None or columns:
        raise MMTokError("the demo questions are fixed", "leave --question and --columns out")
    if selectors == ("dense",):
        return Dataset("demo:dense", demo_dense(min(limit or DEMO_QUESTIONS, DEMO_QUESTIONS)), "exact")
    if selectors:
        conversations = demo_conversations(min(limit or DEMO_CONVERSATIONS, DEMO_CONVERSATIONS))
        return Dataset("demo:conversations", conversations, "exact")
    return Dataset("demo", demo_samples(min(limit or DEMO_QUESTIONS, DEMO_QUESTIONS)), "exact")
