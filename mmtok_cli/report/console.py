"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from mmtok_cli.errors import MMTokError
from mmtok_cli.progress import Progress, Update
from mmtok_cli.results.schema import json_text


def results_console() -> Console:
    """Standard output: results and nothing else."""
    return Console(highlight=False, markup=False, emoji=False)


def notes_console(quiet: bool = False) -> Console:
    """Standard error: progress, warnings, hints."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)


def print_json(result: BaseModel | dict[str, Any]) -> None:
    """One JSON object on standard output, unwrapped and uncoloured."""
    results_console().file.write(json_text(result, indent=2) + "\n")


def print_error(error: MMTokError) -> None:
    console = notes_console()
    console.print(Text.assemble(("error: ", "bold red"), printable(error.message)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), printable(error.hint)), soft_wrap=True)


def printable(text: object) -> str:
    """Text whose undecodable bytes, which file names may hold, are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def progress_bar(quiet: bool) -> ProgressBar:
    """A bar on standard error that leaves no trace when it is done, and none at all where nobody is looking."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
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

    def warn(self, error: MMTokError) -> None:
        print_error(error)
