"""The directory of a run: its plan, and one file for everything that was measured, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtok_cli import __version__
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.records import AskedBatch
from mmtok_cli.files import write_whole
from mmtok_cli.results.records import Counted, Failure, Plan, Run, digest
from mmtok_cli.results.schema import Kind, Record, from_json, json_text

PLAN = "plan.json"
PLAN_FORMAT = Plan.model_fields["schema_"].default


class NotWrittenError(MMTokError):
    """Something that was measured could not be written down."""


class RunDirectory:
    """What is known of a run, in memory and in its directory.

    `plan.json`, `rounds/ROUND-CASE.json` for each case in each round, `cases/CASE.json` for what is counted once,
    `failures/CASE.json`, and `quality/BATCH.json` for what all cases said to a batch of samples. However the process
    ends, a file is there whole or not at all.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.runs: dict[tuple[int, int], Run] = {}
        self.counted: dict[int, Counted] = {}
        self.failures: dict[int, Failure] = {}
        self.asked: dict[int, AskedBatch] = {}
        self.key = digest([case.key for case in plan.cases])

    @classmethod
    def create(cls, path: Path, plan: Plan) -> RunDirectory:
        """A new run. Raises NotWrittenError where that cannot be."""
        _write(path / PLAN, plan)
        return cls(path, plan)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """A run that was begun. Raises MMTokError where there is none, and for a file that cannot be read."""
        if not (path / PLAN).is_file():
            raise MMTokError(f"{path} holds no run: there is no {PLAN} in it", "name one with --run-dir")
        _require_format(path / PLAN)
        directory = cls(path, _read(path / PLAN, Plan))
        keys = [case.key for case in directory.plan.cases]
        for file in sorted((path / "rounds").glob("*.json")):
            run = _read(file, Run)
            _require_key(file, run.case, run.key, keys)
            directory.runs[run.round, run.case] = run
        for file in sorted((path / "cases").glob("*.json")):
            counted = _read(file, Counted)
            _require_key(file, counted.case, counted.key, keys)
            directory.counted[counted.case] = counted
        for file in sorted((path / "failures").glob("*.json")):
            failure = _read(file, Failure)
            _require_key(file, failure.case, failure.key, keys)
            directory.failures[failure.case] = failure
        for file in sorted((path / "quality").glob("*.json")):
            asked = _read(file, AskedBatch)
            _require_key(file, 0, asked.key, [directory.key])
            directory.asked[asked.batch] = asked
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from measuring into the same directory, where the system knows such locks.

        Raises MMTokError where one does already.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.path / PLAN).open(encoding="utf-8") as plan:  # closing it gives the lock back, and so does dying
            try:
                fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MMTokError(
                    f"{self.path} is being measured into", "wait until that is done, or stop it"
                ) from error
            yield

    def add(self, run: Run) -> None:
        """Keep what was measured. Raises NotWrittenError where that cannot be; it is kept in memory nonetheless."""
        self.runs[run.round, run.case] = run
        _write(self.path / "rounds" / f"{run.round:05d}-{run.case:03d}.json", run)

    def count(self, counted: Counted) -> None:
        """Keep what is counted once. Raises NotWrittenError where that cannot be."""
        self.counted[counted.case] = counted
        _write(self.path / "cases" / f"{counted.case:03d}.json", counted)

    def fail(self, failure: Failure) -> None:
        """Give a case up. Raises NotWrittenError where that cannot be written."""
        self.failures[failure.case] = failure
        _write(self.path / "failures" / f"{failure.case:03d}.json", failure)

    def keep(self, asked: AskedBatch) -> None:
        """Keep what was said to a batch. Raises NotWrittenError where that cannot be written."""
        self.asked[asked.batch] = asked
        _write(self.path / "quality" / f"{asked.batch:06d}.json", asked)

    def write_result(self, result: Record) -> None:
        """Leave the result beside what it was made from."""
        _write(self.path / "comparison.json", result)


def newest_run(runs: Path) -> Path:
    """The run that was begun last. Raises MMTokError where there is none."""
    plans = sorted(runs.glob(f"*/{PLAN}"), key=lambda plan: plan.stat().st_mtime)
    if not plans:
        raise MMTokError(f"there is no run to resume in {runs}", "name its directory with --run-dir")
    return plans[-1].parent


def _write(path: Path, record: Record) -> None:
    try:
        write_whole(path, lambda part: part.write_text(json_text(record), encoding="utf-8"))
    except MMTokError as error:
        raise NotWrittenError(error.message, "make room there, then go on with --resume") from error


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "begin a new run" if path.name == PLAN else "delete this file; what it held will be measured again"
        raise MMTokError(f"{path} cannot be read", hint) from error


def _require_format(path: Path) -> None:
    """Refuse a plan that another version of mmtok wrote in another format."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        found, version = written["schema"], written["environment"]["mmtok"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # reading it as a plan says what is wrong
    if found != PLAN_FORMAT:
        raise MMTokError(
            f"{path.parent} was written by mmtok {version} in the format {found}; "
            f"mmtok {__version__} reads {PLAN_FORMAT}",
            f"read it with mmtok {version}, or start a new run in another directory",
        )


def _require_key(path: Path, case: int, key: str, keys: list[str]) -> None:
    if not 0 <= case < len(keys) or keys[case] != key:
        raise MMTokError(f"{path} belongs to another run than its {PLAN}", "delete this file, or begin a new run")
