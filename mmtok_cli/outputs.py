"""Where a command may write: not over what it reads, not over the records of a run, and not twice into one file."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmtok_cli.errors import MMTokError
from mmtok_cli.files import require_writable, require_writable_directory

if TYPE_CHECKING:
    from mmtok_cli.settings import CompareSettings

ELSEWHERE = "choose another place"
FileId = tuple[int, int]


@dataclass(frozen=True)
class Output:
    """A file that an option names, in a format of one of the suffixes, or a directory, which has no suffixes."""

    option: str
    path: Path
    suffixes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.option} {self.path}"

    @property
    def directory(self) -> Path:
        """Where it writes files."""
        return _real(self.path.parent if self.suffixes else self.path)


@dataclass
class Inputs:
    """What a command reads: files, directories with all that is in them, and run directories.

    datasets: directories whose files, also those in new subdirectories, are the data. pattern: of the files that are.
    """

    files: list[Path] = field(default_factory=list)
    directories: list[Path] = field(default_factory=list)
    datasets: list[Path] = field(default_factory=list)
    pattern: Path | None = None
    runs: list[Path] = field(default_factory=list)


def outputs_of(paths: Iterable[tuple[str, Path | None, tuple[str, ...]]]) -> list[Output]:
    """The outputs among options that were given: name, path and suffixes of each."""
    return [Output(option, path, suffixes) for option, path, suffixes in paths if path is not None]


def check_outputs(outputs: Sequence[Output], inputs: Inputs) -> None:
    """Raises MMTokError for an output that cannot be written, that another output names too, that is an input or a
    record of a run, or that would become a part of the data, through links and in other letter cases as well. Nothing
    is written; directories need not exist."""
    for output in outputs:
        if output.suffixes:
            require_writable(output.path, output.suffixes, output.option)
        else:
            require_writable_directory(output.path, output.option)
    for one, other in combinations(outputs, 2):
        _require_distinct(one, other)
    for output in outputs:
        _require_no_record(output, inputs.runs)
        _require_no_input(output, inputs)
        _require_no_data(output, inputs)


def model_inputs(model: str, *files: Path) -> Inputs:
    """Files and folders of frames, the directory of a model, which may be that of the hub's cache, and the profiles of
    known models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from mmtok_cli.profiles import known_profiles, profile_directory

    known = known_profiles().get(model)
    sources = [known.source, known.text_tower] if known else [model]
    folders = [path for path in files if _kind(path) == "directory"]
    inputs = Inputs(files=[path for path in files if path not in folders], directories=[profile_directory(), *folders])
    for source in filter(None, sources):
        local = Path(os.path.expanduser(source))  # noqa: PTH111 (leaves the name of an unknown user as it is)
        cached = Path(HF_HUB_CACHE, f"models--{source.replace('/', '--')}")
        inputs.directories.append(local if _kind(local) else cached)
    return inputs


def comparison_inputs(settings: CompareSettings, run: Path | None, outputs: Sequence[Output]) -> Inputs:
    """What `mmtok compare` reads: the model, the data and the images of the data, and a run that is resumed, if any."""
    from mmtok_cli.data.images import is_image
    from mmtok_cli.data.names import parse_name
    from mmtok_cli.data.pictures import is_pattern
    from mmtok_cli.data.vqav2 import annotations_beside

    inputs = model_inputs(settings.model, *settings.kept)
    inputs.runs += [run] if run else []
    if settings.include_path is not None:
        inputs.directories.append(settings.include_path)
    name = parse_name(settings.data)
    for path in name.paths:
        if _kind(path) == "file":
            inputs.files += filter(None, (path, annotations_beside(path)))
        elif _kind(path) == "directory":
            inputs.datasets.append(path)
            inputs.directories += [path] if name.kind == "hub" else []
    if is_pattern(settings.data) and not inputs.files:
        inputs.pattern = Path(settings.data)
    # All data are read for this, so only where an output replaces an image, which might be one of the data.
    replaced = (file for output in outputs if output.suffixes for file in _same_names(output.path))
    if name.kind not in ("demo", "hub") and any(map(is_image, replaced)):
        inputs.files += _image_files(settings)
    return inputs


def _image_files(settings: CompareSettings) -> Iterator[Path]:
    """The images, videos and frames of a dataset, also those beyond --limit."""
    from mmtok_cli.data.datasets import open_dataset
    from mmtok_cli.data.samples import ClosedImages
    from mmtok_cli.option_values import column_names

    dataset = open_dataset(
        settings.data,
        image_root=settings.image_root,
        question=settings.question,
        columns=column_names(settings.columns),
        find_metric=False,
        sampling=settings.sampling,
    )
    for sample in dataset.samples:
        if isinstance(sample.images, ClosedImages):
            for path in sample.images.files:  # a video may be a folder
                yield from _files_below(path)


def _require_distinct(one: Output, other: Output) -> None:
    first, second = (Path(_folded(str(_real(output.path)))) for output in (one, other))
    if first == second or _ids(_same_names(one.path)) & _ids(_same_names(other.path)):
        raise MMTokError(f"{one} and {other} are the same file", "give each output a name of its own")
    for file, path, inner in ((one, first, second), (other, second, first)):
        if file.suffixes and path in inner.parents:
            raise MMTokError(f"{file} is a file, and {other if file is one else one} is in it", ELSEWHERE)


def _require_no_record(output: Output, runs: Sequence[Path]) -> None:
    from mmtok_cli.results.run_directory import PLAN, RECORDS, SEARCH

    known, path = {_real(run) for run in runs}, _real(output.path)
    for parent in path.parents:
        if parent not in known and not any((parent / plan).is_file() for plan in (PLAN, SEARCH)):
            continue
        if path.relative_to(parent).parts[0].casefold() in RECORDS:
            raise MMTokError(f"{output} is a record of the run in {parent}", ELSEWHERE)
    files = _ids(_same_names(output.path)) if output.suffixes else set()
    for run in runs:
        if files & _ids(file for name in RECORDS for file in _files_below(run / name)):
            raise MMTokError(f"{output} is a record of the run in {run}", ELSEWHERE)


def _require_no_input(output: Output, inputs: Inputs) -> None:
    for directory in inputs.directories:
        if _real(directory) == output.directory:
            raise MMTokError(f"{output} would be written into {directory}, which this command reads", ELSEWHERE)
    ids = _ids(_same_names(output.path)) if output.suffixes else set()
    if not ids:
        return
    for file in (*inputs.files, *(file for directory in inputs.directories for file in _files_below(directory))):
        if ids & _ids([file]):
            raise MMTokError(f"{output} is the same file as the input {file}", ELSEWHERE)


def _require_no_data(output: Output, inputs: Inputs) -> None:
    """What is written below the data would be read as data the next time, as when a run is resumed."""
    parents = _ids((output.directory, *output.directory.parents))
    for directory in inputs.datasets:
        if parents & _ids([directory]):
            raise MMTokError(f"{output} would be written into the dataset {directory}", ELSEWHERE)
    if inputs.pattern:
        path = _real(output.path if output.suffixes else output.path / "overlays" / "000000-000.webp")
        if _matches(path.parts, _real(inputs.pattern).parts):
            raise MMTokError(f"{output} would be a part of the dataset {inputs.pattern}", ELSEWHERE)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern in which `**` stands for any number of directories."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _folded(text: str) -> str:
    """A path or name as file systems see it that do not tell letter cases or ways to write an accent apart."""
    return unicodedata.normalize("NFC", text).casefold()


def _same_names(path: Path) -> list[Path]:
    """The files that a path may stand for: those that have its name in some letter case."""
    path = _real(path)
    try:
        return [other for other in path.parent.iterdir() if _folded(other.name) == _folded(path.name)]
    except OSError:
        return []


def _files_below(path: Path) -> Iterator[Path]:
    return (file for file in (path, *path.rglob("*")) if _kind(file) == "file")


def _kind(path: Path) -> Literal["file", "directory"] | None:
    """What there is under a name; None for nothing, and for a name that cannot be."""
    try:
        return "directory" if stat.S_ISDIR(path.stat().st_mode) else "file"
    except (OSError, ValueError):
        return None


def _ids(paths: Iterable[Path]) -> set[FileId]:
    """Device and inode, which hard links share, of the files that exist."""
    statuses = [path.stat() for path in paths if _kind(path)]
    return {(status.st_dev, status.st_ino) for status in statuses}
