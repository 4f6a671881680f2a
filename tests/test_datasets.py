"""Datasets: JSON lines, POPE's files, folders, the hub; opened late, with what cannot be used named."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets as hub
import numpy as np
import pytest
from conftest import picture
from PIL import Image as PILImage

from mmtok_cli.data import hub as hub_module
from mmtok_cli.data import samples as samples_module
from mmtok_cli.data import tables
from mmtok_cli.data.datasets import Dataset, open_dataset
from mmtok_cli.data.samples import ClosedImages
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.metrics import METRICS, with_metric


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(**others: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "What is it?", "answer": "a cat"} | others


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """a.png, b.jpg, deep/c.webp and a text."""
    (tmp_path / "deep").mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "deep/c.webp")):
        picture(30 + seed, 20, seed).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_json_lines(folder: Path) -> None:
    file = write(
        folder / "asked.jsonl",
        row(),
        "",
        row(image=["b.jpg", "deep/c.webp"], question="Which?", answer=3, id=7, kind="two", unknown=[1]),
        {"image": str(folder / "a.png"), "question": "Why?"},
    )
    found = open_dataset(str(file))
    assert (found.name, found.metric, found.missing, found.problems) == ("asked.jsonl", "exact", 0, ())
    first, second, third = found.samples
    assert (first.question, first.answer, first.id, first.image_ids) == ("What is it?", "a cat", "1", ("a.png",))
    assert (second.answer, second.id, second.kind, second.image_ids) == ("3", "7", "two", ("b.jpg", "deep/c.webp"))
    assert [image.size for image in second.images] == [(31, 20), (32, 20)]
    assert third.answer is None and third.images[0].size == (30, 20)
    assert len(open_dataset(str(file), limit=2).samples) == 2


def test_images_are_not_held_until_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(folder / "asked.jsonl", *[row(id=i) for i in range(5)])
    found = open_dataset(str(file))
    (folder / "a.png").rename(folder / "moved.png")
    with pytest.raises(MMTokError, match="there is no file"):
        found.samples[0].open()
    (folder / "moved.png").rename(folder / "a.png")
    closed, opened = found.samples[0], found.samples[0].open()
    assert isinstance(closed.images, ClosedImages) and len(closed.images) == 1
    assert closed.images[0] is not closed.images[0]
    assert opened.images[0] is opened.images[0] and opened.open().images[0] is opened.images[0]
    assert opened.images[0].tobytes() == closed.images[0].tobytes() == closed.images[:1][0].tobytes()
    assert [image.size for image in closed.images] == [(30, 20)]


BAD = {
    "{": "it is not JSON",
    '{"question": "Why?"}': "image: field required",
    '{"image": "a.png"}': "there is no question",
    '{"image": "a.png", "question": "  "}': "the question is empty",
    '{"image": "a.png", "question": "\\ud800"}': "question: it is not valid Unicode",
    '{"image": "", "question": "Why?"}': "image: name an image file",
    '{"image": 3, "question": "Why?"}': "image: ",
    '{"image": "a.png", "question": "Why?", "answer": {}}': "answer: ",
    '{"image": "a.png", "question": "Why?", "answers": [["one"], "two"]}': "answers: ",
    '{"image": ["a.png", 3], "question": "Why?"}': "image: name an image file",
    '{"image": {"bytes": ""}, "question": "Why?"}': "image: ",
    "[" * 100_000: "it is not JSON",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_bad_lines_are_named_and_nothing_else_is_lost(line: str, message: str, folder: Path) -> None:
    file = write(folder / "asked.jsonl", row(), line, row())
    found = open_dataset(str(file))
    assert [sample.id for sample in found.samples] == ["1", "3"]
    (problem,) = found.problems
    assert problem.startswith(f"{file}, line 2: {message}") and "\n" not in problem and len(problem) < 300
    assert found.notes() == [f"left out: {problem}"]
    with pytest.raises(MMTokError) as error:
        open_dataset(str(write(file, line)))
    assert error.value.message.startswith(f"{file}, line 1: {message}") and error.value.hint


def test_files_that_are_no_utf8(folder: Path) -> None:
    """A byte-order mark, other line ends, Latin-1 in one line, no newline at the end."""
    file = folder / "asked.jsonl"
    line = json.dumps(row(), ensure_ascii=False).encode()
    file.write_bytes(
        b"\xef\xbb\xbf" + line + b"\r\n" + b'{"image": "\xff"}\n' + line
    )  # a mark, Latin-1, no last newline
    found = open_dataset(str(file))
    assert len(found.samples) == 2 and found.problems == (f"{file}, line 2: it is not UTF-8",)


def test_empty_and_absent_files(folder: Path) -> None:
    with pytest.raises(MMTokError, match="is empty"):
        open_dataset(str(write(folder / "asked.jsonl", "", "  ")))
    with pytest.raises(MMTokError, match=r"there is no file nowhere\.jsonl"):
        open_dataset("nowhere.jsonl")
    for prefix in ("", "pope:", "vqav2:", "a,"):
        for name in ("x" * 300, "x" * 300 + ".jsonl", "x" * 300 + ".csv", "\0"):
            with pytest.raises(MMTokError, match=r"File name too long|there is no|not the name of a file") as error:
                open_dataset(prefix + name)
            assert error.value.hint
    with pytest.raises(MMTokError, match="there is no dataset 'nowhere'") as error:
        open_dataset("nowhere")
    assert "hub:NAME" in error.value.hint


def test_columns_of_other_names(folder: Path) -> None:
    file = write(folder / "asked.jsonl", {"file": "a.png", "ask": "What?", "gold": "cat"})
    names = {"image": "file", "question": "ask", "answer": "gold"}
    (sample,) = open_dataset(str(file), columns=names).samples
    assert (sample.question, sample.answer) == ("What?", "cat")
    with pytest.raises(MMTokError, match="line 1: there is no 'label', only 'file', 'ask', 'gold'"):
        open_dataset(str(file), columns=names | {"answer": "label"})
    with pytest.raises(MMTokError, match="no field 'anwser'"):
        open_dataset(str(file), columns={"anwser": "gold"})


def test_a_question_around_or_instead_of_the_samples_own(folder: Path) -> None:
    file = write(folder / "asked.jsonl", row())
    frame = "{question}\nAnswer with one word."
    assert open_dataset(str(file), question=frame).samples[0].question == "What is it?\nAnswer with one word."
    with pytest.raises(MMTokError, match="the sample has a question"):
        open_dataset(str(file), question="Why?")
    bare = write(folder / "bare.jsonl", {"image": "a.png"})
    assert open_dataset(str(bare), question="Why?").samples[0].question == "Why?"
    with pytest.raises(MMTokError, match="there is no question"):
        open_dataset(str(bare), question=frame)


POPE = [
    {
        "question_id": i,
        "image": f"COCO_val2014_{i % 3:012d}.jpg",
        "text": f"Is there a {thing} in the image?",
        "label": a,
    }
    for i, (thing, a) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "yes"), ("bed", "no")], start=1)
]


@pytest.mark.parametrize("prefix", ["", "pope:"])
def test_official_pope_files(prefix: str, tmp_path: Path) -> None:
    root = tmp_path / "val2014"
    root.mkdir()
    for name in {entry["image"] for entry in POPE} - {POPE[1]["image"]}:
        picture(20, 20).save(root / name)
    file = write(tmp_path / "coco_pope_random.json", *POPE)
    found = open_dataset(f"{prefix}{file}", image_root=root)
    assert found.metric == "yes-no"
    assert [(s.id, s.question, s.answer, s.image_ids[0]) for s in found.samples] == [
        (str(e["question_id"]), e["text"], e["label"], e["image"]) for e in POPE if e != POPE[1]
    ]
    assert (found.missing, found.left_out) == (
        1,
        1,
    ) and "image files missing: 1; samples left out because of that: 1" in found.notes()[0]
    with pytest.raises(MMTokError, match="none of the 3 images") as error:
        open_dataset(f"{prefix}{file}")
    assert "--image-root" in error.value.hint


def test_folders_patterns_and_single_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_dataset(str(folder), question="What is this?")
    assert [sample.id for sample in whole.samples] == ["a.png", "b.jpg", "deep/c.webp"]
    assert whole.metric is None and {sample.question for sample in whole.samples} == {"What is this?"}
    assert [s.images[0].width for s in open_dataset(str(folder / "*.jpg"), question="?").samples] == [31]
    assert len(open_dataset(str(folder / "**/*"), question="?", limit=2).samples) == 2
    assert [s.image_ids for s in open_dataset(str(folder / "a.png"), question="?").samples] == [("a.png",)]
    with pytest.raises(MMTokError, match="no question") as error:
        open_dataset(str(folder))
    assert "--question" in error.value.hint
    (folder / "empty").mkdir()
    for nothing in ("empty", "*.txt"):
        with pytest.raises(MMTokError, match="there is no image in"):
            open_dataset(str(folder / nothing), question="?")


def test_names_of_images_that_are_not_unicode(folder: Path) -> None:
    """They could be neither printed nor saved."""
    try:
        (folder / os.fsdecode(b"\xff.png")).write_bytes((folder / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system refuses such names")
    found = open_dataset(str(folder), question="?", limit=1)
    assert [sample.id for sample in found.samples] == ["a.png"]
    assert found.notes() == [r"left out: the name of '\udcff.png' is not valid UTF-8"]
    with pytest.raises(MMTokError, match=r"the name of '\\udcff.png' is not valid UTF-8"):
        open_dataset(str(folder / "?.png").replace("?", "[!a]"), question="?")


def test_demo() -> None:
    found = open_dataset("demo", limit=8)
    assert found == Dataset("demo", samples_module.demo_samples(8), "exact")
    assert [sample.id for sample in found.samples] == [str(i) for i in range(8)]
    with pytest.raises(MMTokError, match="are fixed"):
        open_dataset("demo", question="Why?")


@pytest.fixture()
def saved(folder: Path) -> Path:
    """A dataset of the hub's library on disk, with two splits."""
    table = hub.Dataset.from_dict(
        {
            "image": [str(folder / name) for name in ("a.png", "b.jpg", "deep/c.webp")],
            "question": ["Is there a cat?", "Is there a dog?", None],
            "answer": ["yes", "no", "no"],
            "category": ["adversarial", "popular", "random"],
        }
    ).cast_column("image", hub.Image())
    path = folder / "saved"
    hub.DatasetDict({"test": table, "train": table.select([0])}).save_to_disk(path)
    return path


def test_hub_datasets(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = open_dataset(f"hub:{saved}:test", columns={"kind": "category"})
    assert found.metric == "exact" and found.problems == (f"{saved}:test, row 2: there is no question",)
    assert [(s.question, s.answer, s.kind, s.id) for s in found.samples] == [
        ("Is there a cat?", "yes", "adversarial", "0"),
        ("Is there a dog?", "no", "popular", "1"),
    ]
    assert [s.open().images[0].size for s in found.samples] == [(30, 20), (31, 20)]
    assert len({s.image_ids for s in found.samples}) == 2
    assert len(open_dataset(f"hub:{saved}:test", limit=1).samples) == 1
    for text, words in {
        f"hub:{saved}": "several splits: test, train",
        f"hub:{saved}:val": "no split 'val'",
        "hub:": "is not the name of a dataset",
        "hub:a:b:c:d": "is not the name of a dataset",
    }.items():
        with pytest.raises(MMTokError, match=words):
            open_dataset(text)
    with pytest.raises(MMTokError, match="no images in a column 'answer'") as error:
        open_dataset(f"hub:{saved}:train", columns={"image": "answer"})
    assert "image=image" in error.value.hint
    with pytest.raises(MMTokError, match="row 0: there is no 'label'"):
        open_dataset(f"hub:{saved}:train", columns={"answer": "label"})


def test_hub_tables_in_a_directory(saved: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    hub.load_from_disk(saved)["test"].to_parquet(plain / "test.parquet")
    found = open_dataset(f"hub:{plain}:test")
    assert [s.images[0].size for s in found.samples] == [(30, 20), (31, 20)]


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MMTokError, match="needs the datasets library") as error:
        open_dataset("hub:some/where")
    assert error.value.hint == "pip install 'mmtok[datasets]'"


def test_datasets_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(MMTokError, match=r"the dataset nobody/nothing cannot be loaded: \w") as error:
        open_dataset("hub:nobody/nothing")
    assert "\n" not in error.value.message


def metric_of(folder: Path, *rows: object, limit: int | None = None, name: str = "a.jsonl") -> str | None:
    return open_dataset(str(write(folder / name, *rows)), limit=limit).metric


def test_the_metric_is_that_of_the_fields_of_the_whole_file(folder: Path) -> None:
    """Not of the first lines, nor of what the answers say."""
    one, none = row(answer="yes"), {"image": "a.png", "question": "Why?"}
    ten, two, choices = row(answers=["a", "b"] * 5), row(answers=["a", "b"]), row(choices=["a cat", "a dog"])
    for rows, metric in (
        ([one, row(answer="no")], "exact"),
        ([none, row()], "exact"),
        ([none, none], None),
        ([row(answer=""), row(answer=None)], None),
        ([ten, ten, two], "textvqa"),
        ([two, ten, ten], "textvqa"),
        ([ten, two, two], "anls"),
        ([row(answers=["a"]), two], "anls"),
        ([choices, row()], "choice"),
        ([none, choices], "choice"),
    ):
        found = {metric_of(folder, *rows, limit=limit) for limit in (None, 1)}
        assert found == {metric}, rows


def test_answers_of_several_people(folder: Path) -> None:
    people = ["cat", "cat", "a dog"]
    file = write(
        folder / "asked.jsonl",
        row(answers=people),
        row(answers=[{"answer": a, "answer_id": 1} for a in people]),
        row(answer=people),
    )
    found = open_dataset(str(file))
    assert found.metric == "textvqa" and all(s.answers == s.references == tuple(people) for s in found.samples)


def test_typed_answers(folder: Path) -> None:
    """A number is its shortest text; NaN, null and nothing are no known answers."""
    typed = [3, 3.0, 3.5, -2.0, 1e-7, True, False, None, "", "  ", float("nan"), float("inf"), "NaN", "none", 10**20]
    file = write(folder / "asked.jsonl", *[row(answer=answer, id=i) for i, answer in enumerate(typed)])
    known = [sample.answer for sample in open_dataset(str(file)).samples]
    assert known[:7] == ["3", "3", "3.5", "-2", "1e-07", "true", "false"]
    assert known[7:12] == [None] * 5 and known[12:] == ["NaN", "none", "100000000000000000000"]
    people = write(folder / "people.jsonl", row(answers=[3.0, None, "", float("nan"), True]), row(answers=["", None]))
    first, second = open_dataset(str(people)).samples
    assert first.answers == ("3", "", "true") and second.references == ("a cat",)


def test_choices(folder: Path) -> None:
    options = ["red", "blue", "4"]
    file = write(
        folder / "asked.jsonl",
        row(choices=options, answer="B"),
        row(choices=dict(zip("ABC", options, strict=True)), answer=1),
        row(choices=options, answer=4),
        row(choices=options, answer=7),
        row(choices=["red"]),
        row(choices={"a": "red", "b": "blue"}),
        row(choices=[str(i) for i in range(27)]),
        row(question="Which?\nA. red\nB. blue", choices=options, answer="C"),
    )
    found = open_dataset(str(file))
    asked = "What is it?\nA. red\nB. blue\nC. 4\nAnswer with the option's letter from the given choices directly."
    assert [(s.question, s.answer) for s in found.samples] == [
        (asked, "B"),
        (asked, "1"),
        (asked, "4"),
        ("Which?\nA. red\nB. blue", "C"),
    ]
    assert found.samples[0].choices == tuple(options) and found.samples[0].place == f"{file}, line 1"
    assert [problem.partition(": ")[2][:38] for problem in found.problems] == [
        "answer: 7 is not the number of a choic",
        "choices: give 2 to 26 choices",
        "choices: name the choices A, B, …, or ",
        "choices: give 2 to 26 choices",
    ]
    indexed = write(folder / "indexed.jsonl", row(choices=["red", "blue"], answer=1))
    assert open_dataset(str(indexed)).samples[0].answer == "B"


# JSON arrays and documents.


def test_json_arrays_and_documents(folder: Path) -> None:
    rows = [row(id=1), [1], row(image="b.jpg", id=2), "x"]
    for number, document in enumerate((rows, {"info": 1, "data": rows}, {"questions": rows})):
        for indent in (None, 2):
            file = folder / f"{number}-{indent}.json"
            file.write_text(json.dumps(document, indent=indent))
            found = open_dataset(str(file))
            assert [sample.id for sample in found.samples] == ["1", "2"] and found.metric == "exact"
            assert found.problems == tuple(f"{file}, item {i}: it is not a JSON object" for i in (2, 4))
    single = folder / "single.json"
    single.write_text(json.dumps(row(), indent=2))
    assert len(open_dataset(str(single)).samples) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a.png"},\n {"image": }]', ", line 2: it is not JSON (Expecting value)"),
        ('[\n{"image": "a.png"}', ", line 2: it is not JSON"),
        ("[]", " is empty"),
        ('{"data": []}', " is empty"),
        ('{"annotations": [{"question_id": 1}]}', " has annotations without questions"),
        ('{"a": 1}', ", line 1: image: field required"),
        ('{\n"a": 1\n}', ", item 1: image: field required"),
        ("null", ", line 1: it is not a JSON object"),
        (json.dumps([{"image": "a.png", "conversations": 3}]), ", item 1: conversations: it is not a list of turns"),
    ],
)
def test_faulty_documents_are_named(content: str, message: str, folder: Path) -> None:
    file = folder / "asked.json"
    file.write_text(content)
    with pytest.raises(MMTokError) as error:
        open_dataset(str(file))
    assert error.value.message.startswith(f"{file}{message}") and "\n" not in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_utf_16_is_named_as_such(name: str, folder: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (folder / name).write_bytes((json.dumps(row()) + "\n").encode(encoding))
        with pytest.raises(MMTokError, match="is UTF-16, and data files are UTF-8"):
            open_dataset(str(folder / name))


def test_a_data_file_in_a_folder_with_brackets(folder: Path) -> None:
    place = folder / "run [2024]"
    place.mkdir()
    picture(20, 20).save(place / "a.png")
    assert len(open_dataset(str(write(place / "asked.jsonl", row()))).samples) == 1


# Formats of benchmarks.


def conversation(*said: str) -> dict[str, Any]:
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(said)]
    return {"id": "x", "image": "a.png", "conversations": turns}


FORMATS: dict[str, tuple[list[dict[str, Any]], str | None, tuple[Any, ...]]] = {
    "LLaVA questions": (
        [{"question_id": 7, "image": "a.png", "text": "What?", "category": "default"}],
        None,
        ("What?", (), "7"),
    ),
    "LLaVA conversations": (
        [conversation("<image>\nWhat?", "A cat", "Why?", "So")],
        "exact",
        ("<image>\nWhat?", ("A cat",), "x"),
    ),
    "ChartQA": ([{"imgname": "a.png", "query": "How much?", "label": "14"}], "relaxed", ("How much?", ("14",), "1")),
    "DocVQA": (
        [{"questionId": 3, "question": "Who?", "image": "a.png", "answers": ["Al", "al"], "docId": 1}],
        "anls",
        ("Who?", ("Al", "al"), "3"),
    ),
    "InfographicVQA": (
        [{"questionId": 3, "question": "Who?", "image_local_name": "a.png", "answers": ["Al"]}],
        "anls",
        ("Who?", ("Al",), "3"),
    ),
    "TextVQA": (
        [{"question_id": 3, "question": "Who?", "image_id": "a", "set_name": "val", "answers": ["Al"] * 10}],
        "textvqa",
        ("Who?", ("Al",) * 10, "3"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised_by_their_fields(name: str, folder: Path) -> None:
    rows, metric, expected = FORMATS[name]
    picture(30, 20).save(folder / "a.jpg")
    (folder / "asked.json").write_text(json.dumps({"data": rows}))
    for file in (folder / "asked.json", write(folder / "asked.jsonl", *rows)):
        found = open_dataset(str(file))
        assert found.metric == metric
        (sample,) = found.samples
        assert (sample.question, sample.references, sample.id) == expected and sample.images[0].size == (30, 20)


def test_pope_files_are_judged_by_popes_rules_whatever_their_labels(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "a.png")
    for labels in (["no"], ["yes"], ["no", "no"], ["Yes.", "unknown"], ["red"]):
        rows = [
            {"question_id": i, "image": "a.png", "text": "Is it?", "label": label} for i, label in enumerate(labels)
        ]
        file = write(tmp_path / "coco_pope_random.json", *rows)
        for text in (str(file), f"pope:{file}"):
            assert open_dataset(text).metric == open_dataset(text, limit=1).metric == "yes-no"


def test_columns_named_by_hand_change_a_known_format_only_where_they_say_so(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "a.png")
    asked = {"question_id": 1, "image": "a.png", "text": "Is it?", "label": "no", "category": "random", "gold": "red"}
    file = write(tmp_path / "pope.json", asked)
    for text in (str(file), f"pope:{file}"):
        found = open_dataset(text, columns={"kind": "category"})
        assert found.metric == "yes-no" and found.samples[0].kind == "random" and found.samples[0].answer == "no"
        other = open_dataset(text, columns={"answer": "gold"})
        assert other.metric == "exact" and other.samples[0].answer == "red"


def vqav2(folder: Path) -> tuple[Path, Path]:
    """Two questions and their annotations, with the official names of files and images."""
    questions = [{"image_id": 42, "question": f"Q{i}?", "question_id": 42000 + i} for i in range(2)]
    annotations = [
        {
            "question_id": q["question_id"],
            "image_id": 42,
            "answer_type": "number",
            "multiple_choice_answer": "2",
            "answers": [{"answer": "2", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)],
        }
        for q in questions
    ]
    picture(30, 20).save(folder / "COCO_val2014_000000000042.jpg")
    asked = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked.write_text(json.dumps({"info": {}, "data_subtype": "val2014", "questions": questions}))
    answered = folder / "v2_mscoco_val2014_annotations.json"
    answered.write_text(json.dumps({"info": {}, "data_subtype": "val2014", "annotations": annotations}))
    return asked, answered


def test_vqav2s_pairs_of_files(folder: Path) -> None:
    asked, answered = vqav2(folder)
    for text in (str(asked), f"vqav2:{asked}", f"vqav2:{asked},{answered}"):
        found = open_dataset(text)
        assert found.metric == "vqav2" and open_dataset(text, limit=1).metric == "vqav2"
        assert [(s.question, s.references, s.kind, s.id) for s in found.samples] == [
            (f"Q{i}?", ("2",) * 10, "number", str(42000 + i)) for i in range(2)
        ]
        assert found.samples[0].images[0].size == (30, 20)
    for text, message in {
        f"vqav2:{asked},{folder / 'gone.json'}": "there is no file .*gone.json",
        f"vqav2:{answered},{asked}": "annotations.json has no list under 'questions'",
        f"vqav2:{asked},{asked}": "questions.json has no list under 'annotations'",
        f"vqav2:{asked},{answered},{answered}": "names 3 files",
        str(answered): "has annotations without questions",
    }.items():
        with pytest.raises(MMTokError, match=message):
            open_dataset(text)
    answered.write_text(json.dumps({"annotations": [{"question_id": 1, "answers": [{"answer": "2"}]}]}))
    with pytest.raises(MMTokError, match="answers none of the questions"):
        open_dataset(str(asked))
    answered.unlink()
    unknown = open_dataset(str(asked))
    assert unknown.metric is None and not unknown.samples[0].references


# CSV and TSV.


def encoded(folder: Path, name: str) -> str:
    return base64.b64encode((folder / name).read_bytes()).decode()


def test_csv(folder: Path) -> None:
    file = folder / "asked.csv"
    text = (
        "\ufeffimage,question,answer,kind\r\n"
        'a.png,"What, then?\nSay ""it""",3.0,one\r\n'
        "\r\n"
        "b.jpg,Why?,,\r\n"
        "b.jpg,Why?,NaN\r\n"
        "b.jpg,Why?,\"['a', 'b']\",two\r\n"
        "b.jpg,Why?,None,two\r\n"
    )
    file.write_bytes(text.encode())
    found = open_dataset(str(file))
    assert [(s.question, s.references, s.kind) for s in found.samples] == [
        ('What, then?\nSay "it"', ("3.0",), "one"),
        ("Why?", (), None),
        ("Why?", (), None),
        ("Why?", ("a", "b"), "two"),
        ("Why?", ("None",), "two"),
    ]
    assert found.samples[1].place == f"{file}, line 5"
    for delimiter, name in ((";", "s.csv"), ("\t", "t.tsv")):
        (folder / name).write_text(f"file{delimiter}question\na.png{delimiter}Why?\n")
        assert len(open_dataset(str(folder / name), columns={"image": "file"}).samples) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " is empty"),
        ("image,question", " is empty"),
        ("image,image\na.png,b", ", line 1: two columns are named 'image'"),
        ("picture,question\na.png,b", ", line 2: image: field required"),
        ("image,question\na.png,b,c", ", line 2: it has 3 cells, and the first row 2"),
        ('image,question\n"a.png,b\n', ", line 2: it is not a row of a table"),
        ("\r'", ", line 1: it is not a row of a table"),
        ("image,question\n,b", ", line 2: image: field required"),
        ("image,question\na.png,", ", line 2: there is no question"),
    ],
)
def test_faulty_tables_are_named(content: str, message: str, folder: Path) -> None:
    file = folder / "asked.csv"
    file.write_text(content)
    with pytest.raises(MMTokError) as error:
        open_dataset(str(file))
    assert error.value.message.startswith(f"{file}{message}") and error.value.hint
    file.write_bytes(b"image,question\na.png,Why?\na.png,\xff\n")
    with pytest.raises(MMTokError, match="line 3: it is not UTF-8"):
        open_dataset(str(file))


def test_vlmevalkits_tables(folder: Path) -> None:
    """Images in base64, larger than the csv module's limit, read late; a row may name the image of an earlier one."""
    generator = np.random.default_rng(0)
    PILImage.fromarray(generator.integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(folder / "noise.png")
    assert len(encoded(folder, "noise.png")) > csv.field_size_limit()
    names = ["index", "image", "question", "hint", "A", "B", "C", "answer", "category"]
    rows = [
        ["0", encoded(folder, "noise.png"), "Which?", 'Look, "twice"\nplease.', "red", "blue", "", "B", "color"],
        ["1", encoded(folder, "a.png"), "Which?", "", "red", "[1, 2]", "green", "C", "color"],
        ["1000000", "0", "Which?", "", "red", "blue", "", "A", "color"],
        [
            "3",
            f"['{encoded(folder, 'a.png')}', '{encoded(folder, 'b.jpg')}']",
            "Which?",
            "",
            "red",
            "blue",
            "",
            "A",
            "",
        ],
    ]
    file = folder / "bench.tsv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, delimiter="\t", lineterminator="\n").writerows([names, *rows])
    before = csv.field_size_limit()
    found = open_dataset(str(file))
    assert found.metric == "choice" and not found.problems and csv.field_size_limit() == before
    first, second, third, fourth = found.samples
    assert first.question.startswith('Look, "twice"\nplease.\nWhich?\nA. red\nB. blue\nAnswer with')
    assert (first.answer, first.choices, first.kind, first.id) == ("B", ("red", "blue"), "color", "0")
    assert second.choices == ("red", "[1, 2]", "green")
    assert [image.size for s in found.samples for image in s.images] == [
        (300, 300),
        (30, 20),
        (300, 300),
        (30, 20),
        (31, 20),
    ]
    assert first.image_ids == third.image_ids != second.image_ids and len(fourth.image_ids) == 2
    assert len(open_dataset(str(file), limit=1).samples) == 1
    file.write_text("changed")
    with pytest.raises(MMTokError, match="cannot be read any more"):
        first.open()


def test_rows_behind_the_limit_are_read_only_for_the_metric(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that no file may have show how far it is read; digests are those of the samples that are taken."""
    named = []
    monkeypatch.setattr(tables, "image_name", lambda text: named.append(text) or f"image {len(named)}")
    image = encoded(folder, "a.png").encode()
    head = b"index\timage\tquestion\tanswer"
    plain = head + b"\n" + b"".join(b"%d\t%s\tWhat?\ta cat\n" % (i, image) for i in range(3))
    choices = head + b"\tA\tB\n" + b"".join(b"%d\t%s\tWhat?\tA\tcat\tdog\n" % (i, image) for i in range(3))
    file = folder / "bench.tsv"
    file.write_bytes(plain)
    assert len(open_dataset(str(file), limit=1).samples) == len(named) == 1

    file.write_bytes(choices + b"\xff\n")
    assert open_dataset(str(file), limit=2).metric == "choice"  # which the format decides
    file.write_bytes(plain + b"\xff\n")
    assert len(open_dataset(str(file), limit=2, find_metric=False).samples) == 2
    for limit in (None, 2):
        with pytest.raises(MMTokError, match="line 5: it is not UTF-8"):
            open_dataset(str(file), limit=limit)


def test_base64_in_json(folder: Path) -> None:
    whole = encoded(folder, "a.png")
    file = write(
        folder / "asked.jsonl",
        row(image=whole),
        row(image=f"data:image/png;base64,{whole}"),
        row(image=whole[: len(whole) // 2 // 4 * 4]),
        row(image="x" * 300 + ".png"),
        *(row(image=f"data:image/png;base64,{wrong}") for wrong in ("éé", "A", "\0", "=")),
    )
    found = open_dataset(str(file))
    assert [s.open().images[0].size for s in found.samples[:2]] == [(30, 20)] * 2
    with pytest.raises(MMTokError, match=r"line 3, image"):
        found.samples[2].open()
    for sample in found.samples[3:]:
        with pytest.raises(MMTokError, match=r"line \d, image"):
            sample.open()
    assert len(found.problems) == 1 and "line 4: image: File name too long" in found.problems[0]


def test_rows_of_the_hub_about_one_image_share_its_name(folder: Path) -> None:
    content = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    other = {"bytes": (folder / "b.jpg").read_bytes(), "path": None}
    table = hub.Dataset.from_dict(
        {"image": [content, content, other], "question": ["a", "b", "c"], "answers": [["x"], ["x", "y"], ["z"]]}
    ).cast_column("image", hub.Image())
    table.save_to_disk(folder / "one")
    found = open_dataset(f"hub:{folder / 'one'}")
    first, second, third = found.samples
    assert first.image_ids == second.image_ids != third.image_ids
    assert found.metric == "anls" and open_dataset(f"hub:{folder / 'one'}", limit=1).metric == "anls"


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        ([["x"] * 3, ["x"] * 3, ["x"], ["x"], ["x"]], "textvqa"),  # of the first two rows
        ([None, None, ["x"], ["x"] * 3, ["x"] * 3], "anls"),  # of the rows up to the first answer
        ([None] * 5, None),
    ],
)
def test_the_metric_of_a_hub_dataset_is_that_of_its_first_rows(
    answers: list[Any], metric: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ROWS_FOR_METRIC", 2)
    features = hub.Features(image=hub.Image(), question=hub.Value("string"), answers=hub.List(hub.Value("string")))
    columns = {"image": [str(folder / "a.png")] * 5, "question": ["Why?"] * 5, "answers": answers}
    hub.Dataset.from_dict(columns, features).save_to_disk(folder / "table")
    assert {open_dataset(f"hub:{folder / 'table'}", limit=limit).metric for limit in (None, 1, 4)} == {metric}


VALUES: tuple[Any, ...] = (
    *(None, True, 3.0, float("nan"), float("inf"), 10**400, "", "a", "B", "\ud800", "\0", [], [[]], ["a"], ["a"] * 10),
    *({}, [{"answer": "a"}] * 3, [None], [{"from": "human", "value": "q"}], {"A": "r", "B": "s"}, "['a', 'b']"),
    *("[" * 2000, "x" * 300, "data:image/png;base64,x", ".", "/dev/null"),
)


def damaged_files(generator: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Files of every format, with fields of wrong types and bytes changed, inserted or missing."""
    usual = [
        {"image": "a.png", "question": "q?", "answer": "a", "choices": ["a", "b"]},
        *(f[0][0] for f in FORMATS.values()),
    ]
    for _ in range(count):
        rows = [dict(generator.choice(usual)) for _ in range(generator.randint(1, 3))]
        for changed in rows:
            for name in generator.sample([*changed, "A", "B", "index"], generator.randint(0, 2)):
                changed[name] = generator.choice(VALUES)
        kind = generator.choice(("a.jsonl", "a.json", "a.csv", "a.tsv"))
        out = io.StringIO()
        if kind == "a.jsonl":
            out.writelines(f"{json.dumps(changed)}\n" for changed in rows)
        elif kind == "a.json":
            json.dump(
                generator.choice([rows, {"data": rows}, {"questions": rows}]), out, indent=generator.choice([None, 1])
            )
        else:
            names = list(dict.fromkeys(name for changed in rows for name in changed))
            table = csv.DictWriter(out, names, delimiter="\t" if kind == "a.tsv" else ",")
            table.writeheader()
            table.writerows([{n: v for n, v in changed.items() if v != 10**400} for changed in rows])
        content = bytearray(out.getvalue().encode("utf-8", "surrogatepass"))
        for _ in range(generator.choice((0, 0, 1, 3))):
            place = generator.randrange(len(content))
            content[place : place + generator.choice((0, 1, 20))] = generator.choice(
                (b"", b'"', b"\n", b"\xff", b"[", b"\r")
            )
        yield kind, bytes(content)


def test_damaged_files_are_read_or_refused_in_one_line(folder: Path) -> None:
    generator = random.Random(0)
    outcomes: Counter[str] = Counter()
    for kind, content in damaged_files(generator, 600):
        file = folder / kind
        file.write_bytes(content)
        try:
            found = with_metric(
                open_dataset(str(file), limit=generator.choice((None, 1))), generator.choice((None, *METRICS))
            )
        except MMTokError as error:
            outcomes["refused"] += 1
            assert "\n" not in error.message and len(error.message) < 1000 and error.hint, content
            assert kind in error.message or "--metric" in error.message or "metric" in error.hint, error.message
        else:
            outcomes["read"] += 1
            assert not any("\n" in note for note in found.notes()), content
    assert min(outcomes["refused"], outcomes["read"]) > 50
