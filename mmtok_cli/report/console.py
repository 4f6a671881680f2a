"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.progress import Progress, Update
from mmtok_cli.report.text import printable, printable_json
from mmtok_cli.results.schema import json_text


class StandardOutputError(OSError):
    """Standard output cannot be written."""


@contextmanager
def _writing_results() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StandardOutputError(error.errno, error.strerror or str(error)) from error


class ResultsConsole(Console):
    """Standard output: results and nothing else. Raises StandardOutputError where they cannot be written."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        with _writing_results():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Rich would end the program, and with it what is still to be done."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class NotesConsole(Console):
    """Standard error: progress, warnings, hints. What cannot be written there is dropped, since it must not stop the
    work."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Rich would end the program."""


def results_console() -> ResultsConsole:
    return ResultsConsole()


def notes_console(quiet: bool = False) -> NotesConsole:
    return NotesConsole(quiet)


def print_json(result: BaseModel | dict[str, Any]) -> None:
    """One JSON object on standard output, unwrapped and uncoloured. Raises StandardOutputError."""
    out = results_console()
    ascii_only = not out.encoding.startswith("utf")
    text = printable_json(json_text(result, indent=2), ascii_only=ascii_only) + "\n"
    with _writing_results():
        out.file.write(text)
        out.file.flush()


def attempt_all(parts: Iterable[Callable[[], object]]) -> bool:
    """Do every part of the output, whatever happens to those before it. Whether all of them succeeded.

    What went wrong is printed, unless the reader of standard output is gone. An interruption, which costs
    only the part that it falls into, and a defect of the code are raised after the last part.
    """
    succeeded, stop = True, None
    for part in parts:
        try:
            part()
        except MMTokError as error:
            succeeded = False
            print_error(error)
        except OSError as error:
            succeeded = False
            print_system_error(error)
        except (Exception, KeyboardInterrupt) as error:
            stop = stop or error
    if stop:
        raise stop
    return succeeded


def print_system_error(error: OSError) -> None:
    """Say what cannot be read or written: standard output, unless its reader is gone, or a file where it is known."""
    reason = error.strerror or first_line(error)
    if not isinstance(error, StandardOutputError):
        print_error(MMTokError(f"{error.filename}: {reason}" if error.filename is not None else reason))
    elif error.errno != errno.EPIPE:
        print_error(MMTokError(f"standard output could not be written: {reason}"))


def print_error(error: MMTokError) -> None:
    console = notes_console()
    console.print(Text.assemble(("error: ", "bold red"), printable(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), printable(error.hint)), soft_wrap=True)


def progress_bar(quiet: bool) -> ProgressBar:
    """A bar on standard error that disappears when it is done; none if that is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = notes_console(quiet)
    return ProgressBar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


class ConsoleProgress(Progress):
    """Shows progress and notes on standard error, unless `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    @contextmanager
    def task(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Update]:
        with progress_bar(self._quiet) as bar:
            task = bar.add_task(printable(name), total=total, completed=done)
            yield lambda done, total=None: bar.update(task, completed=done, total=total)

    def note(self, text: str) -> None:
        notes_console(self._quiet).print(f"• {printable(text)}", soft_wrap=True)
