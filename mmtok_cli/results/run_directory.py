"""The run directory: the plan, and one file for each result, each written completely or not at all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError
from pydantic_core import from_json as parse_json

from mmtok_cli import __version__
from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.files import remove_temporary_files, write_whole
from mmtok_cli.results.records import (
    ConversationRecord,
    CountedFlops,
    FileRecord,
    Plan,
    PredictionBatch,
    TaskScores,
    TimedRun,
    TimingFailure,
    digest,
)
from mmtok_cli.results.schema import Record, from_json, json_text

PLAN = "plan.json"
LOCK = "lock"
FOLDERS = ("rounds", "cases", "failures", "predictions", "conversations", "overlays")
RESULT = "comparison.json"
TASKS = "tasks.json"  # scores by the tasks of lmms-eval
SEARCH = "search.json"  # of a search for budgets
SEARCH_STEPS, SEARCH_TIMING, SEARCH_RESULT = "search", "timing", "retention.json"
RECORDS = (PLAN, RESULT, TASKS, *FOLDERS, SEARCH, SEARCH_STEPS, SEARCH_TIMING, SEARCH_RESULT, LOCK)
PLAN_FORMAT = Plan.model_fields["schema_"].default
LARGEST = 2**28  # bytes of one file

Kind = TypeVar("Kind", bound=Record)
Saved = TypeVar("Saved", bound=FileRecord)


class NotWrittenError(MMTokError):
    """A result could not be written to the run directory."""


class RecordDirectory:
    """A directory whose files are written whole or not at all, by the process that has locked it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: os.stat_result | None = None

    def write_result(self, result: Record, name: str = RESULT) -> None:
        """Save the summary of the run. Raises NotWrittenError where it cannot be written."""
        self._write(name, result)

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a file of the run, which is written whole or not at all.

        Raises NotWrittenError where it cannot be written, and where the directory was renamed or deleted.
        """
        self._require_unmoved()
        path = self.path / name
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, write, parents=False)
        except FileExistsError as error:
            raise NotWrittenError(
                f"{path.parent} is not a directory", "move it away, then resume with --resume"
            ) from error
        except (MMTokError, OSError) as error:
            message = error.message if isinstance(error, MMTokError) else f"{path} could not be written: {error}"
            raise NotWrittenError(message, "free disk space, then resume with --resume") from error

    def _require_unmoved(self) -> None:
        """Raises NotWrittenError where the directory was renamed or deleted since it was locked.

        What would be written then would start another directory, without a plan.
        """
        if self._lock is None:
            raise ValueError("a run is written under its lock: use `create` or `resume`")
        try:
            unmoved = os.path.samestat((self.path / LOCK).stat(), self._lock)
        except OSError:
            unmoved = False
        if not unmoved:
            raise NotWrittenError(
                f"{self.path} was renamed or deleted during the run, so no more results can be saved",
                "if it was renamed, resume with --resume and its new name as --run-dir",
            )

    @property
    def _is_empty(self) -> bool:
        """Whether nothing was measured yet."""
        return True

    @contextmanager
    def _started(self, name: str, plan: Record) -> Iterator[None]:
        """Lock the directory and write the plan, which is removed again where nothing can be measured.

        Raises MMTokError where another process uses the directory, and where a run is in it already.
        """
        path = self.path
        created = [place for place in (path / LOCK, path, *path.parents) if not os.path.lexists(place)]
        with locked(path) as lock:
            require_no_run(path)
            self._lock = lock
            self._write(name, plan)
            try:
                yield
            except MMTokError:
                if self._is_empty:
                    self._remove_new(name, created)
                raise

    def _remove_new(self, plan: str, created: Sequence[Path]) -> None:
        """Remove a plan, and the lock file and the directories that did not exist before, the innermost first."""
        with suppress(OSError):
            (self.path / plan).unlink()
            for place in created:
                if place == self.path / LOCK:
                    place.unlink()
                else:
                    place.rmdir()

    def _write(self, name: str, record: Record) -> None:
        self.write_file(name, lambda part: part.write_text(json_text(record), encoding="utf-8"))


class RunDirectory(RecordDirectory):
    """The results of a run, in memory and on disk.

    Files: `plan.json`, `rounds/ROUND-CASE.json` for each case in each round, `cases/CASE.json` for the FLOPs of a case,
    `failures/CASE.json`, `predictions/BATCH.json` for the predictions of all cases for one batch of samples,
    `conversations/SAMPLE.json` for a conversation with all cases, and `tasks.json` for the scores by tasks of
    lmms-eval. A file is complete or missing, however the process ends. `lock` is locked by the process that measures.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        super().__init__(path)
        self.plan = plan
        self.runs: dict[tuple[int, int], TimedRun] = {}
        self.counted: dict[int, CountedFlops] = {}
        self.failures: dict[int, TimingFailure] = {}
        self.predictions: dict[int, PredictionBatch] = {}
        self.conversations: dict[int, ConversationRecord] = {}
        self.task_scores: TaskScores | None = None
        self.key = digest([case.key for case in plan.cases])

    @classmethod
    @contextmanager
    def create(cls, path: Path, plan: Plan) -> Iterator[RunDirectory]:
        """Start a run, locked until the context is left.

        Raises MMTokError where another process uses the directory, and where a run is in it already; NotWrittenError
        where the plan cannot be written.
        """
        directory = cls(path, plan)
        with directory._started(PLAN, plan):
            yield directory

    @classmethod
    @contextmanager
    def resume(cls, path: Path) -> Iterator[RunDirectory]:
        """Lock the directory of a run until the context is left, and read it. Raises what `open` does, and MMTokError
        where another process uses the directory."""
        require_run(path)
        with locked(path) as lock:
            for folder in (path, *(path / name for name in FOLDERS)):
                remove_temporary_files(folder)
            directory = cls.open(path)
            directory._lock = lock
            yield directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Read a run. Raises MMTokError for a path that is not a run directory, and for a file that cannot be used."""
        directory = cls(path, read_plan(path))
        for run in records_in(path / "rounds", TimedRun, directory._check_run):
            directory.runs[run.round, run.case] = run
        for counted in records_in(path / "cases", CountedFlops, directory._check_key):
            directory.counted[counted.case] = counted
        for failure in records_in(path / "failures", TimingFailure, directory._check_key):
            directory.failures[failure.case] = failure
        for batch in records_in(path / "predictions", PredictionBatch, directory._check_predictions):
            directory.predictions[batch.batch] = batch
        for record in records_in(path / "conversations", ConversationRecord, directory._check_conversation):
            directory.conversations[record.conversation] = record
        if (path / TASKS).exists():
            directory.task_scores = directory._read_task_scores()
        return directory

    def add_run(self, run: TimedRun) -> None:
        """Save a timed run. Raises NotWrittenError where it cannot be written; it stays available in memory."""
        self.runs[run.round, run.case] = run
        self._write(f"rounds/{run.file_name}", run)

    def add_flops(self, counted: CountedFlops) -> None:
        """Save the FLOPs of a case. Raises NotWrittenError where they cannot be written."""
        self.counted[counted.case] = counted
        self._write(f"cases/{counted.file_name}", counted)

    def add_failure(self, failure: TimingFailure) -> None:
        """Save why a case was given up. Raises NotWrittenError where it cannot be written."""
        self.failures[failure.case] = failure
        self._write(f"failures/{failure.file_name}", failure)

    def add_predictions(self, batch: PredictionBatch) -> None:
        """Save the predictions for one batch. Raises NotWrittenError where they cannot be written."""
        self.predictions[batch.batch] = batch
        self._write(f"predictions/{batch.file_name}", batch)

    def add_conversation(self, record: ConversationRecord) -> None:
        """Save a conversation with all cases. Raises NotWrittenError where it cannot be written."""
        self.conversations[record.conversation] = record
        self._write(f"conversations/{record.file_name}", record)

    def add_task_scores(self, scores: TaskScores) -> None:
        """Save the scores of tasks. Raises NotWrittenError where they cannot be written."""
        self.task_scores = scores
        self._write(TASKS, scores)

    def _read_task_scores(self) -> TaskScores:
        hint = "delete this file and resume the run; its content will be computed again"
        scores = parsed(self.path / TASKS, read_file(self.path / TASKS), TaskScores, hint)
        if scores.key != self.key:
            raise MMTokError(f"{self.path / TASKS} does not belong to the run of its {PLAN}", hint)
        return scores

    @property
    def _is_empty(self) -> bool:
        return not (self.runs or self.counted or self.failures or self.predictions or self.conversations)

    def _check_key(self, record: TimedRun | CountedFlops | TimingFailure) -> None:
        if record.case >= len(self.plan.cases) or record.key != self.plan.cases[record.case].key:
            raise ValueError(f"it does not belong to the run of its {PLAN}")

    def _check_run(self, run: TimedRun) -> None:
        self._check_key(run)
        size = self.plan.cases[run.case].case.batch_size
        if run.batch != self.plan.rotation().batch_in(size, run.round):
            raise ValueError("the case does not run on this batch in this round")
        if len(run.samples) != size:
            raise ValueError("the number of samples is not the batch size")
        if any(len(values) != self.plan.runs for values in run.repetitions.values()):
            raise ValueError("the number of repetitions is not that of the plan")

    def _check_predictions(self, batch: PredictionBatch) -> None:
        if batch.key != self.key:
            raise ValueError(f"it does not belong to the run of its {PLAN}")
        size = batch.batch_size
        cases = {number for number, planned in enumerate(self.plan.cases) if planned.case.batch_size == size}
        if not cases or len(batch.samples) != min(size, self.plan.samples - batch.batch * size):
            raise ValueError("the number of samples is not that of the batch in the plan")
        if not {each.case for each in batch.predictions} | {each.case for each in batch.failures} <= cases:
            raise ValueError("it has predictions of cases that the plan does not have at this batch size")
        if self.plan.metric is None and any(prediction.score is not None for prediction in batch.predictions):
            raise ValueError("it has scores, and the plan has no metric")

    def _check_conversation(self, record: ConversationRecord) -> None:
        if record.key != self.key or record.conversation >= self.plan.samples:
            raise ValueError(f"it does not belong to the run of its {PLAN}")
        if not {*record.by_case, *((each.case, each.policy) for each in record.failures)} <= set(
            self.plan.conversation_cases
        ):
            raise ValueError("it has cases or policies that the plan does not have")
        if self.plan.metric is None and any(turn.score is not None for run in record.runs for turn in run.turns):
            raise ValueError("it has scores, and the plan has no metric")


def read_plan(path: Path) -> Plan:
    """The plan of the run in a directory. Raises MMTokError where there is none, and for one that cannot be used."""
    require_run(path)
    content = read_file(path / PLAN)
    _require_format(path, content)
    return parsed(path / PLAN, content, Plan, "restore the file, or start a new run in another directory")


def require_run(path: Path) -> None:
    """Raises MMTokError for a path that is not a run directory."""
    try:
        (path / PLAN).stat()
    except OSError as error:
        why = f"{PLAN} is missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise MMTokError(
            f"{path} is not a run directory: {why}", "name a directory that `mmtok compare` wrote"
        ) from error


def require_no_run(path: Path) -> None:
    """Raises MMTokError for a directory in which a run cannot be started, since it holds one or what is left of one."""
    for name in (PLAN, RESULT, TASKS, *FOLDERS, SEARCH):
        if os.path.lexists(path / name):
            what = "a run" if name in (PLAN, SEARCH) else f"{name} of a run without its {PLAN}"
            how = "add --resume to continue it, or choose" if name in (PLAN, SEARCH) else "choose"
            raise MMTokError(f"{path} already contains {what}", f"{how} another directory")


def newest_run(runs: Path) -> Path:
    """The run that was started last. Raises MMTokError where there is none."""
    named = (plan for name in (PLAN, SEARCH) for plan in runs.glob(f"*/{name}"))
    plans = sorted((plan.stat().st_mtime, plan) for plan in named if plan.is_file())
    if not plans:
        raise MMTokError(f"there is no run to resume in {runs}", "name its directory with --run-dir")
    return plans[-1][1].parent


def read_file(path: Path) -> bytes:
    """The content of a file of a run. Raises MMTokError for anything else than a regular file of a sensible size."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, "it is not a regular file")
        if found.st_size > LARGEST:
            raise OSError(None, f"it is larger than {LARGEST // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise MMTokError(f"{path} cannot be read: {error.strerror}", "restore or delete it") from error


def validation_message(error: ValueError) -> str:
    """Which field of a file is wrong, and what is wrong with it, in one line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


@contextmanager
def locked(path: Path) -> Iterator[os.stat_result]:
    """Keep other processes out of a directory, which is created if necessary; yields the status of its lock file.

    The lock ends with the process; the file stays, since others may wait for it. Raises MMTokError where another
    process has the lock, and where there can be none.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
        status = (path / LOCK).stat()
    except Timeout as error:
        raise MMTokError(f"{path} is in use by another run", "wait until that run ends, or stop it") from error
    except (OSError, NotImplementedError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise MMTokError(
            f"{path / LOCK} cannot be locked: {why}", "choose a directory that can be written to"
        ) from error
    try:
        yield status
    finally:
        lock.release()


def records_in(folder: Path, kind: type[Saved], check: Callable[[Saved], None]) -> Iterator[Saved]:
    """The records in a folder, which need not exist, each in the file that has its name."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".json" and not file.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise MMTokError(f"{folder} cannot be read: {error.strerror}", "restore this directory") from error

    hint = "delete this file and resume the run; its content will be measured again"
    for file in files:
        record = parsed(file, read_file(file), kind, hint)
        try:
            if record.file_name != file.name:
                raise ValueError(f"it is the content of {record.file_name}")
            check(record)
        except ValueError as error:
            raise MMTokError(f"{file} cannot be read: {error}", hint) from error
        yield record


def parsed(path: Path, content: bytes, kind: type[Kind], hint: str) -> Kind:
    """A record from the content of its file. Raises MMTokError that names the file and says what is wrong with it."""
    try:
        parse_json(content, allow_inf_nan=False)  # JSON has no NaN, and json_text writes none
        return from_json(kind, content, strict=True)
    except ValueError as error:
        raise MMTokError(f"{path} cannot be read: {validation_message(error)}", hint) from error
    except MMTokError as error:  # of settings
        raise MMTokError(f"{path} cannot be read: {error.message}", hint) from error


def _require_format(path: Path, content: bytes) -> None:
    """Refuse a plan that another version of mmtok wrote in another format."""
    try:
        written = parse_json(content)
        found, version = str(written["schema"]), str(written["environment"]["mmtok"])
    except (ValueError, KeyError, TypeError):
        return  # reading it as a plan says what is wrong
    number = re.fullmatch(r"mmtok\.plan/([0-9]{1,9})", found)
    if number is None or found == PLAN_FORMAT:
        return
    newer = int(number[1]) > int(PLAN_FORMAT.rpartition("/")[2])
    raise MMTokError(
        f"{path} was written by {'a newer' if newer else 'an older'} version, mmtok {version}, in the format {found}; "
        f"mmtok {__version__} reads {PLAN_FORMAT}",
        "upgrade mmtok, or read it with the version that wrote it"
        if newer
        else "read it with the version that wrote it, or start a new run in another directory",
    )
