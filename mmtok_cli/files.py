"""Writing files whole or not at all, and knowing before the work starts that they can be written."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mmtok_cli.errors import MMTokError

TEMPORARY = ".mmtok-{}.part"  # short, so that any name that a file may have can be written


def write_whole(path: Path, write: Callable[[Path], object], *, parents: bool = True) -> None:
    """Let `write` fill a new temporary file in the directory of `path`, then put it in the place of `path`.

    A file that exists keeps its mode and owner. A symbolic link stays, and its target is replaced. parents: create
    missing parent directories.

    Raises MMTokError where that fails, and for an existing file that is read-only or not a regular file. Then the file
    is unchanged and the temporary file is removed.
    """
    part = None
    try:
        target = Path(os.path.realpath(path))
        before = _existing_file(target)
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        part = _new_file(target.parent)
        if before is not None:
            _give(part, before)
        write(part)
        part.replace(target)
    except OSError as error:
        raise MMTokError(f"{path} could not be written: {error.strerror or error}", "choose another place") from error
    finally:
        if part is not None:
            _remove(part)


def require_writable(path: Path, suffixes: Sequence[str], option: str) -> None:
    """Make sure that a file can be written, in a directory that need not exist yet. Nothing is left behind.

    Raises MMTokError naming the option if not.
    """
    if path.suffix.lower() not in suffixes:
        raise MMTokError(f"{option} {path} does not end in {' or '.join(suffixes)}", "choose one of these formats")
    try:
        if path.is_dir():
            raise MMTokError(f"{option} {path} is a directory", "name a file in it")
        target = Path(os.path.realpath(path))
        _existing_file(target)
        _try_to_write_into(target.parent, target.name)
    except OSError as error:
        raise MMTokError(f"{option} {path} cannot be written: {error.strerror}", "choose another place") from error


def require_writable_directory(path: Path, option: str) -> None:
    """Make sure that files can be written into a directory, which need not exist yet. Nothing is left behind."""
    try:
        _try_to_write_into(path)
    except OSError as error:
        raise MMTokError(f"{option} {path} cannot be written to: {error.strerror}", "choose another place") from error


def remove_temporary_files(directory: Path) -> None:
    """Remove what a process that was killed in `write_whole` left in a directory. No other process may write there."""
    for part in directory.glob(TEMPORARY.format("*")):
        _remove(part)


def _new_file(directory: Path) -> Path:
    """An empty file with a random name. It is never one that existed, nor a link."""
    part = directory / TEMPORARY.format(secrets.token_hex(8))
    part.touch(exist_ok=False)  # O_EXCL, with the permissions that the process gives to new files
    return part


def _existing_file(path: Path) -> os.stat_result | None:
    """The status of a file that may be replaced, None where there is none. Raises OSError if it may not."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "it exists and is not a regular file")
    # The mode alone would not stop root, and access alone does not stop a rename.
    if not found.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.W_OK):
        raise OSError(None, "the file is read-only")
    return found


def _give(part: Path, before: os.stat_result) -> None:
    """Give the temporary file the owner, where that is allowed, and the mode of the file that it will replace."""
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(part, before.st_uid, before.st_gid)
    part.chmod(stat.S_IMODE(before.st_mode))


def _try_to_write_into(directory: Path, name: str = "") -> None:
    """Raises OSError where no file of this name can be created in a directory, whose parents may be missing yet."""
    names = [name]
    while not directory.exists() and directory != directory.parent:
        names.append(directory.name)
        directory = directory.parent
    for each in filter(None, names):
        with contextlib.suppress(FileNotFoundError):
            (directory / each).lstat()  # raises OSError for a name that is too long
    with tempfile.TemporaryFile(dir=directory):
        pass


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # its directory is gone, and so is the file
        part.unlink(missing_ok=True)
