"""Errors that other libraries raise over damaged or unsuitable files of a model, as errors of the user's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmtok_cli.errors import MMTokError, is_out_of_memory

COMPARE = "compare it with the original, or download it again"
LONGEST_MESSAGE = 200  # characters of another library's message; some list every class that they know


@contextmanager
def errors_as(what: str, hint: str) -> Iterator[None]:
    """Turn the errors that other libraries raise over damaged files into an MMTokError that begins with `what`.

    They raise whatever the damage leads to, a TypeError, KeyError or ZeroDivisionError as often as a ValueError. That
    memory ran out is no damage, and raised as it is.
    """
    try:
        yield
    except MMTokError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise MMTokError(
                f"{what}: it needs Python code of its own (auto_map), which is never run",
                "use a version of the model that transformers supports by itself",
            ) from error
        raise MMTokError(f"{what}: {summary(error)}", hint) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers package, which is written in Rust
            raise
        raise MMTokError(f"{what}: {summary(error)}", hint) from error


def summary(error: BaseException) -> str:
    """An error's message on one line, with its type where that is what tells most."""
    message = shorten(str(error), LONGEST_MESSAGE)
    bare = isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)) or not message
    return f"{type(error).__name__}: {message}" if bare else message


def shorten(text: str, length: int) -> str:
    """The text on one line, cut off where it is too long."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
