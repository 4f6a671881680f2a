"""The names of datasets: taken apart in one place, and the same from every directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import picture

from mmtok_cli.data.datasets import open_dataset
from mmtok_cli.data.names import parse_name
from mmtok_cli.errors import MMTokError
from mmtok_cli.planning import absolute_data, with_absolute_paths
from mmtok_cli.results.records import digest_of_samples
from mmtok_cli.settings import CompareSettings


@pytest.mark.parametrize(
    ("text", "kind", "names", "selectors"),
    [
        ("demo", "demo", (), ()),
        ("a.jsonl", "path", ("a.jsonl",), ()),
        ("photos/*.png", "path", ("photos/*.png",), ()),
        ("other:a.jsonl", "path", ("other:a.jsonl",), ()),
        ("pope:a,b.json", "pope", ("a,b.json",), ()),
        ("vqav2:a.json", "vqav2", ("a.json",), ()),
        ("vqav2:a.json,b.json", "vqav2", ("a.json", "b.json"), ()),
        ("hub:some/where", "hub", ("some/where",), ()),
        ("hub:some/where:en:test", "hub", ("some/where",), ("en", "test")),
    ],
)
def test_a_name_is_taken_apart_and_put_together(
    text: str, kind: str, names: tuple[str, ...], selectors: tuple[str, ...]
) -> None:
    found = parse_name(text)
    assert (found.kind, found.names, found.selectors, str(found)) == (kind, names, selectors, text)


def test_names_of_too_many_parts() -> None:
    with pytest.raises(MMTokError, match="names 3 files"):
        parse_name("vqav2:a,b,c")
    for text in ("hub:", "hub:a:", "hub:a:b:c:d"):
        with pytest.raises(MMTokError, match="is not the name of a dataset"):
            parse_name(text)


def place_with(folder: Path) -> None:
    """A dataset of every kind, with commas and colons in the names of files."""
    import datasets as hub

    folder.mkdir(parents=True)
    picture(20, 20).save(folder / "a.png")
    rows = [{"image": "a.png", "question": "Is it?", "answer": "yes", "text": "Is it?", "label": "yes"}]
    (folder / "rows.json").write_text(json.dumps([rows[0] | {"question_id": 1}]))
    asked = {"questions": [{"question_id": 1, "image_id": "a.png", "question": "Is it?"}]}
    known = {"annotations": [{"question_id": 1, "answers": [{"answer": "yes"}] * 10}]}
    for name in ("x.json", "x,y.json", "asked,a.json"):
        (folder / name).write_text(json.dumps(asked))
    for name in ("y,z.json", "known.json"):
        (folder / name).write_text(json.dumps(known))
    (folder / "photos").mkdir()
    picture(20, 20).save(folder / "photos" / "b.png")
    table = hub.Dataset.from_dict({"image": [str(folder / "a.png"), None], "question": ["Is it?"] * 2})
    hub.DatasetDict({"test": table.cast_column("image", hub.Image())}).save_to_disk(folder / "sa:ved")


@pytest.mark.parametrize("directory", ["plain", "with, comma", "with:colon", "run [1]"])
def test_absolute_names_open_the_same_data_anywhere(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_with(tmp_path / directory)
    monkeypatch.chdir(tmp_path / directory)
    relative = (
        *(
            "rows.json",
            "pope:rows.json",
            "photos",
            "photos/*.png",
            "**/*.png",
            "a.png",
            "hub:sa:ved",
            "hub:sa:ved:test",
        ),
        *("vqav2:x.json", "vqav2:x,y.json", "vqav2:x.json,known.json", "vqav2:asked,a.json,y,z.json"),
    )

    def digest(text: str) -> str:
        plain = text.endswith(("photos", "*.png", "a.png"))
        return digest_of_samples(open_dataset(text, question="What is it?" if plain else None).samples)

    here = {text: (absolute_data(text), digest(text)) for text in relative}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for text, (absolute, expected) in here.items():
        assert str(tmp_path / directory) in absolute and absolute_data(absolute) == absolute
        assert digest(absolute) == expected, text


def test_what_is_not_a_path_stays() -> None:
    for text in ("demo", "hub:some/where:test"):
        assert absolute_data(text) == text


@pytest.mark.parametrize("name", ["~nobody-here/x", "x" * 300, "a\0b", "x" * 300 + "/y", "~nobody-here"])
def test_names_that_no_file_can_have_are_no_error_here(name: str) -> None:
    """Whoever opens them says what is wrong."""
    settings = CompareSettings(model=name, data=name, image_root=Path(name))
    assert with_absolute_paths(settings).model == name
    for prefix in ("pope:", "vqav2:", "hub:"):
        assert name in absolute_data(prefix + name)
