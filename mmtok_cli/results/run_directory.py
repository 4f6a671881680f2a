"""The run directory: the plan, and one file for each result, each written completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtok_cli import __version__
from mmtok_cli.errors import MMTokError
from mmtok_cli.files import write_whole
from mmtok_cli.results.records import CountedFlops, Plan, PredictionBatch, TimedRun, TimingFailure, digest
from mmtok_cli.results.schema import Kind, Record, from_json, json_text

PLAN = "plan.json"
RECORDS = frozenset({PLAN, "comparison.json", "rounds", "cases", "failures", "predictions", "overlays"})
PLAN_FORMAT = Plan.model_fields["schema_"].default


class NotWrittenError(MMTokError):
    """A result could not be written to the run directory."""


class RunDirectory:
    """The results of a run, in memory and on disk.

    Files: `plan.json`, `rounds/ROUND-CASE.json` for each case in each round, `cases/CASE.json` for the FLOPs of a case,
    `failures/CASE.json`, and `predictions/BATCH.json` for the predictions of all cases for one batch of samples. A file
    is complete or missing, however the process ends.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.runs: dict[tuple[int, int], TimedRun] = {}
        self.counted: dict[int, CountedFlops] = {}
        self.failures: dict[int, TimingFailure] = {}
        self.predictions: dict[int, PredictionBatch] = {}
        self.key = digest([case.key for case in plan.cases])

    @classmethod
    def create(cls, path: Path, plan: Plan) -> RunDirectory:
        """Start a run. Raises NotWrittenError where the plan cannot be written."""
        _write(path / PLAN, plan)
        return cls(path, plan)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Read a run. Raises MMTokError for a path that is not a run directory, and for a file that cannot be read."""
        if not (path / PLAN).is_file():
            raise MMTokError(f"{path} is not a run directory: {PLAN} is missing", "name one with --run-dir")
        _require_format(path / PLAN)
        directory = cls(path, _read(path / PLAN, Plan))
        keys = [case.key for case in directory.plan.cases]
        for file in sorted((path / "rounds").glob("*.json")):
            run = _read(file, TimedRun)
            _require_key(file, run.case, run.key, keys)
            directory.runs[run.round, run.case] = run
        for file in sorted((path / "cases").glob("*.json")):
            counted = _read(file, CountedFlops)
            _require_key(file, counted.case, counted.key, keys)
            directory.counted[counted.case] = counted
        for file in sorted((path / "failures").glob("*.json")):
            failure = _read(file, TimingFailure)
            _require_key(file, failure.case, failure.key, keys)
            directory.failures[failure.case] = failure
        for file in sorted((path / "predictions").glob("*.json")):
            batch = _read(file, PredictionBatch)
            _require_key(file, 0, batch.key, [directory.key])
            directory.predictions[batch.batch] = batch
        return directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other processes from using the directory for a run, on systems with file locks.

        Raises MMTokError where another process uses it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.path / PLAN).open(encoding="utf-8") as plan:  # the lock ends when it is closed or the process ends
            try:
                fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MMTokError(
                    f"{self.path} is in use by another run", "wait until that run ends, or stop it"
                ) from error
            yield

    def add_run(self, run: TimedRun) -> None:
        """Save a timed run. Raises NotWrittenError where it cannot be written; it stays available in memory."""
        self.runs[run.round, run.case] = run
        _write(self.path / "rounds" / f"{run.round:05d}-{run.case:03d}.json", run)

    def add_flops(self, counted: CountedFlops) -> None:
        """Save the FLOPs of a case. Raises NotWrittenError where they cannot be written."""
        self.counted[counted.case] = counted
        _write(self.path / "cases" / f"{counted.case:03d}.json", counted)

    def add_failure(self, failure: TimingFailure) -> None:
        """Save why a case was given up. Raises NotWrittenError where it cannot be written."""
        self.failures[failure.case] = failure
        _write(self.path / "failures" / f"{failure.case:03d}.json", failure)

    def add_predictions(self, batch: PredictionBatch) -> None:
        """Save the predictions for one batch. Raises NotWrittenError where they cannot be written."""
        self.predictions[batch.batch] = batch
        _write(self.path / "predictions" / f"{batch.batch:06d}.json", batch)

    def write_result(self, result: Record) -> None:
        """Save the summary of the run."""
        _write(self.path / "comparison.json", result)


def newest_run(runs: Path) -> Path:
    """The run that was started last. Raises MMTokError where there is none."""
    plans = sorted(runs.glob(f"*/{PLAN}"), key=lambda plan: plan.stat().st_mtime)
    if not plans:
        raise MMTokError(f"there is no run to resume in {runs}", "name its directory with --run-dir")
    return plans[-1].parent


def _write(path: Path, record: Record) -> None:
    try:
        write_whole(path, lambda part: part.write_text(json_text(record), encoding="utf-8"))
    except MMTokError as error:
        raise NotWrittenError(error.message, "free disk space, then resume with --resume") from error


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "start a new run" if path.name == PLAN else "delete this file; its content will be measured again"
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
            "read it with the version that wrote it, or start a new run in another directory",
        )


def _require_key(path: Path, case: int, key: str, keys: list[str]) -> None:
    if not 0 <= case < len(keys) or keys[case] != key:
        raise MMTokError(f"{path} does not belong to the run of its {PLAN}", "delete this file, or start a new run")
