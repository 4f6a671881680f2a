"""What the values of options may be: each as it is given, checked and in its usual form.

Everything here raises MMTokError for what is not valid. Nothing imports torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator

from mmtok_cli.budget import Budget, parse_budgets
from mmtok_cli.errors import MMTokError
from mmtok_cli.rules import FIXED, NATIVE, TurnPolicy, fixed_tokens, require_scale

LARGEST_BATCH = 10_000
LARGEST_SIDE = 10_000  # pixels of an image
TEXT_DRAFT = "text:"  # begins a draft that is given as a text
LEAST_RETAINED, MOST_RETAINED = 10.0, 99.9  # percent; that all of it is kept can never be shown


def _split(value: Any) -> Any:
    """ "a, b,a" as ("a", "b"); other values as they are."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        return parts
    return tuple(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))


def methods_of(value: Any) -> Any:
    names = _split(value)
    if not names:
        raise MMTokError("no method was named", "name some of those that `mmtok methods` lists")
    return tuple(map(_method, names)) if isinstance(names, tuple) else names


def _method(text: str) -> str:
    """ "mmtok @ 64" as "mmtok@64"."""
    name, at, budget = (part.strip() for part in text.partition("@"))
    return f"{name}@{Budget.parse(budget)}" if at else name


def budgets_of(value: Any) -> Any:
    if isinstance(value, (int, Budget)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, (str, list, tuple)):
        return value
    text = value if isinstance(value, str) else ",".join(map(str, value))
    return tuple(map(str, parse_budgets(text)))


def _batch_sizes(value: Any) -> Any:
    return _sizes(value, "batch size", "--batch-size 1,8")


def _concurrencies(value: Any) -> Any:
    return _sizes(value, "number of requests in flight", "--concurrency 1,4,16")


def _sizes(value: Any, what: str, example: str) -> tuple[int, ...]:
    sizes = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    for size in sizes:
        if not re.fullmatch(r"\s*[0-9]{1,6}\s*", str(size)) or not 1 <= int(size) <= LARGEST_BATCH:
            raise MMTokError(
                f"{str(size).strip()!r} is not a {what}",
                f"give one or several from 1 to {LARGEST_BATCH}, as in {example}",
            )
    return tuple(dict.fromkeys(map(int, sizes)))


def _turn_policies(value: Any) -> Any:
    policies = _split(value)
    for policy in policies if isinstance(policies, tuple) else ():
        _turn_policy(policy)
    if policies == ():
        _turn_policy("")
    return policies


def _turn_policy(value: str) -> str:
    if value not in get_args(TurnPolicy):
        raise MMTokError(f"--turns {value!r} is not a policy", f"choose among {', '.join(get_args(TurnPolicy))}")
    return value


def _scales(value: Any) -> Any:
    """ "1,0.50" as ("1", "0.5")."""
    scales = _split(value if isinstance(value, (str, list, tuple)) else [value])
    if not scales:
        require_scale("")
    return tuple(dict.fromkeys(map(_scale, scales))) if isinstance(scales, tuple) else scales


def _scale(value: Any) -> str:
    scale = require_scale(value)
    return scale if isinstance(scale, str) else f"{scale:.6g}"


def _pixels(value: str) -> str:
    tokens = fixed_tokens(value)
    return NATIVE if tokens is None else f"{FIXED}{tokens}"


def _budget(value: str) -> str:
    return str(Budget.parse(value))


def _share(value: Any) -> Any:
    """ "98%" as it is, "0.98" as "98%"."""
    if value is None:
        return None
    text = str(value).strip()
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%", text)
    share = re.fullmatch(r"0?\.[0-9]{1,8}", text)
    found = float(percent[1]) if percent else 100 * float(text) if share else None
    if found is None or not LEAST_RETAINED <= found <= MOST_RETAINED:
        raise MMTokError(
            f"{text!r} is not a share of the score to be kept",
            f"give {LEAST_RETAINED:g}% to {MOST_RETAINED:g}%, as in --retain 98%",
        )
    return f"{found:.6g}%"


def _draft(value: str | None) -> str | None:
    if value is not None and not value.removeprefix(TEXT_DRAFT).strip():
        raise MMTokError("--draft names no draft", "as in --draft self, --draft qwen2.5-vl-3b or --draft text:red")
    if value is not None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MMTokError("--draft is not valid UTF-8", "enter it again") from error
    return value


def _image_size(value: str | None) -> str | None:
    return value if value is None else "x".join(map(str, image_size(value)))


def image_size(text: str) -> tuple[int, int]:
    """Width and height in pixels, from "1280x960". Raises MMTokError for anything else."""
    found = re.fullmatch(r"\s*([0-9]{1,6})\s*[xX×]\s*([0-9]{1,6})\s*", text)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(1 <= side <= LARGEST_SIDE for side in size):
        raise MMTokError(
            f"--image-size {text!r} is not a width and a height in pixels, each 1 to {LARGEST_SIDE}",
            "as in --image-size 1280x960",
        )
    return size


def _column_names(value: str | None) -> str | None:
    column_names(value)
    return value


def column_names(text: str | None) -> dict[str, str]:
    """Fields of a sample by their names in a dataset, from "question=text,answer=label".

    Raises MMTokError for a part that is not `field=name`.
    """
    names: dict[str, str] = {}
    if text is None:
        return names
    for part in filter(None, map(str.strip, text.split(","))):
        field, _, name = (each.strip() for each in part.partition("="))
        if not field or not name:
            raise MMTokError(f"--columns {part!r} is not field=name", "as in --columns question=text,answer=label")
        names[field] = name
    if not names:
        raise MMTokError("--columns names no column", "as in --columns question=text,answer=label")
    return names


def _tasks(value: Any) -> Any:
    names = _split(value)
    if names == ():
        raise MMTokError("--tasks names no task", "as in --tasks pope,gqa; `lmms-eval tasks list` lists them")
    return names


def _group(value: str | None) -> str | None:
    if value not in (None, "kind"):
        raise MMTokError(f"--by {value!r} is not a way to group questions", "use --by kind, or omit it")
    return value


Pixels = Annotated[str, AfterValidator(_pixels)]
Draft = Annotated[str | None, AfterValidator(_draft)]
OneBudget = Annotated[str, AfterValidator(_budget)]
Budgets = Annotated[tuple[str, ...], BeforeValidator(budgets_of)]
Methods = Annotated[tuple[str, ...], BeforeValidator(methods_of)]
Scale = Annotated[str, BeforeValidator(_scale)]
Scales = Annotated[tuple[str, ...], BeforeValidator(_scales)]
OneTurnPolicy = Annotated[str, AfterValidator(_turn_policy)]
TurnPolicies = Annotated[tuple[TurnPolicy, ...], BeforeValidator(_turn_policies)]
Retained = Annotated[str | None, BeforeValidator(_share)]
Grouping = Annotated[str | None, AfterValidator(_group)]
Tasks = Annotated[tuple[str, ...], BeforeValidator(_tasks)]
ImageSize = Annotated[str | None, AfterValidator(_image_size)]
ColumnNames = Annotated[str | None, AfterValidator(_column_names)]
BatchSizes = Annotated[tuple[int, ...], BeforeValidator(_batch_sizes)]
Concurrencies = Annotated[tuple[int, ...], BeforeValidator(_concurrencies)]
