"""Rows of CSV and TSV files, among them those of VLMEvalKit, whose images are base64 in a column."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from PIL.Image import Image

from mmtok_cli.data.base64_images import decoded, image_name, is_base64
from mmtok_cli.data.json_files import Entries
from mmtok_cli.errors import MMTokError

SUFFIXES = {".csv", ".tsv"}
NOTHING = {"", "nan", "null"}  # cells without a value, in lower case
LONGEST_NOTHING = 5  # characters by which they are told from others
IMAGE = "image"
LISTS = {IMAGE, "image_path", "answer", "answers", "choices"}  # columns whose cells may be lists, as in ['a', 'b']
LONGEST_CELL = 2**31 - 1


class StoredImage:
    """An image in a cell of a table, which is read again when it is needed.

    offset: of its row, in bytes. column, place: numbers of the cell and of the image within it, from 0.
    """

    def __init__(self, file: Path, offset: int, delimiter: str, column: int, place: int) -> None:
        self._file, self._offset, self._delimiter, self._column, self._place = file, offset, delimiter, column, place

    @cached_property
    def name(self) -> str:
        """A digest, for which the row is read. Raises MMTokError for a file that has changed since."""
        return image_name(self._text())

    def open(self) -> Image:
        """Raises MMTokError for a file that has changed since, and for an image that cannot be read."""
        return decoded(self._text(), f"{self._file}, {self.name}")

    def _text(self) -> str:
        try:
            with self._file.open("rb") as file, _long_cells():
                file.seek(self._offset)
                row = next(csv.reader(_Lines(file), delimiter=self._delimiter))
            return _texts(row[self._column])[self._place]
        except (OSError, StopIteration, csv.Error, UnicodeDecodeError, IndexError) as error:
            raise MMTokError(f"{self._file} cannot be read any more", "leave it unchanged during a run") from error


class _Lines:
    """The lines of a file as text. offset: bytes read so far. number: lines read so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.offset = self.number = 0
        self._file = file

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.offset += len(line)
        self.number += 1
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8")


def table_entries(path: Path) -> Entries:
    """The rows of a file by the names in its first row. Raises MMTokError for a file that cannot be read."""
    try:
        with path.open("rb") as file, _long_cells():
            lines = _Lines(file)
            start = file.readline()
            file.seek(0)
            delimiter = max("\t,;", key=start.decode("utf-8-sig").count)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            names = _header(path, reader)
            yield from _rows(path, reader, lines, names, delimiter)
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise MMTokError(f"{path}, line {max(1, lines.number)}: it is not UTF-8", "save it as UTF-8") from error


def _header(path: Path, reader: Any) -> list[str]:
    """The names of the columns. Raises MMTokError where they cannot be read or two are equal."""
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        fault = _malformed(error)
        raise MMTokError(f"{path}, line 1: {fault.message}", fault.hint) from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MMTokError(f"{path}, line 1: two columns are named {twice!r}", "rename one of them")
    return names


def _malformed(error: csv.Error) -> MMTokError:
    return MMTokError(f"it is not a row of a table ({error})", "end lines and quote cells as spreadsheets do")


def _rows(path: Path, reader: Any, lines: _Lines, names: list[str], delimiter: str) -> Entries:
    stored: dict[str, list[StoredImage]] = {}  # by index: a row may name that of an earlier one instead of an image
    while True:
        offset, place = lines.offset, f"line {lines.number + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, _malformed(error)
            continue
        if not cells:
            continue
        if len(cells) > len(names):
            fault = f"it has {len(cells)} cells, and the first row {len(names)}"
            yield place, MMTokError(fault, "quote cells that contain commas")
            continue
        texts = dict(zip(names, map(_texts, cells), strict=False))
        row = {name: _value(name, cell, texts[name]) for name, cell in zip(names, cells, strict=False)}
        if IMAGE in row:
            column = names.index(IMAGE)
            if texts[IMAGE] and all(map(is_base64, texts[IMAGE])):
                row[IMAGE] = [StoredImage(path, offset, delimiter, column, i) for i in range(len(texts[IMAGE]))]
                if row.get("index"):
                    stored[row["index"]] = row[IMAGE]
            elif cells[column] in stored:
                row[IMAGE] = stored[cells[column]]
        yield place, dict.fromkeys(names) | row


def _value(name: str, cell: str, texts: list[str]) -> Any:
    """What a cell of these texts holds: None if it is empty, a list where the column may hold lists, else its text."""
    if not texts:
        return None
    return texts if name in LISTS and texts != [cell] else cell


def _texts(cell: str) -> list[str]:
    """The texts of a cell: those of a list, as in ["a", "b"] or ['a', 'b'], none if it is empty, else itself."""
    if cell.strip()[:LONGEST_NOTHING].lower() in NOTHING:  # cells of images are long
        return []
    if cell.startswith("[") and cell.endswith("]"):
        try:
            values = ast.literal_eval(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [cell]
        if isinstance(values, list) and all(isinstance(value, str | int | float) for value in values):
            return list(map(str, values))
    return [cell]


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of any length: the csv module's limit of 128 KiB is smaller than most images."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
