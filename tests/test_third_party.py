"""A method of another package: the checks that mmtok offers for it, and what its users see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cli_helpers import refused, run, run_json
from PIL import Image

import mmtok_cli as mmtok
from mmtok_cli.methods import base, method_class, method_names
from mmtok_cli.methods.base import Method, highest
from mmtok_cli.methods.full import Full
from mmtok_cli.methods.testing import CHECKS, check_declaration, check_method
from mmtok_cli.models.tiny import tiny_families
from mmtok_cli.tokens import Cut, LayerTokens, Selection, TextTokens, VisionTokens

UNLIKE = Path(__file__).parent / "unlike"
LAYERS = {
    "fastv": {"layer": 1},
    "pyramiddrop": {"layers": (1, 3)},
    "sparsevlm": {"layers": (0, 1, 2)},
}


def installed(directory: Path, module: str, code: str, entry_point: str) -> None:
    """Put a package with one method where pip would."""
    sys.modules.pop(module, None)  # that of an earlier test
    (directory / f"{module}.py").write_text(code)
    info = directory / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmtok.methods]\n{entry_point}\n")


@pytest.fixture()
def unlike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    installed(tmp_path, "unlike", (UNLIKE / "unlike.py").read_text(), "unlike = unlike:Unlike")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("unlike", None)


def test_every_check_by_pytest(unlike: Path) -> None:
    shutil.copy(UNLIKE / "checks.py", unlike / "test_unlike.py")
    paths = os.pathsep.join([str(unlike), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_unlike.py"]
    done = subprocess.run(command, cwd=unlike, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{1 + len(CHECKS) * 2 * len(tiny_families())} passed" in done.stdout


def test_commands(unlike: Path, tmp_path: Path) -> None:
    assert "unlike" in run("methods").stdout and "tokens unlike the pivots" in run("methods").stdout
    assert "--set unlike.pivots=4" in run("methods", "unlike").stdout
    options = ("-b", 16, "--set", "unlike.pivots=2", "--limit", 2, "--rounds", 1)
    results = run_json("compare", "--methods", "unlike,uniform", *options)["results"]
    assert [result["case"]["method"] for result in results] == ["full", "unlike", "uniform"]
    assert results[1]["case"]["parameters"] == {"pivots": 2} and results[1]["tokens"]["kept"] == 16

    oblong = tmp_path / "oblong.png"
    Image.new("RGB", (300, 90), "orange").save(oblong)
    question = (oblong, "What color is it?", "--method", "unlike", "--max-new-tokens", 1)
    assert run_json("infer", *question, "-b", "100%")["tokens"]["kept"] == 576
    assert run_json("infer", *question, "-b", "90%")["tokens"]["kept"] == 192  # all that is not padding


@pytest.mark.usefixtures("unlike")
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("unlike.pivots=0", "unlike: pivots must be 1 or more, not 0"),
        ("unlike.pivots=two", "unlike.pivots cannot be 'two'"),
        ("unlike.pivot=2", "unlike has no parameter 'pivot', only pivots"),
    ],
)
def test_values_that_the_method_does_not_accept(setting: str, words: str, photo: Path) -> None:
    refused(run("infer", photo, "What is it?", "-b", 4, "--method", "unlike", "--set", setting), words)


@pytest.mark.usefixtures("unlike")
def test_in_python() -> None:
    assert mmtok.make_method("unlike", "demo", pivots=3).pivots == 3
    with pytest.raises(mmtok.MMTokError, match="pivots must be 1 or more"):
        mmtok.make_method("unlike", pivots=0)
    with pytest.raises(mmtok.MMTokError, match="unlike has no parameter 'pivot', only pivots"):
        mmtok.make_method("unlike", "demo", pivot=3)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nowhere", "cannot be imported: No module named 'nowhere'"),
        ("Broken = 3", "not a subclass"),
        ("from mmtok_cli.methods.base import Method\nclass Broken(Method):\n    power: int = 2", "no @dataclass"),
        (
            "from dataclasses import dataclass\nfrom mmtok_cli.methods.base import Method\n"
            "@dataclass(frozen=True)\nclass Broken(Method):\n    power: int = 2",
            "no summary",
        ),
    ],
)
def test_packages_that_cannot_be_used(code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "broken_method", code, "broken = broken_method:Broken")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(mmtok.MMTokError, match=words) as error:
        method_class("broken")
    assert "'broken' of broken_method" in error.value.message and "broken_method" in error.value.hint
    sys.modules.pop("broken_method", None)


def test_methods_are_found_without_reading_all_metadata(unlike: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(package: Distribution) -> None:
        raise AssertionError("metadata was read")

    monkeypatch.setattr(Distribution, "metadata", property(unread))
    assert "unlike" in method_names()


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_packages_whose_metadata_cannot_be_read(file: str, unlike: Path) -> None:
    """Methods of other packages are there all the same."""
    installed(unlike, "damaged_method", "import nowhere", "damaged = damaged_method:Damaged")
    (unlike / "damaged_method-1.0.dist-info" / file).write_bytes(b"[mmtok.methods]\n\xff")
    assert "unlike" in method_names() and method_class("unlike")
    with pytest.raises(mmtok.MMTokError, match="damaged"):
        method_class("damaged")
    assert "unlike" in run("methods").stdout


def test_of_two_releases_the_one_that_is_imported_counts(
    unlike: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    installed(other, "unlike", "", "older = unlike:Older")
    sys.path.append(str(other))
    try:
        assert "unlike" in method_names() and "older" not in method_names()
    finally:
        sys.path.remove(str(other))


def test_parameters_without_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Needy(Full):
        power: int

    monkeypatch.setattr("mmtok_cli.methods.method_class", lambda name: Needy)
    with pytest.raises(mmtok.MMTokError, match="needy needs a value for power"):
        mmtok.make_method("needy")
    assert mmtok.make_method("needy", power=2) == Needy(2)


@pytest.mark.parametrize("name", ["mmtok", "visionzip", "resize", *LAYERS])
def test_built_in_methods_pass_the_checks(name: str) -> None:
    method = mmtok.make_method(name, **LAYERS.get(name, {}))
    assert check_method(method, ["llava", "qwen3_vl"] if name != "sparsevlm" else ["llava_next"]) == []


@pytest.mark.parametrize("name", ["evs", "uniform:frames"])
def test_methods_for_videos_are_checked_with_videos(name: str) -> None:
    assert check_method(mmtok.make_method(name), ["llava", "llava_onevision"]) == ["llava"]


def test_defects_of_methods_for_videos_are_found() -> None:
    @dataclass(frozen=True)
    class Still(Method):
        """Keeps what changes between frames, and one token too few."""

        summary: ClassVar[str] = "broken"
        needs_video: ClassVar[bool] = True

        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            slices = vision.features.unflatten(0, (vision.slices, -1))
            changes = (slices - slices.roll(1, 0)).norm(dim=-1).flatten()
            return highest(changes, vision.eligible, budget - 1)

    with pytest.raises(AssertionError, match="kept 17 tokens of video-0 at a budget of 18"):
        check_method(Still(), ["llava_onevision"])


def test_examples_of_the_guide() -> None:
    """The docstring of methods/base.py shows one method for each place after the encoder."""
    names = vars(base) | {"dataclass": dataclass, "ClassVar": ClassVar, "Cut": Cut}
    for example in re.findall(r"(    @dataclass.*?)\n\n\w", base.__doc__ or "", re.DOTALL):
        exec(textwrap.dedent(example), names)
    assert check_method(names["LargestNorm"](), ["llava"]) == check_method(names["AfterTwoLayers"](), ["llava"]) == []
    assert names["LargestNorm"].acts() == "between encoder and language model"
    assert names["AfterTwoLayers"].acts() == "inside the language model"


def test_families_that_lack_a_signal_are_named() -> None:
    assert check_method(mmtok.make_method("vispruner"), ["qwen2_5_vl"]) == ["qwen2_5_vl"]


@dataclass(frozen=True)
class Broken(Method):
    """A method with one defect."""

    summary: ClassVar[str] = "broken"
    defect: str = ""
    drawn: ClassVar[list[int]] = []

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        norms = vision.projected.float().norm(dim=-1)
        found = highest(norms, vision.eligible, budget - (self.defect == "count")).indices
        if self.defect == "order":
            found = found.flip(0)
        elif self.defect == "duplicates":
            found = found[:1].expand(budget)
        elif self.defect == "padding":
            found = torch.arange(budget)
        elif self.defect == "draws":
            found = torch.randperm(vision.total)[:budget].sort().values
        elif self.defect == "batch":
            Broken.drawn.append(1)
            found = highest(norms.roll(len(Broken.drawn)), vision.eligible, budget).indices
        return Selection(found)


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("count", "kept 7 tokens of picture-0 at a budget of 8"),
        ("order", "indices that do not ascend"),
        ("duplicates", "a token twice"),
        ("padding", "kept padding"),
        ("draws", "draw from a generator|kept padding|other tokens"),
        ("batch", "the choice changes|other tokens are kept in a batch"),
    ],
)
def test_defects_are_found(defect: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_method(Broken(defect), ["llava"])
    assert check_method(Broken(), ["llava"]) == []


def test_half_a_hook_is_found() -> None:
    @dataclass(frozen=True)
    class Half(Method):
        """Overrides one of two hooks."""

        summary: ClassVar[str] = "half"

        def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
            return Selection(torch.arange(cut.keep))

    with pytest.raises(AssertionError, match="override both or neither"):
        check_declaration(Half())
