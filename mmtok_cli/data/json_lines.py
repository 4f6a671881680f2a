"""JSON lines: one object per line, as in {"image": "a.jpg", "question": "What color is it?", "answer": "red"}.

POPE's official files (arXiv 2305.10355) have the same format with other names: image, text, label, question_id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmtok_cli.data.images import open_image
from mmtok_cli.data.rows import Columns, FileRow, fault_of, fields_of, make_sample
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError

POPE = {"question": "text", "answer": "label", "id": "question_id"}
EXAMPLE = '{"image": "a.jpg", "question": "What is it?", "answer": "a cat"}'


class JsonLines:
    """Reads a file line by line, and collects what had to be left out.

    missing: image files that do not exist; left_out: number of samples that need them. problems: a message for each
    unusable line. All three are complete after the last sample.
    """

    def __init__(self, path: Path, *, image_root: Path | None, question: str | None, columns: Columns) -> None:
        self.problems: list[str] = []
        self.missing: set[Path] = set()
        self.left_out = 0
        self._path = path
        self._root = image_root or path.parent
        self._question = question
        self._columns = columns

    def samples(self) -> Iterator[Sample]:
        """The samples whose lines are usable and whose images exist. Raises MMTokError if there are none."""
        there = cache(Path.is_file)
        found = False
        hint = f"write one JSON object per line, as in {EXAMPLE}"
        for number, line in _lines(self._path):
            try:
                row = _parse(line, self._columns)
                files = [self._root / name for name in row.image]
                readers = [partial(open_image, file) for file in files]
                sample = make_sample(row, readers, row.image, self._question, number)
            except MMTokError as error:
                self.problems.append(f"{self._path}, line {number}: {error.message}")
                hint = error.hint or hint
                continue
            if absent := [file for file in files if not there(file)]:
                self.missing.update(absent)
                self.left_out += 1
                continue
            found = True
            yield sample
        if found:
            return
        if self.missing:
            raise MMTokError(
                f"none of the {len(self.missing)} images named in {self._path} exists in {self._root}",
                "set their directory with --image-root",
            )
        if self.problems:
            raise MMTokError(self.problems[0], hint)
        raise MMTokError(f"{self._path} is empty", hint)


def is_pope(path: Path) -> bool:
    """Whether the first line is that of an official POPE file."""
    for _, line in _lines(path):
        try:
            return {"image", *POPE.values()} <= json.loads(line).keys()
        except (ValueError, AttributeError, RecursionError):
            return False
    return False


def _parse(line: bytes, columns: Columns) -> FileRow:
    try:
        raw: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MMTokError("it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise MMTokError("it is not JSON") from error
    if not isinstance(raw, dict):
        raise MMTokError("it is not a JSON object")
    try:
        return FileRow.model_validate(fields_of(raw, columns))
    except ValidationError as error:
        raise MMTokError(fault_of(error)) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers, empty ones left out."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror}", "check the path") from error
