"""Images without questions or answers: a file, a folder or a pattern."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path

from mmtok_cli.data.images import open_image
from mmtok_cli.data.rows import Row, make_sample
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"}


def is_pattern(text: str) -> bool:
    return glob.has_magic(text)


def pictures(text: str, question: str | None) -> Iterator[Sample]:
    """All images of a file name, a folder with its subfolders or a pattern such as `photos/**/*.jpg`, sorted by name.

    Raises MMTokError if there is no image or no question.
    """
    path = Path(text)
    if path.is_dir():
        root, files = path, [file for file in path.rglob("*") if _is_image(file)]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
        root = Path(*fixed)
        pattern = "/".join(path.parts[len(fixed) :])
        files = [file for file in root.glob(pattern) if _is_image(file)]
    if not files:
        raise MMTokError(f"there is no image in {text}", f"looked for files ending in {' '.join(sorted(SUFFIXES))}")
    for number, file in enumerate(sorted(files)):
        name = file.relative_to(root).as_posix()
        yield make_sample(Row(id=name), [partial(open_image, file)], [name], question, number)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
