"""The one exception that the command line turns into a clear line and exit status 2."""

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping


class MMTokError(Exception):
    """The user's input is at fault: `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UnloadableError(MMTokError):
    """A model has no weights here or does not fit as it was asked for.

    advice: what can be done. options: those of the command line with which it can be loaded, by name; empty if there
    are none. The hint names a complete command: `mmtok profile` measures what it can of any model.
    """

    def __init__(self, message: str, advice: str, model: str = "", options: Mapping[str, str] | None = None) -> None:
        self.options = options or {}
        self.model = model
        self.advice = advice
        super().__init__(
            message, f"{advice}: {shlex.join(('mmtok', 'profile', '--model', model))}" if model else advice
        )


class MethodFaultError(MMTokError):
    """A reduction method does not do what a method must. package: the one that it comes from."""

    def __init__(self, message: str, package: str) -> None:
        super().__init__(
            message,
            f"report it to the authors of {package}; if the method is yours, `python -m pydoc mmtok_cli.methods.base` "
            "says what it must do",
        )


LONGEST_LINE = 300
OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory|_ALLOC(ATION)?_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on the host.

    Only some parts of torch raise OutOfMemoryError for that; TorchScript, cuBLAS, cuDNN, safetensors and the allocators
    of other devices have nothing but a message.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The errors of TorchScript and safetensors derive from neither.
    package = type(error).__module__.partition(".")[0]
    known = isinstance(error, (RuntimeError, OSError)) or package in ("torch", "safetensors")
    return known and bool(OUT_OF_MEMORY.search(" ".join(map(str, error.args))))


def first_line(error: BaseException) -> str:
    """The message of another library's error, in one line of at most `LONGEST_LINE` characters."""
    try:
        text = str(error).strip()
    except Exception:  # of another package, whose errors may have errors
        text = ""
    line = (text or type(error).__name__).splitlines()[0]
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"


def suggestion(name: str, known: Iterable[str], command: str) -> str:
    """A hint that names what was probably meant, and the command that lists everything."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"`{command}` lists them all"
