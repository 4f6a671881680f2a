"""Text of users, files and models, made safe to show: nothing in it controls the terminal, the page or the sheet."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from mmtok_cli.results.schema import Kind

JOINERS = "\u200c\u200d"  # parts of emoji and of words in several scripts; all other format characters are escaped


def printable(text: object) -> str:
    """Text on one line without control characters, escape sequences or changes of the writing direction.

    These are shown as in Python: `\\x1b`, `\\n`, `\\u202e`; so are undecodable bytes, which file names may hold.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in shown)


def printable_lines(text: str) -> str:
    """Text of several lines, each printable; all but the first are indented, so that none looks like a new output."""
    return "\n  ".join(map(printable, text.splitlines()))


def printable_data(value: Any) -> Any:
    """Plain data with every text in it printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_data(key): printable_data(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [printable_data(inner) for inner in value]
    return value


def printable_record(record: Kind) -> Kind:
    """The record with every text in it printable."""
    return type(record).model_validate(printable_data(record.model_dump(by_alias=True)))


def printable_json(text: str, *, ascii_only: bool = False) -> str:
    """JSON of the same content whose strings hold neither control nor format characters, or nothing but ASCII."""
    return "\n".join(
        line if line.isprintable() and (line.isascii() or not ascii_only) else _with_escapes(line, ascii_only)
        for line in text.split("\n")
    )


def _with_escapes(line: str, ascii_only: bool) -> str:
    def escape(c: str) -> str:
        return json.dumps(c)[1:-1] if c > "\uffff" else f"\\u{ord(c):04x}"  # JSON has two escapes for one of the former

    return "".join(c if _is_visible(c) and (c.isascii() or not ascii_only) else escape(c) for c in line)


def _is_visible(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in JOINERS
