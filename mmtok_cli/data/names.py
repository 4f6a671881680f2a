"""The names of datasets, such as `pope:FILE` or `hub:NAME:SPLIT`, and the files that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmtok_cli.errors import MMTokError


@dataclass(frozen=True)
class DataName:
    """The parts of the name of a dataset; `str` puts them together again.

    kind: what the name begins with; "path" for a file, a folder or a pattern of images without a prefix. names: of the
    files, the folder or the pattern, or the dataset of the hub's library; none for the demo. selectors: configuration
    and split of the latter; of the demo, "dense" for pages, charts and dots, "conversations" for several questions
    about each scene.
    """

    kind: Literal["demo", "hub", "pope", "vqav2", "path"]
    names: tuple[str, ...] = ()
    selectors: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The names that are paths, which those on the hub are not."""
        paths = tuple(map(Path, self.names))
        return paths if self.kind != "hub" else tuple(filter(_is_directory, paths))

    def __str__(self) -> str:
        prefix = () if self.kind == "path" else (self.kind,)
        names = (",".join(self.names),) if self.names else ()
        return ":".join((*prefix, *names, *self.selectors))


def parse_name(text: str) -> DataName:
    """The parts of a name; see `datasets.KINDS`. Raises MMTokError for a name that has too many or too few."""
    kind, _, rest = text.partition(":")
    if text == "demo":
        return DataName("demo")
    if text in ("demo:dense", "demo:conversations"):
        return DataName("demo", selectors=(rest,))
    if kind == "pope":
        return DataName("pope", (rest,))
    if kind == "vqav2":
        return DataName("vqav2", _one_or_two_files(rest))
    if kind == "hub":
        name, *selectors = _hub_parts(rest)
        return DataName("hub", (name,), tuple(selectors))
    return DataName("path", (text,))


def _one_or_two_files(text: str) -> tuple[str, ...]:
    """QUESTIONS or QUESTIONS,ANNOTATIONS, whose own names may have commas if the files exist."""
    names = text.split(",")
    pairs = [(",".join(names[:i]), ",".join(names[i:])) for i in range(1, len(names))]
    for files in ((text,), *pairs):
        if all(map(_is_file, map(Path, files))):
            return files
    if len(names) > 2:
        raise MMTokError(f"vqav2:{text} names {len(names)} files", "write vqav2:QUESTIONS.json,ANNOTATIONS.json")
    return tuple(names)


def _hub_parts(text: str) -> tuple[str, ...]:
    """NAME, CONFIG and SPLIT of NAME[:CONFIG][:SPLIT]. The name of a directory that exists may have colons."""
    parts = text.split(":")
    for count in range(len(parts), 1, -1):
        directory = ":".join(parts[:count])
        if _is_directory(Path(directory)):
            parts = [directory, *parts[count:]]
            break
    if len(parts) > 3 or not all(parts):
        raise MMTokError(
            f"{text!r} is not the name of a dataset", "write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT"
        )
    return tuple(parts)


def _is_file(path: Path) -> bool:
    """Whether there is a file of this name, which may be one that no file can have."""
    try:
        return path.is_file()
    except OSError:  # too long, or in a directory that may not be searched
        return False


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
