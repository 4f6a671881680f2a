"""Writing files whole or not at all, and knowing before the work starts that they can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mmtok_cli.errors import MMTokError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place. Raises MMTokError if that fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except OSError as error:
        raise MMTokError(f"{path} could not be written: {error.strerror or error}", "choose another place") from error
    finally:
        _remove(part)


def require_writable(path: Path, suffixes: Sequence[str], option: str) -> None:
    """Make sure that a file can be written, though its directory may be missing yet. Raises MMTokError if not."""
    if path.suffix.lower() not in suffixes:
        raise MMTokError(f"{option} {path} does not end in {' or '.join(suffixes)}", "choose one of these formats")
    try:
        if path.is_dir():
            raise MMTokError(f"{option} {path} is a directory", "name a file in it")
        if path.exists() and not path.is_file():
            raise MMTokError(f"{option} {path} is not a regular file", "choose another place")
        _try_names(path.parent, [path.name])
    except OSError as error:
        raise MMTokError(f"{option} {path} cannot be written: {error.strerror}", "choose another place") from error


def require_writable_directory(path: Path, option: str) -> None:
    """Make sure that files can be written into a directory, which need not exist yet."""
    try:
        _try_names(path, [])
    except OSError as error:
        raise MMTokError(f"{option} {path} cannot be written to: {error.strerror}", "choose another place") from error


def _try_names(place: Path, names: list[str]) -> None:
    """Create files of these names and those of directories that are missing, and remove them again."""
    while not place.exists() and place != place.parent:
        names = [*names, place.name]
        place = place.parent
    for name in names or [""]:
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{name}."):
            pass


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:
        return  # its directory is gone or was never there, and so is the file
