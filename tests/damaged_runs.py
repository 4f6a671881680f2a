"""Ways in which a run directory can be damaged, and what reading it must come to: the same result or one clear line.

`python tests/damaged_runs.py RUN OTHER` tries all of them on a copy of RUN and counts the outcomes; OTHER is a second
run of the same model on the same samples. test_run_directory.py tries some of them.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cli_helpers import run

from mmtok_cli.errors import MMTokError

VALUES: dict[str, str] = {
    "null": "null",
    "text": '"x"',
    "hostile": '"\\u001b[31m\\n../../x"',
    "number as text": '"1"',
    "list": "[]",
    "object": "{}",
    "true": "true",
    "fraction": "1.5",
    "negative": "-1",
    "zero": "0",
    "ten billion": "10000000000",
    "huge": "1" + "0" * 40,
    "very large": "1e300",
    "NaN": "NaN",
    "infinite": "1e999",
    "NaN as text": '"NaN"',
}
MEASURES = "would measure"


@dataclass(frozen=True)
class Damage:
    """What is done to one file of a run. `apply` is given its path."""

    file: str
    name: str
    apply: Callable[[Path], object]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def damages(run_directory: Path) -> Iterator[Damage]:
    """All damages to each file of a run that is read again; of many files of one kind, to the first and the last."""
    files = [run_directory / "plan.json"]
    for folder in ("rounds", "cases", "failures", "predictions", "overlays"):
        found = sorted((run_directory / folder).glob("*.json"))
        files += [found[0], found[-1]] if len(found) > 1 else found
    for path in files:
        name = path.relative_to(run_directory).as_posix()
        content = path.read_bytes()
        for what, changed in (*changed_fields(content), *changed_bytes(content)):
            yield Damage(name, what, lambda path, changed=changed: path.write_bytes(changed))
        for what, apply in MISPLACED.items():
            yield Damage(name, what, apply)


def changed_fields(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Every field deleted, replaced or doubled; every object with a field too many; every list without its end."""
    whole = json.loads(content)
    for place in places(whole):
        where = ".".join(map(str, place))
        value = at(whole, place)
        if place:
            yield f"{where} deleted", changed(whole, place, None)
            if isinstance(place[-1], str):
                yield f"{where} twice", changed(whole, place, json.dumps(value), before="null")
        for name, text in VALUES.items():
            yield f"{where} {name}", changed(whole, place, text)
        if isinstance(value, dict):
            yield f"{where} has a field more", changed(whole, place, json.dumps({**value, "unknown": 1}))
        if isinstance(value, list) and value:
            yield f"{where} shorter", changed(whole, place, json.dumps(value[:-1]))
            yield f"{where} longer", changed(whole, place, json.dumps([*value, value[-1]]))


def changed_bytes(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Truncated in many places, not UTF-8, not JSON, another kind of JSON, with a byte order mark."""
    for end in sorted({0, 1, len(content) - 1, *range(0, len(content), max(1, len(content) // 20))}):
        yield f"truncated to {end} bytes", content[:end]
    for place in range(0, len(content), max(1, len(content) // 10)):
        yield f"not UTF-8 at {place}", content[:place] + b"\xff\xfe" + content[place:]
        yield f"zeros at {place}", content[:place] + bytes(len(content) - place)
    yield "not JSON", b"\x89PNG\r\n\x1a\n"
    yield "deeply nested", b"[" * 100_000
    yield "an endless number", b'{"case": ' + b"9" * 10_000 + b"}"
    yield "doubled", content + content
    yield "byte order mark", b"\xef\xbb\xbf" + content
    yield "UTF-16", content.decode().encode("utf-16")
    yield "blank lines", b"\n\n" + content + b"\n"


def _replace(path: Path, put: Callable[[], object]) -> None:
    path.unlink()
    put()


MISPLACED: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "a directory": lambda path: _replace(path, path.mkdir),
    "a pipe": lambda path: _replace(path, lambda: os.mkfifo(path)),
    "a link to nothing": lambda path: _replace(path, lambda: path.symlink_to("nothing")),
    "a link to itself": lambda path: _replace(path, lambda: path.symlink_to(path.name)),
    "a link to an endless device": lambda path: _replace(path, lambda: path.symlink_to("/dev/zero")),
    "a link to another file": lambda path: _replace(path, lambda: path.symlink_to(__file__)),
    "copied under another name": lambda path: shutil.copy(path, path.with_name("99999-009.json")),
    "copied as a hidden file": lambda path: shutil.copy(path, path.with_name("._" + path.name)),
    "copied as a backup": lambda path: shutil.copy(path, path.with_name(path.name + ".bak")),
    "its folder is a file": lambda path: (shutil.rmtree(path.parent), path.parent.write_text("")),
}


def places(value: Any, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all values in a JSON document. Of a list, the first and the last."""
    yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[index], (*here, index))


def at(value: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(value: Any, place: tuple[str | int, ...], text: str | None, before: str | None = None) -> bytes:
    """The document with other JSON text in a place, or without it. before: the text of the same key before it."""
    return _text(value, place, text, before).encode()


def _text(value: Any, place: tuple[str | int, ...], text: str | None, before: str | None) -> str:
    if not place:
        return text or ""
    first, *rest = place
    parts = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        said = f"{json.dumps(key)}:" if isinstance(value, dict) else ""
        if key != first:
            parts.append(said + json.dumps(inner))
        elif rest or text is not None:
            if before is not None and not rest:
                parts.append(said + before)
            parts.append(said + _text(inner, tuple(rest), text, before))
    return f"{{{','.join(parts)}}}" if isinstance(value, dict) else f"[{','.join(parts)}]"


class Reader:
    """Reads a run in every way and tells what came of it: "equal", "refused", "different" or a defect."""

    def __init__(self, run_directory: Path, other: Path) -> None:
        self.run = run_directory
        page = run_directory.parent / "page.html"
        self.ways: dict[str, tuple[object, ...]] = {
            "report": ("report", run_directory, "--json"),
            "merge": ("report", other, run_directory, "--json"),
            "page": ("report", run_directory, "--export", page, "--quiet"),
            "resume": ("compare", "--run-dir", run_directory, "--resume", "--json", "--quiet"),
        }
        self.page = page
        with without_measuring():
            self.usual = {way: self._output(way) for way in self.ways}
        assert all(code == 0 for code, *_ in self.usual.values()), self.usual

    def _output(self, way: str) -> tuple[int, str, str]:
        self.page.unlink(missing_ok=True)
        result = run(*self.ways[way])
        if result.exception and not isinstance(result.exception, SystemExit):
            return -1, "", f"{type(result.exception).__name__}: {result.exception}"
        if way == "page":
            return result.exit_code, self.page.read_text() if self.page.exists() else "", result.stderr
        return result.exit_code, result.stdout, result.stderr

    def outcome(self, way: str) -> tuple[str, str]:
        """What came of reading the run now, and what was said."""
        code, output, said = self._output(way)
        if code == 0:
            if output == self.usual[way][1]:
                return "equal", ""
            interrupted = "interrupted" in output if way == "page" else json.loads(output)["interrupted"]
            return "interrupted" if interrupted else "different", ""
        first, *rest = said.splitlines() or [""]
        if code == 2 and not output and first.startswith("error: ") and all(r.startswith("hint: ") for r in rest):
            return (MEASURES if MEASURES in first else "refused"), said
        return "defect", f"{code} {said}"


@contextmanager
def without_measuring() -> Iterator[None]:
    """A run that is resumed and not complete is not measured."""

    def refuse(*_: Any) -> None:
        raise MMTokError(MEASURES)

    with patch("mmtok_cli.comparison.ComparisonRun._prepare", refuse):
        yield


@contextmanager
def damaged(run_directory: Path, damage: Damage) -> Iterator[None]:
    """The run with a damage, which is repaired afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "run"
        shutil.copytree(run_directory, saved)
        try:
            damage.apply(run_directory / damage.file)
            yield
        finally:
            if run_directory.is_dir():
                shutil.rmtree(run_directory)
            else:
                run_directory.unlink()
            shutil.move(saved, run_directory)


def main(run_directory: Path, other: Path, step: int = 1) -> None:
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hangs")))
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(dir=None) as scratch, without_measuring():
        copy = Path(scratch) / "run"
        shutil.copytree(run_directory, copy)
        reader = Reader(copy, other)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        everything = list(damages(copy))
        random.Random(0).shuffle(everything)
        for damage in everything[::step]:
            with damaged(copy, damage):
                for way in reader.ways:
                    signal.alarm(20)
                    start = time.monotonic()
                    found, said = reader.outcome(way)
                    signal.alarm(0)
                    counts[way, found] += 1
                    named = str(copy) in said
                    if found in ("defect", "different") or (found == "refused" and not named):
                        sys.stdout.write(f"{found:10} {way:7} {damage}: {' '.join(said.split())[:150]}\n")
                    if time.monotonic() - start > 5:
                        sys.stdout.write(f"slow       {way:7} {damage}\n")
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if now > most + 100_000:
                sys.stdout.write(f"memory     {damage}: {(now - most) // 1024} MiB more\n")
                most = now
    sys.stdout.write(f"{len(everything[::step])} damages\n")
    for (way, found), number in sorted(counts.items()):
        sys.stdout.write(f"{way:7} {found:14} {number}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
