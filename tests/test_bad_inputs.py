"""Bad input of every kind to every command: refused in one clear line, nothing written, nothing lost.

Run as a program, this prints what is not refused: `python tests/test_bad_inputs.py [KIND …]`.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeGuard

import pytest
import typer.main
from bad_inputs import GOOD_IMAGES, WORKING, BadInput, bad_inputs, make_files
from fork_server import TIMED_OUT, Done, ForkServer

import mmtok_cli
from mmtok_cli.cli.main import app

CASES = bad_inputs()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Of mmtok itself and other programs; those of lmms-eval up to their first underscore.
OPTIONS_OF_OTHERS = {"--version", "--porcelain", "--logdir", "--lock-gpu-clocks"}
OPTIONS_OF_OTHERS |= {"--batch", "--force", "--gen", "--include"}
OPTIONS_OF_OTHERS |= {
    "--mm-encoder-tp-mode",
    "--mm-processor-kwargs",
    "--trust-request-mm-kwargs",
    "--video-pruning-rate",
}
COPIES = ("models", "saved", "packages")
SOURCE = Path(mmtok_cli.__file__).parent
HANGS = 30  # seconds; most refusals take a twentieth of a second
MEMORY = 2 * 2**30  # bytes that a refusal may take beyond those of the server
Tree = dict[str, tuple[int, ...]]


class Place:
    """A directory with everything that the tables name, and a server that runs commands in it."""

    def __init__(self, directory: Path, server: ForkServer) -> None:
        self.directory = directory
        self.server = server
        make_files(directory, self.run_well)
        self.peak = server.run(["models"], directory).peak
        self.tree = tree(directory)

    def changes(self) -> str:
        """What all cases together have changed."""
        return differences(self.tree, tree(self.directory))

    def run_well(self, arguments: tuple[str, ...], directory: Path) -> Done:
        done = self.server.run(arguments, directory)
        assert done.status == 0, done.stderr
        return done

    def fault(self, case: BadInput) -> str:
        """What is wrong with how a case is handled; nothing if it is refused as it should be."""
        before = self.concerned(case)
        done = self.server.run(
            case.arguments, self.directory, environment=case.environment, packages=case.packages, limit=HANGS
        )
        problem = fault_of_refusal(done, case, self.peak)
        return f"{problem}; {differences(before, self.concerned(case))}".strip("; ")

    def concerned(self, case: BadInput) -> Tree:
        """What a case might change: all but the copies of models and runs that it does not name. (Those are compared at
        the very end, since there are thousands of files in them.)"""
        found = tree(self.directory, skip=COPIES)
        for name in re.findall(rf"(?:{'|'.join(COPIES)})/[^/]+", " ".join(case.arguments)):
            found |= tree(self.directory / name)
        return found


def tree(directory: Path | str, skip: Collection[str] = ()) -> Tree:
    """What every entry below a directory is, without reading it. skip: names of subdirectories."""
    found: Tree = {}
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            status, is_directory = entry.stat(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
            content = () if is_directory else (status.st_size, status.st_mtime_ns)
            found[entry.path] = (status.st_mode, status.st_ino, *content)
            if is_directory and entry.name not in skip:
                found |= tree(entry.path)
    return found


def differences(before: Tree, after: Tree) -> str:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"changed: {', '.join(changed[:4])}" if changed else ""


def fault_of_refusal(done: Done, case: BadInput, usual_peak: int) -> str:
    if done.status == TIMED_OUT:
        return "it hangs"
    if "Traceback" in done.stderr:
        return f"traceback: {done.stderr.splitlines()[-1][:200]}"
    if done.status != 2:
        return f"exit status {done.status}: {(done.stderr or done.stdout)[-200:]!r}"
    first, *rest = done.stderr.removesuffix("\n").split("\n")
    if not first.startswith("error: ") or len(rest) > 1 or not all(line.startswith("hint: ") for line in rest):
        return f"not an error and a hint: {done.stderr[:400]!r}"
    if hostile := re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", done.stderr):
        return f"{hostile[0]!r} reaches the terminal"
    if len(done.stderr) > 12_000:
        return f"a message of {len(done.stderr)} letters"
    if done.stdout:
        return f"standard output: {done.stdout[:200]!r}"
    if case.says not in done.stderr:
        return f"{case.says!r} is not named: {done.stderr!r}"
    if missing := unknown_options(case, done.stderr):
        return f"there is no option {', '.join(missing)}: {done.stderr!r}"
    if done.peak > usual_peak + MEMORY:
        return f"{(done.peak - usual_peak) / 2**30:.1f} GiB of memory"
    return ""


def unknown_options(case: BadInput, text: str) -> list[str]:
    """Options that a message names and that the command does not have."""
    given, missing = " ".join(case.arguments), []
    for line in text.splitlines():
        other = re.search(r"mmtok (\w+)", line)  # as in "resume with: mmtok compare --resume"
        known = option_names(other[1] if other and other[1] in COMMANDS else case.arguments[0])
        missing += [name for name in OPTION.findall(line) if name not in known and name not in given]
    return missing


def option_names(command: str) -> set[str]:
    """The options of a command, in all spellings."""
    parameters = COMMANDS[command].params if command in COMMANDS else []
    return {"--help"}.union(*(parameter.opts for parameter in parameters))


def test_options_in_messages_exist() -> None:
    """Every option that a text of the program names is one; that it is the command's own is checked in each case."""
    known = OPTIONS_OF_OTHERS.union(*map(option_names, COMMANDS))
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "demo":  # programs of their own
            texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if is_text(node)]
            assert set(OPTION.findall("\n".join(texts))) <= known, path


def is_text(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ForkServer() as server:
        place = Place(tmp_path_factory.mktemp("bad"), server)
        yield place
        assert place.changes() == ""


@pytest.mark.parametrize("command", WORKING)
def test_what_the_cases_start_from_works(command: str, place: Place) -> None:
    """A case is refused because of the one thing in it that is bad."""
    with TemporaryDirectory() as outside:
        outputs = {"profile": [f"--trace-dir={outside}/t"], "compare": [f"--run-dir={outside}/r"]}
        place.run_well((*WORKING[command], *outputs.get(command, [])), place.directory)


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_unusual_images_are_read(name: str, place: Place) -> None:
    place.run_well(("prune", f"images/{name}", *WORKING["prune"][2:]), place.directory)


def test_a_folder_with_brackets_is_no_pattern(place: Place) -> None:
    data = (*WORKING["compare"], "--data=more [2024]/good.jsonl", "--image-root=.", "--dry-run")
    place.run_well(data, place.directory)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_refused(case: BadInput, place: Place) -> None:
    assert place.fault(case) == ""


def main(kinds: list[str]) -> None:
    failed: Counter[str] = Counter()
    chosen = [case for case in CASES if not kinds or case.kind in kinds]
    with TemporaryDirectory() as directory, ForkServer() as server:
        place = Place(Path(directory), server)
        for case in chosen:
            if problem := place.fault(case):
                failed[case.kind] += 1
                print(f"{case.id}: {problem}", flush=True)  # noqa: T201
        print(place.changes())  # noqa: T201
    total = Counter(case.kind for case in chosen)
    for kind, count in total.items():
        print(f"{kind:12} {count:5} inputs, {failed[kind]:4} not refused")  # noqa: T201
    print(f"{'all':12} {total.total():5} inputs, {failed.total():4} not refused")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
