"""Known formats of data files: how each is recognised by its fields, what it calls them, and its official metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

from mmtok_cli.data.rows import Columns
from mmtok_cli.errors import MMTokError

MetricName = Literal["exact", "yes-no", "mme", "vqav2", "textvqa", "anls", "choice", "relaxed", "task"]

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """The format of a benchmark's files.

    needs: fields by which a row is recognised. columns: those with names of their own. metric: the benchmark's official
    one, None where the fields decide. convert: turns a row into the usual fields.
    """

    needs: frozenset[str]
    columns: Columns = field(default_factory=dict)
    metric: MetricName | None = None
    convert: Callable[[Fields], Fields] = lambda raw: raw


def layout_of(raw: Fields) -> Layout:
    """The first known format whose fields a row has; the usual fields if there is none."""
    return next((layout for layout in LAYOUTS if layout.needs <= raw.keys()), USUAL)


def _questions_and_answers(raw: Fields) -> Fields:
    """The turns of a conversation: `questions` and `answers`, or `question` and `answer` where there is only one."""
    turns = raw["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise MMTokError("conversations: it is not a list of turns")

    questions: list[Any] = []
    answers: list[Any] = []
    for turn in turns:
        if turn.get("from") == "human":
            questions.append(turn.get("value"))
            answers.append(None)
        elif turn.get("from") == "gpt" and answers and answers[-1] is None:
            answers[-1] = turn.get("value")
    if len(questions) > 1:
        others = {name: value for name, value in raw.items() if name not in ("question", "answer")}
        return {**others, "questions": questions, "answers": answers}
    return {**raw, "question": next(iter(questions), None), "answer": next(iter(answers), None)}


def _with_options(raw: Fields) -> Fields:
    """The choices in columns A, B, …; the hint before the question, as LLaVA's scripts put it."""
    given = [letter for letter in ascii_uppercase if raw.get(letter) not in (None, "")]
    # An empty cell between others keeps its letter, as in VLMEvalKit; no answer contains its text.
    choices = [raw.get(letter) or "–" for letter in ascii_uppercase if given and letter <= given[-1]]
    return {**_of_vlmevalkit(raw), "choices": choices or None}


def _of_vlmevalkit(raw: Fields) -> Fields:
    question, hint = raw.get("question"), raw.get("hint")
    return {
        **raw,
        "question": f"{hint}\n{question}" if hint and question else question,
        "image": raw.get("image", raw.get("image_path")),
        "id": raw.get("id", raw.get("index")),
        "kind": raw.get("kind", raw.get("category")),
    }


def _of_textvqa(raw: Fields) -> Fields:
    return {**raw, "image": raw.get("image", f"{raw['image_id']}.jpg")}


USUAL = Layout(frozenset())
POPE = Layout(
    frozenset({"image", "text", "label", "question_id"}),
    {"question": "text", "answer": "label", "id": "question_id"},
    "yes-no",
)
VQAV2 = Layout(frozenset({"question_id", "image_id", "question", "image"}), {"id": "question_id"}, "vqav2")
LAYOUTS = (
    POPE,
    # LLaVA's conversations and questions.
    Layout(frozenset({"conversations"}), metric="exact", convert=_questions_and_answers),
    Layout(frozenset({"image", "text", "question_id"}), {"question": "text", "id": "question_id"}),
    Layout(  # ChartQA
        frozenset({"imgname", "query", "label"}),
        {"image": "imgname", "question": "query", "answer": "label"},
        "relaxed",
    ),
    # DocVQA.
    Layout(frozenset({"questionId", "image", "answers"}), {"id": "questionId"}, "anls"),
    Layout(  # InfographicVQA
        frozenset({"questionId", "image_local_name", "answers"}),
        {"id": "questionId", "image": "image_local_name"},
        "anls",
    ),
    Layout(  # TextVQA
        frozenset({"question_id", "image_id", "question", "set_name"}),
        {"id": "question_id"},
        "textvqa",
        _of_textvqa,
    ),
    VQAV2,
    # Choices in columns, and other tables of VLMEvalKit.
    Layout(frozenset({"question", "A", "B"}), metric="choice", convert=_with_options),
    Layout(frozenset({"index", "question"}), convert=_of_vlmevalkit),
)
