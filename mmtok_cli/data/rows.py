"""One line or row of a dataset, with configurable column names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from mmtok_cli.data.samples import ClosedImages, Sample, require_question
from mmtok_cli.errors import MMTokError

FIELDS = ("image", "question", "answer", "answers", "id", "kind")
Columns = Mapping[str, str]  # field -> its name in the dataset, where the two differ
GAP = "{question}"
ASKED_AT_LEAST = 3  # reference answers that VQA's soft accuracy needs


class Row(BaseModel):
    """The fields of one sample except its images. Numbers are converted to strings."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True, extra="forbid")

    question: str | None = None
    answer: str | None = None
    answers: tuple[str, ...] = ()
    id: str | None = None
    kind: str | None = None

    @field_validator("*")
    @classmethod
    def _printable(cls, value: str | tuple[str, ...] | None) -> Any:
        try:
            "".join(value or ()).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it is not valid Unicode") from error
        return value

    @field_validator("answers", mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        """VQAv2 writes each answer as an object with the word under "answer"."""
        if not isinstance(values, list | tuple):
            return values
        return [value.get("answer") if isinstance(value, Mapping) else value for value in values]

    @field_validator("answers")
    @classmethod
    def _enough(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if 0 < len(values) < ASKED_AT_LEAST:
            raise ValueError(f"give at least {ASKED_AT_LEAST} answers, or one `answer`")
        return values


class FileRow(Row):
    """A row whose images are files: one path or a list of them."""

    image: tuple[str, ...]

    @field_validator("image", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("image")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("name an image file")
        return value


def fields_of(raw: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The fields of a row under the names used here. Raises MMTokError for a configured column that is missing."""
    for column in columns.values():
        if column not in raw:
            raise MMTokError(f"there is no {column!r}, only {', '.join(map(repr, raw))}")
    named = {field: raw.get(columns.get(field, field)) for field in FIELDS}
    return {field: value for field, value in named.items() if value is not None}


def fault_of(error: ValidationError) -> str:
    """The first error of a row, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{first['loc'][0]}: {message[:1].lower()}{message[1:]}" if first["loc"] else message


def make_sample(
    row: Row,
    readers: Sequence[Callable[[], Image]],
    image_ids: Sequence[str],
    question: str | None,
    number: int,
) -> Sample:
    """A sample whose images are read later. Raises MMTokError if there is no question."""
    return Sample(
        images=ClosedImages(tuple(readers)),
        question=_asked(question, row.question),
        image_ids=tuple(image_ids),
        answer=row.answer,
        kind=row.kind,
        id=row.id or str(number),
        answers=row.answers,
    )


def require_columns(columns: Columns) -> None:
    """Raises MMTokError for a field that samples do not have."""
    for field in columns:
        if field not in FIELDS:
            raise MMTokError(f"samples have no field {field!r}", f"choose among {', '.join(FIELDS)}")


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
