"""The arguments of lmms-eval's `--model_args`, which are spelled like the options of `mmtok compare`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtok_cli.errors import MMTokError
from mmtok_cli.settings import LmmsSettings, option_name

SET = "set"
HELP = "`mmtok infer --help` explains the options, whose names are those of the arguments"
ELSEWHERE_CALLED = {  # by lmms-eval's own models, or by `mmtok compare`
    "pretrained": "model",
    "methods": "method",
    "attn-implementation": "attention",
    "torch-dtype": "dtype",
}
# A part of "a=1,b=[2,3]": commas within quotes and brackets do not separate.
PART = re.compile(r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|[^,])+""")


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments of `--model_args` by name, as texts; `set` may be repeated and is a list.

    Raises MMTokError for a part that is not `name=value`, and for a name that occurs twice.
    """
    found: dict[str, Any] = {}
    for part in map(str.strip, PART.findall(text)):
        if not part:
            continue
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not name:
            raise MMTokError(
                f"{part!r} in --model_args is not name=value",
                "as in method=mmtok,budget=64: one method at one budget; `mmtok compare --tasks` compares several",
            )
        key, value = _key(name), _unquoted(value)
        if key == SET:
            found[key] = [*found.get(key, []), *_listed(value)]
        elif key in found:
            raise MMTokError(f"--model_args has {name} twice", "give it once")
        else:
            found[key] = value
    return found


def merged(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with lmms-eval's own options of the same names: its --batch_size and --device.

    options: None stands for one that was not given, as does a batch size of 1, lmms-eval's default. Raises MMTokError
    for one that is not what an argument says.
    """
    found = dict(arguments)
    for name, value in options.items():
        if value is None or name == "max_batch_size":
            continue
        key = _key(name)
        before = found.setdefault(key, value)
        if str(before) != str(value) and (name, value) != ("batch_size", 1):
            raise MMTokError(f"--{name} is {value}, and --model_args has {name}={before}", "give it once")
    return found


def settings_of(arguments: Mapping[str, Any]) -> LmmsSettings:
    """The settings that arguments name, with the defaults of the others; None stands for a default.

    Values may be texts, as on a command line, or what lmms-eval makes of them. Raises MMTokError for an unknown name,
    and for a value that is not valid.
    """
    fields = {_key(option_name(LmmsSettings, name)): name for name in LmmsSettings.model_fields}
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        key = _key(name)
        if key not in fields:
            raise _unknown(name, list(fields))
        if value is None:
            continue
        if key == SET:
            values[fields[key]] = _listed(value) if isinstance(value, str) else list(map(str, value))
        else:
            values[fields[key]] = _as_text(value)
    if values.get("batch_size", "").startswith("auto"):
        raise MMTokError("batch_size auto is not supported", "give the number of samples, as in --batch_size 4")
    try:
        return LmmsSettings.of(**values)
    except MMTokError as error:
        raise MMTokError(_as_argument(error.message), _as_argument(error.hint)) from error


def _unknown(name: str, known: list[str]) -> MMTokError:
    if _key(name) == "max-new-tokens":
        return MMTokError(f"{name} is set by the task, not in --model_args", "change it with --gen_kwargs")
    near = difflib.get_close_matches(_key(name), known, n=1, cutoff=0.5)
    meant = [ELSEWHERE_CALLED[_key(name)]] if _key(name) in ELSEWHERE_CALLED else near
    hint = f"did you mean {meant[0]}? " if meant else ""
    return MMTokError(f"the model mmtok has no argument {name!r}", f"{hint}It has {', '.join(sorted(known))}")


def _key(name: str) -> str:
    """A name as lmms-eval writes names or as an option has it, with dashes."""
    return name.strip().removeprefix("--").replace("_", "-")


def _as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (str, int, float, Path)) else repr(value)


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _listed(text: str) -> list[str]:
    """The texts of a JSON list, or the one text."""
    if not text.startswith("["):
        return [text]
    try:
        return [str(each) for each in json.loads(text)]
    except ValueError as error:
        raise MMTokError(f"set={text} is not a list", 'as in set=["fastv.layer=3","mmtok.alpha=0.5"]') from error


def _as_argument(text: str) -> str:
    """What a message says of options, said of arguments: `budget` in place of `--budget`."""
    text = re.sub(r"(as in|use|add) --([a-z-]+) (?=[^\s,])", r"\1 \2=", text)
    text = re.sub(r"(?<![\w`])--([a-z][a-z-]+)", r"\1", text)
    return text.replace("`--help` explains every option", HELP)
