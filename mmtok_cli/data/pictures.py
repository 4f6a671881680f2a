"""Images without questions or answers: a file, a folder or a pattern."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path

from mmtok_cli.data.images import open_image, require_file
from mmtok_cli.data.rows import Row, make_sample
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError, first_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv"}


def is_pattern(text: str) -> bool:
    """Whether a name that no file has is a pattern of images: `photos/*`, `run [12]/*.png`, not `run [1]/a.csv`."""
    return glob.has_magic(text) and Path(text).suffix.lower() not in DATA_SUFFIXES


def pictures(text: str, question: str | None) -> Iterator[Sample]:
    """All images of a file name, a folder with its subfolders or a pattern such as `photos/**/*.jpg`, sorted by name.

    Raises MMTokError if there is no image or no question.
    """
    try:
        root, files = _found(text)
    except OSError as error:
        raise MMTokError(f"{text} cannot be read: {error.strerror}", "check the path") from error
    if not files:
        raise MMTokError(f"there is no image in {text}", f"looked for files ending in {' '.join(sorted(SUFFIXES))}")
    for number, file in enumerate(sorted(files)):
        name = file.relative_to(root).as_posix()
        yield make_sample(Row(id=name), [partial(open_image, file)], [name], question, number)


def _found(text: str) -> tuple[Path, list[Path]]:
    """The images, and the directory that their names are relative to."""
    path = Path(text)
    if path.is_dir():
        return path, [file for file in path.rglob("*") if _is_image(file)]
    if path.is_file() or not is_pattern(text):
        require_file(path)
        return path.parent, [path]
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    root = Path(*fixed)
    try:
        return root, [file for file in root.glob("/".join(path.parts[len(fixed) :])) if _is_image(file)]
    except ValueError as error:
        raise MMTokError(f"{text!r} is not a pattern: {first_line(error)}", "as in photos/**/*.jpg") from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
