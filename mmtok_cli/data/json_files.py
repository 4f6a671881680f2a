"""Rows of JSON files: one object per line, an array of objects, or a list under `data` or `questions` of an object."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtok_cli.errors import MMTokError

LISTS = ("questions", "data")  # where benchmarks keep their samples
EXAMPLE = '{"image": "a.jpg", "question": "What is it?", "answer": "a cat"}'
HINT = f"write one JSON object per line, as in {EXAMPLE}, or an array of such objects"

Entry = tuple[str, Mapping[str, Any] | MMTokError]  # where a row is, and the row or what is wrong with it
Entries = Generator[Entry, None, None]


def document_of(path: Path) -> Any:
    """The document of a file that is one; None for a file of one object per line, or of nothing that can be read.

    Raises MMTokError for a damaged array and for a file that cannot be read.
    """
    first = next(_lines(path), (1, b""))[1].removeprefix(b"\xef\xbb\xbf").lstrip()
    if first.startswith(b"["):
        return read_json(path)
    line = _parsed(first)
    if _is_container(line) or (line is None and first.startswith(b"{")):
        return read_json(path, strict=False)
    return None


def read_json(path: Path, *, strict: bool = True) -> Any:
    """The document of a whole file; None, unless strict, for a file that is not one.

    Raises MMTokError for a file that cannot be read.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (ValueError, RecursionError) as error:
        if not strict:
            return None
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        fault = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "it is not JSON"
        reason = f" ({error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise MMTokError(f"{path}, line {line}: {fault}{reason}", HINT) from error


def document_entries(path: Path, document: Any) -> Entries:
    """The items of a list: the document itself, or the one under one of LISTS. A single object is one item."""
    rows = document if isinstance(document, list) else _list_in(document)
    if rows is None and "annotations" in document:
        raise MMTokError(
            f"{path} has annotations without questions", "name both files: vqav2:QUESTIONS.json,ANNOTATIONS.json"
        )
    for number, row in enumerate([document] if rows is None else rows, start=1):
        yield f"item {number}", row if isinstance(row, dict) else MMTokError("it is not a JSON object", HINT)


def line_entries(path: Path) -> Entries:
    """The objects of a file with one on each line."""
    for number, line in _lines(path):
        row = _parsed(line)
        yield f"line {number}", row if isinstance(row, dict) else MMTokError(_fault(line, row), HINT)


def _fault(line: bytes, row: Any) -> str:
    if row is not None:
        return "it is not a JSON object"
    try:
        line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "it is not UTF-8"
    return "it is not a JSON object" if line.strip() == b"null" else "it is not JSON"


def _parsed(line: bytes) -> Any:
    """The value of a line; None if it is not JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _is_container(document: Any) -> bool:
    """Whether an object holds samples or annotations, and is not a sample itself."""
    if not isinstance(document, dict) or "image" in document:
        return False
    return any(_is_list_of_rows(document.get(name)) for name in (*LISTS, "annotations"))


def _is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list of anything but texts, which are the questions of a conversation."""
    return isinstance(value, list) and not (value and all(isinstance(each, str) for each in value))


def _list_in(document: Any) -> list[Any] | None:
    if not isinstance(document, dict):
        return None
    return next((document[name] for name in LISTS if _is_list_of_rows(document.get(name))), None)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers, empty ones left out."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror}", "check the path") from error
