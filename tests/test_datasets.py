"""Datasets: JSON lines, POPE's files, folders, the hub; opened late, with what cannot be used named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets as hub
import pytest
from conftest import picture

from mmtok_cli.data import samples as samples_module
from mmtok_cli.data.datasets import Dataset, metric_of, open_dataset
from mmtok_cli.data.samples import ClosedImages, Sample
from mmtok_cli.errors import MMTokError


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
    "[1, 2]": "it is not a JSON object",
    '{"question": "Why?"}': "image: field required",
    '{"image": "a.png"}': "there is no question",
    '{"image": "a.png", "question": "  "}': "the question is empty",
    '{"image": "a.png", "question": "\\ud800"}': "question: it is not valid Unicode",
    '{"image": "", "question": "Why?"}': "image: name an image file",
    '{"image": 3, "question": "Why?"}': "image: ",
    '{"image": "a.png", "question": "Why?", "answer": true}': "answer: ",
    '{"image": "a.png", "question": "Why?", "answers": ["one", "two"]}': "answers: give at least 3 answers",
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
    with pytest.raises(MMTokError, match=r"there is no dataset 'nowhere\.jsonl'") as error:
        open_dataset("nowhere.jsonl")
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
    assert found.metric == "yes-no" and found.problems == (f"{saved}:test, row 2: there is no question",)
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


def test_how_answers_are_scored() -> None:
    def metric(*answers: str | None, several: tuple[str, ...] = ()) -> str | None:
        return metric_of([Sample((), "?", (), answer=answer, answers=several) for answer in answers])

    assert metric("yes", "No", None) == "yes-no"
    assert metric("yes", "yes") == metric("yes", "red") == "exact"
    assert metric(None) is None and metric("yes", "no", several=("a", "b", "c")) == "vqa"


def test_answers_of_several_people(folder: Path) -> None:
    people = ["cat", "cat", "a dog"]
    file = write(
        folder / "asked.jsonl", row(answers=people), row(answers=[{"answer": a, "answer_id": 1} for a in people])
    )
    found = open_dataset(str(file))
    assert found.metric == "vqa" and all(s.answers == tuple(people) for s in found.samples)
