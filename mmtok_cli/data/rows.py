"""One line or row of a dataset, with configurable column names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from string import ascii_uppercase
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from mmtok_cli.data.samples import ClosedImages, Sample, Turn, require_question
from mmtok_cli.errors import MMTokError
from mmtok_cli.video import Visual

ANNOTATORS = 3  # from this number on, reference answers are those of annotators
FIELDS = ("image", "video", "question", "questions", "answer", "answers", "choices", "id", "kind")
PER_TURN = ("answer", "answers", "choices", "kind")  # lists of them go with a list of questions
Columns = Mapping[str, str]  # field -> its name in the dataset, where the two differ
GAP = "{question}"
MOST_NAMES, LONGEST_SHOWN = 12, 60  # names and characters in a message
LISTED = re.compile(r"^[ \t]*\(?A[.):]\s", re.MULTILINE)  # a question that lists its choices itself
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."  # that of LLaVA-1.5


class Row(BaseModel):
    """The fields of one sample except its images.

    Numbers and truth values are converted to text: 3.0 to "3", true to "true". NaN, null and "" stand for no answer.
    """

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True, extra="forbid")

    question: str | None = None
    answer: str | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    id: str | None = None
    kind: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _answer_or_answers(cls, values: Any) -> Any:
        """A list under `answer` is several answers; a number that is not itself a choice counts choices from 0."""
        answer, choices = values.get("answer"), values.get("choices")
        if isinstance(answer, list | tuple):
            return {**values, "answer": None, "answers": values.get("answers") or answer}
        is_index = isinstance(answer, int) and not isinstance(answer, bool) and isinstance(choices, list | tuple)
        if is_index and str(answer) not in map(str, choices):
            if not 0 <= answer < len(choices):
                raise ValueError(f"answer: {answer} is not the number of a choice, which count from 0")
            return {**values, "answer": ascii_uppercase[answer : answer + 1]}
        return values

    @field_validator("question", "answer", "id", "kind", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return plain_text(value)

    @field_validator("answer", "id", "kind")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value and value.strip() else None

    @field_validator("answers", mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        """VQAv2 writes each answer as an object with the word under "answer"."""
        if not isinstance(values, list | tuple):
            values = [values]
        words = [plain_text(value.get("answer") if isinstance(value, Mapping) else value) for value in values]
        return [word for word in words if word is not None]

    @field_validator("answers")
    @classmethod
    def _any_known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        """Blank answers are none, but among those of several annotators, whose number counts."""
        known = tuple(value for value in values if value.strip())
        return values if known and len(values) >= ANNOTATORS else known

    @field_validator("choices", mode="before")
    @classmethod
    def _texts(cls, values: Any) -> Any:
        """Choices by letter become a list."""
        if isinstance(values, Mapping):
            if list(values) != list(ascii_uppercase[: len(values)]):
                raise ValueError("name the choices A, B, …, or write a list")
            values = list(values.values())
        return [plain_text(value) for value in values] if isinstance(values, list | tuple) else values

    @field_validator("choices")
    @classmethod
    def _lettered(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if values and not 2 <= len(values) <= len(ascii_uppercase):
            raise ValueError(f"give 2 to {len(ascii_uppercase)} choices")
        return values

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value or ()
        try:
            "".join(text for text in texts if isinstance(text, str)).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it is not valid Unicode") from error
        return value


def plain_text(value: Any) -> Any:
    """JSON's true, 3.0 and NaN as "true", "3" and None; other values unchanged."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return value


def fields_of(raw: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The fields of a row under the names used here. Raises MMTokError for a configured column that is missing."""
    require_names(raw, columns.values())
    named = {field: raw.get(columns.get(field, field)) for field in FIELDS}
    return {field: value for field, value in named.items() if value is not None}


def turn_fields(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each turn of a conversation, which has `questions` and no `question`; of another row, its own.

    Answers, choices and kinds are lists with one item for each question; an answer may be a list of references. A text
    under `kind` holds for all. Raises MMTokError for lists that do not fit.
    """
    questions = fields.get("questions")
    shared = {name: value for name, value in fields.items() if name != "questions"}
    if questions is None or "question" in fields:
        return [shared]
    if not isinstance(questions, list | tuple) or not questions:
        raise MMTokError("questions: it is not a list of questions")
    turns: list[dict[str, Any]] = [shared | {"question": question} for question in questions]
    for name in PER_TURN:
        values = fields.get(name)
        if values is None or (name == "kind" and isinstance(values, str)):
            continue
        if not isinstance(values, list | tuple) or len(values) != len(questions):
            raise MMTokError(f"{name}: it is not a list with one item for each of the {len(questions)} questions")
        for turn, value in zip(turns, values, strict=True):
            turn[name] = value
    for turn in turns:
        of_turn = turn.pop("answers", None)
        if of_turn is not None:
            turn["answers" if isinstance(of_turn, list | tuple) else "answer"] = of_turn
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]


def later_rows(turns: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The turns after the first one. Raises ValidationError for fields that are not valid."""
    return [
        Row.model_validate({k: v for k, v in turn.items() if k not in ("image", "video", "id")}) for turn in turns[1:]
    ]


def require_names(raw: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises MMTokError for the first of some names that a row does not have."""
    for name in names:
        if name not in raw:
            raise MMTokError(f"there is no {name!r}, only {shown_names(raw)}", "name the columns with --columns")


def shown_names(names: Iterable[str]) -> str:
    """Names in quotes, the first MOST_NAMES of them and shortened."""
    shown = [shown_text(name) for name in islice(names, MOST_NAMES + 1)]
    return ", ".join(shown[:MOST_NAMES]) + (", …" if len(shown) > MOST_NAMES else "")


def shown_text(text: str) -> str:
    """A text of a data file in quotes, on one line and shortened."""
    return repr(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…")


def fault_of(error: ValidationError) -> str:
    """The first error of a row, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{first['loc'][0]}: {message[:1].lower()}{message[1:]}" if first["loc"] else message


def make_sample(
    row: Row,
    readers: Sequence[Callable[[], Visual]],
    image_ids: Sequence[str],
    question: str | None,
    number: int,
    place: str = "",
    later: Sequence[Row] = (),
) -> Sample:
    """A sample whose images and videos are read later. later: of the turns after the first one.

    Raises MMTokError if there is no question.
    """
    return Sample(
        images=ClosedImages(tuple(readers)),
        image_ids=tuple(image_ids),
        id=row.id or str(number),
        place=place,
        later=tuple(Turn(**_turn(each, question)) for each in later),
        **_turn(row, question),
    )


def _turn(row: Row, question: str | None) -> dict[str, Any]:
    """The fields that a sample and a turn have in common. question: the user's, as in `_asked`."""
    several = len(row.answers) > 1
    return {
        "question": _asked(question, _with_choices(row.question, row.choices)),
        "answer": row.answers[0] if row.answers and not several else row.answer,
        "answers": row.answers if several else (),
        "choices": row.choices,
        "kind": row.kind,
    }


def require_columns(columns: Columns) -> None:
    """Raises MMTokError for a field that samples do not have."""
    for field in columns:
        if field not in FIELDS:
            raise MMTokError(f"samples have no field {field!r}", f"choose among {', '.join(FIELDS)}")


def _with_choices(question: str | None, choices: Sequence[str]) -> str | None:
    """The question with its choices by letter, in the words of LLaVA-1.5, unless it lists them itself."""
    if question is None or not choices or LISTED.search(question):
        return question
    options = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([question, *options, CHOICE_PROMPT])


def _asked(wanted: str | None, own: str | None) -> str:
    """The question of a row, put into the user's template if there is one; the user's question if the row has none."""
    if wanted is None:
        asked = own
    elif own is None:
        asked = wanted if GAP not in wanted else None
    elif GAP in wanted:
        asked = wanted.replace(GAP, own)
    else:
        raise MMTokError(
            "the sample has a question, which --question would replace",
            f"omit --question, or put {GAP} into it for the sample's question",
        )
    if asked is None:
        raise MMTokError("there is no question", "give one for all images with --question")
    require_question(asked)
    return asked
