"""Images without questions or answers: a file, a folder or a pattern."""

from __future__ import annotations

import glob
from functools import partial
from itertools import islice
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


def pictures(text: str, question: str | None, limit: int | None) -> tuple[list[Sample], list[str]]:
    """The first images of a file name, a folder with its subfolders or a pattern such as `photos/**/*.jpg`, by name;
    and a message for each that is left out, since its name could be neither printed nor saved.

    Raises MMTokError if there is no image or no question.
    """
    try:
        root, files = _found(text)
    except OSError as error:
        raise MMTokError(f"{text} cannot be read: {error.strerror}", "check the path") from error
    if not files:
        raise MMTokError(f"there is no image in {text}", f"looked for files ending in {' '.join(sorted(SUFFIXES))}")
    names = {file.relative_to(root).as_posix(): file for file in sorted(files)}
    usable = {name: file for name, file in names.items() if _is_unicode(name)}
    problems = [f"the name of {name!r} is not valid UTF-8" for name in names if name not in usable]
    if not usable:
        raise MMTokError(f"{text}: {problems[0]}", "rename it")
    samples = [
        make_sample(Row(id=name), [partial(open_image, file)], [name], question, number)
        for number, (name, file) in enumerate(islice(usable.items(), limit))
    ]
    return samples, problems


def _found(text: str) -> tuple[Path, list[Path]]:
    """The images, and the directory that their names are relative to."""
    path = Path(text)
    if path.is_dir():
        return path, [file for file in path.rglob("*") if _is_image(file)]
    if path.is_file() or not is_pattern(text):
        require_file(path)
        return path.parent, [path]
    root, pattern = _split(path)
    try:
        return root, [file for file in root.glob(pattern) if _is_image(file)]
    except ValueError as error:
        raise MMTokError(f"{text!r} is not a pattern: {first_line(error)}", "as in photos/**/*.jpg") from error


def _split(path: Path) -> tuple[Path, str]:
    """The directory where a pattern begins, which may have a name such as `run [1]` itself, and what is left of it."""
    root = Path()
    for number, part in enumerate(path.parts):
        if glob.has_magic(part) and not (root / part).is_dir():
            return root, "/".join(path.parts[number:])
        root /= part
    return root, "*"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()
