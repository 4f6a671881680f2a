"""Samples of a data file of any format, and what had to be left out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from statistics import median_low
from typing import Any

from pydantic import ValidationError, ValidationInfo, field_validator

from mmtok_cli.data.base64_images import decoded, image_name, is_base64
from mmtok_cli.data.images import open_image, require_file
from mmtok_cli.data.json_files import HINT, Entries, document_entries, document_of, line_entries, read_json
from mmtok_cli.data.layouts import Layout, MetricName, layout_of
from mmtok_cli.data.rows import (
    Columns,
    Row,
    fault_of,
    fields_of,
    later_rows,
    make_sample,
    plain_text,
    require_names,
    shown_names,
    turn_fields,
)
from mmtok_cli.data.samples import Sample, visual_name
from mmtok_cli.data.tables import SUFFIXES, StoredImage, table_entries
from mmtok_cli.data.videos import open_video
from mmtok_cli.data.vqav2 import is_vqav2, vqav2_entries
from mmtok_cli.errors import MMTokError
from mmtok_cli.video import USUAL_SAMPLING, Sampling, Visual

ANSWERS = {"answer", "answers", "choices"}  # fields that decide the metric
SEVERAL = 3  # reference answers from which on VQA accuracy is the usual metric
TABLE_HINT = "name the columns image, question and, if known, answer in the first row"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class FileRow(Row):
    """A row whose images are file names, base64 texts or cells of a table: one or a list of them.

    video: names of video files or of folders with frames, which come after the images.
    """

    video: tuple[str, ...] = ()
    image: tuple[Any, ...]

    @field_validator("image", "video", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("video")
    @classmethod
    def _named_video(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("name a video file or a folder of frames")
        return value

    @field_validator("image")
    @classmethod
    def _named(cls, value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        nothing = not value and not info.data.get("video")
        if nothing or not all(isinstance(image, str | StoredImage) and image for image in value):
            raise ValueError("name an image file")
        return value


class UsualMetric:
    """The metric that suits the fields of a whole dataset, whatever part of it is evaluated.

    What most of the answered samples have decides. Choices: multiple choice. Lists of answers: VQA accuracy, or ANLS if
    at least half of them are shorter than SEVERAL. One answer: exact match.
    """

    def __init__(self) -> None:
        self._choices = self._single = 0
        self._several: list[int] = []

    def add(self, fields: Mapping[str, Any]) -> None:
        """Count in the fields of one sample."""
        several = fields.get("answers") or fields.get("answer")
        is_list = isinstance(several, list | tuple)
        if not is_list and plain_text(several) in (None, ""):
            return
        if fields.get("choices"):
            self._choices += 1
        elif isinstance(several, list | tuple):
            self._several.append(len(several))
        else:
            self._single += 1

    @property
    def name(self) -> MetricName | None:
        most = max(self._choices, len(self._several), self._single)
        if not most:
            return None
        if self._choices == most:
            return "choice"
        if self._single == most:
            return "exact"
        return "textvqa" if median_low(self._several) >= SEVERAL else "anls"


class DataFile:
    """Reads the samples of a file.

    After `read`, missing: image files that do not exist; left_out: number of samples that need them; problems: a
    message for each unusable row. All three are about the rows that were looked at until there were enough samples.
    metric: that of the format, or the one that suits the fields of the whole file; None if it was not to be found.
    """

    def __init__(
        self,
        path: Path,
        entries: Entries,
        *,
        image_root: Path | None,
        question: str | None,
        columns: Columns,
        layout: Layout | None = None,
        sampling: Sampling = USUAL_SAMPLING,
    ) -> None:
        self.problems: list[str] = []
        self.missing: set[Path] = set()
        self.left_out = 0
        self.metric: MetricName | None = None
        self.path = path
        self._entries = entries
        self._root = image_root or path.parent
        self._question = question
        self._columns = columns
        self._layout = layout
        self._sampling = sampling
        self._there = cache(Path.is_file)

    def read(self, limit: int | None = None, *, find_metric: bool = True) -> list[Sample]:
        """The first samples, at most `limit`, whose rows are usable and whose images exist.

        find_metric: find out the metric as well, for which all rows are read unless the format decides it. Raises
        MMTokError if there is no usable sample.
        """
        samples: list[Sample] = []
        usual = UsualMetric()
        hint = ""
        with closing(self._entries) as entries:
            for number, (place, raw) in enumerate(entries, start=1):
                wanted = limit is None or len(samples) < limit
                if not wanted and (not find_metric or (self._official and usual.name)):
                    break
                try:
                    if isinstance(raw, MMTokError):
                        raise raw
                    turns = turn_fields(self._fields(raw))
                    for fields in turns:
                        usual.add(fields)
                    if wanted and (sample := self._sample(raw, turns, number, f"{self.path}, {place}")):
                        samples.append(sample)
                except MMTokError as error:
                    if wanted:
                        self.problems.append(f"{self.path}, {place}: {error.message}")
                        hint = hint or error.hint
        if not samples:
            raise self._nothing(hint or (TABLE_HINT if self.path.suffix.lower() in SUFFIXES else HINT))
        if find_metric:
            self.metric = usual.name and (self._official or usual.name)  # None where no answer is known
        return samples

    @property
    def _official(self) -> MetricName | None:
        """The metric of the format, unless the user says where the answers are."""
        return self._layout.metric if self._layout and not self._columns.keys() & ANSWERS else None

    def _fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a row in this file's format, which the first row shows."""
        if self._layout is None:
            self._layout = layout_of(raw)
        require_names(raw, sorted(self._layout.needs))
        columns = {**self._layout.columns, **self._columns}
        return fields_of(self._layout.convert(raw), columns)

    def _sample(
        self, raw: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], number: int, place: str
    ) -> Sample | None:
        """The sample of a row; None if one of its images does not exist. turns: the row's fields, one for each."""
        fields = turns[0]
        if "video" in fields:
            fields = {"image": ()} | dict(fields)
        try:
            row, later = FileRow.model_validate(fields), later_rows(turns)
        except ValidationError as error:
            hint = (
                f"its columns are {shown_names(raw)}: name the right one, as in --columns image=NAME"
                if "image" not in fields
                else ""
            )
            raise MMTokError(fault_of(error), hint) from error
        sources = [*(self._source(image, place) for image in row.image), *map(self._video, row.video)]
        readers, names = zip(*sources, strict=True)
        sample = make_sample(row, readers, names, self._question, number, place, later)
        files = [self._root / image for image in row.image if isinstance(image, str) and not is_base64(image)]
        absent = [file for file in files if not self._exists(file)]
        videos = [self._root / name for name in row.video]
        absent += [path for path in videos if not self._exists(path) and not path.is_dir()]
        if absent:
            self.missing.update(absent)
            self.left_out += 1
            return None
        return sample

    def _source(self, image: str | StoredImage, place: str) -> tuple[Callable[[], Visual], str]:
        """How an image is read, and its name."""
        if isinstance(image, StoredImage):
            return image.open, image.name
        if is_base64(image):
            return partial(decoded, image, f"{place}, image"), image_name(image)
        return partial(open_image, self._root / image), image

    def _video(self, name: str) -> tuple[Callable[[], Visual], str]:
        """How a video is read, and its name."""
        path = self._root / name
        return partial(open_video, path, self._sampling), visual_name(name, self._sampling, path)

    def _exists(self, file: Path) -> bool:
        try:
            return self._there(file)
        except OSError as error:
            raise MMTokError(f"image: {error.strerror}", "name an image file") from error

    def _nothing(self, hint: str) -> MMTokError:
        """Why there is no sample."""
        if self.missing:
            return MMTokError(
                f"none of the {len(self.missing)} images named in {self.path} exists in {self._root}",
                "set their directory with --image-root",
            )
        if self.problems:
            return MMTokError(self.problems[0], hint)
        return MMTokError(f"{self.path} is empty", hint)


def entries_of(path: Path) -> Entries:
    """The rows of a JSON, CSV or TSV file. Raises MMTokError for a file that is none or cannot be read."""
    require_utf8(path)
    if path.suffix.lower() in SUFFIXES:
        return table_entries(path)
    document = document_of(path)
    if document is None:
        return line_entries(path)
    return vqav2_entries(document, path, None) if is_vqav2(document) else document_entries(path, document)


def vqav2_file_entries(questions: Path, annotations: Path | None = None) -> Entries:
    """The rows of a question file. Raises MMTokError for files that do not exist or are not of this format."""
    for path in filter(None, (questions, annotations)):
        require_file(path)
        require_utf8(path)
    return vqav2_entries(read_json(questions), questions, annotations)


def require_utf8(path: Path) -> None:
    """Raises MMTokError for a file in UTF-16."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    if start in UTF_16 or b"\0" in start:
        raise MMTokError(f"{path} is UTF-16, and data files are UTF-8", "save it as UTF-8")
