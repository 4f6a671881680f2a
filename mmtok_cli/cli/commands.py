"""Complete command lines in hints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mmtok_cli.errors import MMTokError, UnloadableError

# Options of `mmtok compare` that need answers, and whether they have a value.
NEED_ANSWERS = {"--retain": True, "--by": True, "--turns": True, "--encode-again": False, "--plot": True}


def with_complete_command(error: UnloadableError, arguments: Sequence[str]) -> MMTokError:
    """The error with the user's own command line in its hint, changed so that the model can be loaded.

    arguments: the command and what follows it. Where the command would show answers that mean nothing, the hint stays:
    it says how to measure the model.
    """
    command, options = arguments[0], dict(error.options)
    part = "--layers" in options
    random = "--weights" in options
    if (
        not options
        or "--resume" in arguments
        or error.model == _value_of("--draft", arguments)  # the options are about the model of --model
        or (random and command == "prune")
        or (command == "infer" and part | random)
    ):
        return error
    if command == "compare" and (random or part):
        options["--no-quality"] = ""
        arguments = _without_answers(arguments)
    if not any(each in ("-m", "--model") or each.startswith(("-m", "--model=")) for each in arguments):
        options["--model"] = error.model
    return MMTokError(error.message, f"{error.advice}: {shlex.join(['mmtok', *_changed(arguments, options)])}")


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option on a command line."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else next(iter(arguments[place + 1 :]), None)
    return None


def _without_answers(arguments: Sequence[str]) -> list[str]:
    """A command line of `mmtok compare` without the options that need answers."""
    kept, rest = list[str](), list(arguments)
    while rest:
        first = rest.pop(0)
        name, equals, value = first.partition("=")
        if name in NEED_ANSWERS:
            del rest[: NEED_ANSWERS[name] and not equals]
        elif name == "--export" and (value if equals else rest[0]).lower().endswith(".jsonl"):
            del rest[: not equals]
        else:
            kept.append(first)
    return kept


def _changed(arguments: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """A command line with options in place of what it says of them. An empty value stands for a flag."""
    command, *rest = arguments
    kept: list[str] = []
    while rest:
        first = rest.pop(0)
        name = first.partition("=")[0]
        if first == "--":
            kept += [first, *rest]
            break
        if name in options:
            if "=" not in first and options[name]:
                del rest[:1]  # its value
            continue
        kept.append(first)
    added = [part for name, value in options.items() for part in (name, value) if part]
    return [command, *added, *kept]
