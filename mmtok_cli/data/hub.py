"""Datasets from the hub or saved on disk, read with the `datasets` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image
from pydantic import ValidationError

from mmtok_cli.data.data_files import UsualMetric
from mmtok_cli.data.images import open_image
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.names import DataName
from mmtok_cli.data.rows import Columns, Row, fault_of, fields_of, later_rows, make_sample, turn_fields
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError

ROWS_FOR_METRIC = 1000


class HubRows:
    """Reads a dataset on the hub or in a directory row by row.

    problems: a message for each unusable row that was read. Raises MMTokError if the dataset cannot be loaded or lacks
    a column.
    """

    def __init__(self, name: DataName, *, question: str | None, columns: Columns) -> None:
        self.problems: list[str] = []
        self.name = ":".join((*name.names, *name.selectors))
        self._question = question
        self._columns = columns
        self._table, self._images = _with_images(_load(name), columns.get("image", "image"), self.name)

    def samples(self) -> Iterator[Sample]:
        """The usable rows. Raises MMTokError if there are none."""
        column = self._columns.get("image", "image")
        found, hint = False, "check the columns"
        for number, raw in enumerate(self._table):
            try:
                turns = turn_fields(fields_of(raw | {column: None}, self._columns))
                row, later = Row.model_validate(turns[0]), later_rows(turns)
                reader = partial(_read, self._images, number, column, self.name)
                names = [_image_name(self._images[number][column], number)]
                sample = make_sample(row, [reader], names, self._question, number, f"{self.name}, row {number}", later)
            except (MMTokError, ValidationError) as error:
                fault = fault_of(error) if isinstance(error, ValidationError) else error.message
                self.problems.append(f"{self.name}, row {number}: {fault}")
                hint = getattr(error, "hint", "") or f"its columns are {', '.join([*self._table.column_names, column])}"
                continue
            found = True
            yield sample
        if not found:
            raise MMTokError(self.problems[0] if self.problems else f"{self.name} has no rows", hint)

    def usual_metric(self) -> MetricName | None:
        """The metric that suits the first ROWS_FOR_METRIC rows, or as many as there are up to the first answer.

        It does not depend on how many samples are taken. None where no answer is known.
        """
        fields = ("question", "questions", "answer", "answers", "choices")
        names = {field: self._columns.get(field, field) for field in fields}
        there = {field: name for field, name in names.items() if name in self._table.column_names}
        usual = UsualMetric()
        for number, raw in enumerate(self._table.select_columns(list(there.values())) if there else ()):
            if number >= ROWS_FOR_METRIC and usual.name:
                break
            with suppress(MMTokError):  # of a row that cannot be used
                for turn in turn_fields({field: raw[name] for field, name in there.items() if raw[name] is not None}):
                    usual.add(turn)
        return usual.name


def _load(data: DataName) -> Any:
    """One split, as a table that stays on disk."""
    try:
        import datasets
    except ImportError as error:
        raise MMTokError("hub: needs the datasets library", "pip install 'mmtok[datasets]'") from error
    (name,) = data.names
    config = data.selectors[0] if len(data.selectors) == 2 else None
    split = data.selectors[-1] if data.selectors else None
    path = Path(name)
    try:
        if path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            return saved[_choose(split, list(saved), name)]
        return datasets.load_dataset(
            name, config, split=_choose(split, datasets.get_dataset_split_names(name, config), name)
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MMTokError(f"the dataset {name} cannot be loaded: {reason}", "check its name and your network") from error


def _choose(split: str | None, splits: list[str], name: str) -> str:
    if split in splits:
        return split
    if split is None and len(splits) == 1:
        return splits[0]
    fault = f"has several splits: {', '.join(splits)}" if split is None else f"has no split {split!r}"
    raise MMTokError(f"{name} {fault}", f"write hub:{name}:SPLIT with one of {', '.join(splits)}")


def _with_images(table: Any, column: str, name: str) -> tuple[Any, Any]:
    """The table without its images, and the column of images, not decoded."""
    import datasets

    if not isinstance(table.features.get(column), datasets.Image):
        having = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
        raise MMTokError(
            f"{name} has no images in a column {column!r}",
            f"name another with --columns image={having[0]}" if having else "choose a dataset of images",
        )
    images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return table.remove_columns([column]), images


def _image_name(stored: Any, number: int) -> str:
    """A name by which the rows about one image are recognised: the digest of its bytes, else its path."""
    if stored and stored["bytes"]:
        return f"image-{hashlib.sha256(stored['bytes']).hexdigest()[:12]}"
    return (stored and stored["path"]) or f"row-{number}"


def _read(images: Any, number: int, column: str, name: str) -> Image:
    stored = images[number][column]
    if stored is None:
        raise MMTokError(f"{name}, row {number}: there is no image", "remove the row")
    label = stored["path"] or f"{name}, row {number}"
    return open_image(label, stored["bytes"])
