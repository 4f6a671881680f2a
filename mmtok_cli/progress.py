"""How long-running work reports what it is doing. This class ignores it; the command line shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Update(Protocol):
    """Reports how much of a task is done, and how much there is where that has changed."""

    def __call__(self, done: int, total: int | None = None) -> None: ...


class Progress:
    """Ignores everything."""

    @contextmanager
    def task(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Update]:
        """A task that is running while the context is open. total: None if it is not known."""
        yield lambda done, total=None: None

    def note(self, text: str) -> None:
        """Something that the user may want to know."""
