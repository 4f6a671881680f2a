"""Files of selections: written by `prune --export`, replayed by `--kept`."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import refused, run, run_json

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.configuration import cases_of
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.kept import Kept, KeptFile, read_kept, write_kept
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Reduced, answer
from mmtok_cli.replays import OneSample, kept_file, selections_of
from mmtok_cli.settings import CompareSettings

QUESTION = "What color is the star?"


@pytest.mark.parametrize("method", ["mmtok", "visionzip", "random", "fastv"])
def test_a_replay_gives_what_the_method_gives(
    method: str, vlm: VisionLanguageModel, samples: list[Sample], tmp_path: Path
) -> None:
    """Merged tokens, class tokens and crops included. FastV's tokens leave earlier in a replay: only the kept ones are
    the same."""
    case = Case(method, make_method(method, **({"layer": 2} if method == "fastv" else {})), Budget(count=8))
    said = answer(vlm, case.method, samples, case.budget, max_new_tokens=2)
    file, rows = kept_file(vlm, case, [selections_of(vlm, case, sample) for sample in samples])
    path = tmp_path / "kept.safetensors"
    write_kept(path, file, rows)
    found = answer(vlm, make_method("kept", file=str(path)), samples, None, max_new_tokens=2)
    for mine, theirs in zip(found.selections, said.selections, strict=True):
        assert torch.equal(mine.indices, theirs.indices)
    if method != "fastv":
        assert torch.equal(found.first_logits, said.first_logits) and found.texts == said.texts
    assert bool(rows) == (method == "visionzip" or (method == "random" and vlm.family == "llava_next"))  # its padding
    if not rows:
        write_kept(tmp_path / "kept.json", file, rows)
        assert read_kept(tmp_path / "kept.json").file == read_kept(path).file == file


def test_the_file_of_a_photo_is_replayed_by_every_command(photo: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    shown = run_json("prune", photo, QUESTION, "-b", 8, "--export", kept)
    content = json.loads(kept.read_text())
    assert content["schema"] == "mmtok.kept/1" and content["method"] == "mmtok" and content["budget"] == "8"
    [selection] = content["selections"]
    assert selection["image"] == photo.name and selection["question"] == QUESTION and selection["total"] == 576
    assert selection["indices"] == shown["images"][0]["indices"]
    assert run_json("prune", photo, QUESTION, "--kept", kept)["images"][0]["indices"] == selection["indices"]
    plain, replayed = (run_json("infer", photo, QUESTION, *how) for how in (("-b", 8), ("--kept", kept)))
    assert replayed["answer"] == plain["answer"] and replayed["tokens"]["kept"] == 8 and replayed["method"] == "kept"
    smaller = tmp_path / "smaller.json"
    assert run("prune", photo, QUESTION, "-b", 8, "--image-scale", 0.5, "--export", smaller).exit_code == 0
    tokens = run_json("infer", photo, QUESTION, "--kept", smaller)["tokens"]  # at the scale that the file names
    assert (tokens["kept"], tokens["encoded"], tokens["total"]) == (8, [96], 576)
    refused(run("infer", photo, QUESTION, "--kept", smaller, "--image-scale", 0.75), "is of 96 vision tokens")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": str(photo), "question": QUESTION, "answer": "red"}))
    options = ("--data", data, "--rounds", 1, "--warmup", 0, "-b", 8, "--run-dir", tmp_path / "run")
    found = run("prune", "--data", data, "-b", 8, "--export", tmp_path / "data.json")
    assert found.exit_code == 0, found.output
    result = run_json("compare", "--methods", "mmtok", "--kept", tmp_path / "data.json", *options)
    _, mmtok, again = result["results"]
    assert again["case"]["method"] == "kept" and again["tokens"]["kept"] == 8
    assert again["fidelity"] == mmtok["fidelity"] and again["score"] == mmtok["score"]
    parameters = again["case"]["parameters"]
    assert make_method("kept", **parameters).selections.file.selections[0].question == QUESTION
    (tmp_path / "data.json").write_text(kept.read_text() + " ")
    with pytest.raises(MMTokError, match="has changed since the run was started"):
        make_method("kept", **parameters)


BROKEN = [
    ("", "is not a file of selections"),
    ("[]", "is not a file of selections"),
    ('{"schema": "mmtok.kept/1", "selections": []}', "no selections"),
    ('{"schema": "mmtok.kept/2", "selections": []}', "schema"),
    ('{"schema": "mmtok.kept/1", "selections": [{"indices": [1]}]}', "image"),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "indices": ["x"]}]}', "indices"),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "total": 8, "indices": [8]}]}', "beyond its 8"),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "indices": [576]}]}', "576 vision tokens"),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "indices": [3, 3]}]}', "index 3 twice"),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "indices": [-1]}]}', "only .safetensors"),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "other.png", "indices": [3]}]}', "no selection of photo.png"),
    (
        '{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "question": "Why?", "indices": [3]}]}',
        "no selection of photo.png with the question",
    ),
    (
        '{"schema": "mmtok.kept/1", "selections": [{"image": "photo.png", "total": 64, "indices": [3]}]}',
        "64 vision tokens, and the image has 576",
    ),
    ('{"schema": "mmtok.kept/1", "selections": [{"image": "a"}, {"image": "a"}]}', "occurs twice"),
    ('{"schema": "mmtok.kept/1", "image_scale": 2, "selections": [{"image": "a"}]}', "kept.json image_scale"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_file_that_cannot_be_replayed_is_refused_in_a_line(
    content: str, message: str, photo: Path, tmp_path: Path
) -> None:
    path = tmp_path / "kept.json"
    path.write_text(content)
    refused(run("infer", photo, QUESTION, "--kept", path), *message.split())


def test_options_that_contradict_a_replay_are_refused(photo: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    write_kept(kept, KeptFile(selections=(Kept(image=photo.name, indices=(3, 40)),)), {})
    assert run_json("infer", photo, QUESTION, "--kept", kept)["tokens"]["kept"] == 2  # as written by hand
    for option in (("-b", 8), ("--method", "random"), ("--set", "mmtok.alpha=1"), ("--draft", "self"), ("--seed", 1)):
        refused(run("infer", photo, QUESTION, "--kept", kept, *option), "has no effect")
    refused(run("infer", photo, QUESTION, "--method", "kept"), "replay a file by --kept FILE")
    twice = CompareSettings.of(methods="mmtok", budget="8", kept=[kept, kept])
    assert [str(case) for case in cases_of(twice)] == ["full", "mmtok @ 8", "kept (kept.json)"]
    refused(run("infer", photo, QUESTION, "--kept", tmp_path / "absent.json"), "cannot be read")
    refused(run("infer", photo, QUESTION, "--kept", photo), "neither a .json nor a .safetensors")
    refused(run("prune", photo, QUESTION, "--kept", kept, "--export", kept), "kept.json")
    refused(run("prune", photo, QUESTION, "--method", "visionzip", "--export", tmp_path / "new.json"), "merged tokens")
    for images in ((photo, QUESTION), ("--data", "demo")):
        smaller = run("prune", *images, "--method", "resize", "-b", 16, "--export", tmp_path / "new.json")
        refused(smaller, "resize makes images smaller itself")
    refused(run("prune", "--data", "demo"), "--data requires --export")
    refused(run("prune", "--data", "demo", "--export", kept, photo), "IMAGE")
    refused(run("prune", photo), "QUESTION")
    refused(run("prune", photo, QUESTION, "--limit", 3), "--limit requires --data")
    assert json.loads(kept.read_text())["selections"][0]["indices"] == [3, 40]


def test_padding_is_replayed_on_the_released_track_alone(photo: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    write_kept(kept, KeptFile(selections=(Kept(image=photo.name, indices=(0, 300)),)), {})  # the photo is wide
    assert run_json("infer", photo, QUESTION, "--kept", kept)["tokens"]["kept"] == 2
    refused(run("infer", photo, QUESTION, "--kept", kept, "--track", "harmonised"), "keeps padding (index 0)")


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(MMTokError, match="is not a file of selections"):
        read_kept(path)
    file = KeptFile(selections=(Kept(image="a", indices=(3, 40)),))
    write_kept(path, file, {0: (torch.zeros(1, 8), None)})
    with pytest.raises(MMTokError, match="a row for each of the 2 indices"):
        read_kept(path)


def test_vision_tokens_of_a_dataset_are_not_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Reduced]] = []

    def watched(*args: Any) -> OneSample:
        assert sum(one() is not None for one in held) < 3
        found = selections_of(*args)
        held.append(weakref.ref(found[1]))
        return found

    monkeypatch.setattr("mmtok_cli.replays.selections_of", watched)
    shown = run(
        "prune", "--data", "demo", "--limit", 6, "--method", "uniform", "-b", 4, "--export", tmp_path / "k.json"
    )
    assert shown.exit_code == 0, shown.output
    assert len(held) == 6
