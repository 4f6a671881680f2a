"""The one exception that the command line turns into a clear line and exit status 2."""

import difflib
from collections.abc import Iterable


class MMTokError(Exception):
    """The user's input is at fault: `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def first_line(error: Exception) -> str:
    """The message of another library's error, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suggestion(name: str, known: Iterable[str], command: str) -> str:
    """A hint that names what was probably meant, and the command that lists everything."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"`{command}` lists them all"
