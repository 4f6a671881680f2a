"""Data with several questions about an image."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import picture

from mmtok_cli.data.datasets import Dataset, open_dataset
from mmtok_cli.data.names import parse_name
from mmtok_cli.demo.questions import held_out_conversations
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.metrics import with_metric
from mmtok_cli.planning import absolute_data

TWO = {"image": "a.png", "questions": ["What is it?", "What color?"]}


def opened(folder: Path, *rows: dict[str, Any], **options: Any) -> Dataset:
    picture(40, 40).save(folder / "a.png")
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_dataset(str(path), **options)


def turns_of(data: Dataset) -> list[list[tuple[str, tuple[str, ...]]]]:
    return [[(turn.question, turn.references) for turn in sample.turns] for sample in data.samples]


@pytest.mark.parametrize(
    ("answers", "expected", "metric"),
    [
        (["star", "red"], [("star",), ("red",)], "exact"),
        ([["star", "a star", "it"], ["red", "a", "b"]], [("star", "a star", "it"), ("red", "a", "b")], "textvqa"),
        ([3, None], [("3",), ()], "exact"),
        (None, [(), ()], None),
    ],
)  # fmt: skip
def test_questions_and_answers_are_a_conversation(
    tmp_path: Path, answers: Any, expected: list[tuple[str, ...]], metric: str | None
) -> None:
    data = opened(tmp_path, TWO if answers is None else TWO | {"answers": answers})
    (sample,) = turns_of(data)
    assert [question for question, _ in sample] == TWO["questions"]
    assert [references for _, references in sample] == expected
    assert data.metric == metric
    assert data.samples[0].question == "What is it?" and data.samples[0].references == expected[0]


def test_kinds_choices_and_columns_are_those_of_each_turn(tmp_path: Path) -> None:
    row = {
        "image": "a.png",
        "asked": ["Which?", "What color?"],
        "said": ["A", "red"],
        "choices": [["star", "heart"], None],
        "kind": ["shape", "color"],
    }
    data = opened(tmp_path, row, columns={"questions": "asked", "answers": "said"}, question="Look. {question}")
    first, second = data.samples[0].turns
    assert first.choices == ("star", "heart") and first.question.startswith("Look. Which?\nA. star")
    assert second.choices == () and second.question == "Look. What color?"
    assert [turn.kind for turn in (first, second)] == ["shape", "color"]


def test_a_row_with_one_question_is_no_conversation(tmp_path: Path) -> None:
    data = opened(tmp_path, {"image": "a.png", "question": "One?", "questions": 5, "answer": "1"}, TWO)
    assert [len(sample.turns) for sample in data.samples] == [1, 2]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"questions": []}, "questions: it is not a list of questions"),
        ({"questions": "What?"}, "questions: it is not a list of questions"),
        ({"questions": ["What?", ""]}, "the question is empty"),
        ({"questions": ["What?", {"a": 1}]}, "question: "),
        ({"questions": ["a?", "b?"], "answers": ["x"]}, "answers: it is not a list with one item for each of the 2"),
        ({"questions": ["a?", "b?"], "answers": "x"}, "answers: it is not a list with one item for each of the 2"),
        ({"questions": ["a?", "b?"], "choices": ["x", "y", "z"]}, "choices: it is not a list"),
    ],
)
def test_lists_that_do_not_fit_are_reported(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    data = opened(tmp_path, {"image": "a.png"} | row, TWO)
    assert len(data.samples) == 1
    (note,) = data.notes()
    assert problem in note and "line 1" in note


def test_llava_conversations_have_all_their_turns(tmp_path: Path) -> None:
    said = [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A star."),
        ("human", "What color?"),
        ("human", "Sure?"),
        ("gpt", "Yes."),
    ]
    row = {"image": "a.png", "id": "7", "conversations": [{"from": who, "value": text} for who, text in said]}
    data = opened(tmp_path, row)
    expected = [("<image>\nWhat is it?", ("A star.",)), ("What color?", ()), ("Sure?", ("Yes.",))]
    assert turns_of(data) == [expected] and data.metric == "exact" and data.samples[0].id == "7"


def test_questions_that_are_texts_are_not_rows(tmp_path: Path) -> None:
    """A single object without `image` may name its image otherwise; its questions are not samples."""
    data = opened(tmp_path, {"photo": "a.png", "questions": ["What?", "How?"]}, columns={"image": "photo"})
    assert [len(sample.turns) for sample in data.samples] == [2]


def test_turns_that_the_metric_cannot_judge_leave_the_conversation_out(tmp_path: Path) -> None:
    data = opened(tmp_path, TWO | {"answers": ["yes", "red"]}, TWO | {"answers": ["yes", "no"]})
    kept = with_metric(data, "yes-no")
    assert len(kept.samples) == 1 and "line 1" in kept.problems[0]


def test_the_demo_has_conversations_about_different_objects() -> None:
    conversations = held_out_conversations(24)
    assert conversations == held_out_conversations(30)[:24]
    for questions in conversations:
        scene = questions[0].scene
        assert scene.split == "eval" and len({question.scene.seed for question in questions}) == 1
        asked = set()
        for question in questions:
            words = question.text.rstrip("?").split()
            (item,) = [
                item
                for item in scene.objects
                if {"colour": words[-1] == item.shape, "shape": words[-2] == item.colour}.get(
                    question.kind, words[-2:] == [item.colour, item.shape]
                )
            ]
            right = {"colour": item.colour, "shape": item.shape, "digit": str(item.digit)}[question.kind]
            assert question.answer == right
            asked.add(item.pair)
        assert len(asked) == 3
    for turn in range(3):
        assert set(Counter(questions[turn].kind for questions in conversations).values()) == {8}


def test_the_demos_conversations_are_a_dataset() -> None:
    data = open_dataset("demo:conversations", limit=4)
    assert data.name == "demo:conversations" and data.metric == "exact"
    assert [len(sample.turns) for sample in data.samples] == [3] * 4
    assert str(parse_name("demo:conversations")) == absolute_data("demo:conversations") == "demo:conversations"
    with pytest.raises(MMTokError, match="are fixed"):
        open_dataset("demo:conversations", question="What?")
    with pytest.raises(MMTokError):
        open_dataset("demo:nosuch")
