"""Files that are no images, and damaged ones of every kind: refused in one line, without waiting for them."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image

from mmtok_cli.data.images import FORMATS, open_image
from mmtok_cli.data.pictures import is_pattern, pictures
from mmtok_cli.errors import MMTokError


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a device, a pipe or a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, a pipe or a socket"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.symlink_to("nowhere"), "there is no file"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_refused_unopened(make: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(MMTokError, match=words):
        open_image(tmp_path / "a.png")


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b.png", "~nobody/a.png", "", "a/" * 3000 + "b.png"):
        with pytest.raises(MMTokError):
            open_image(name)


def test_patterns_of_images(tmp_path: Path) -> None:
    assert all(map(is_pattern, ("*.png", "photos/*", "run [12]/*.JPG", "**/*.jp*g", "a?.webp")))
    assert not any(map(is_pattern, ("a.png", "run [2024]/a.jsonl", "run [2024]/a.csv", "*.jsonl")))
    folder = tmp_path / "run [2024]"
    folder.mkdir()
    picture(20, 20).save(folder / "a [1].png")
    for name in (folder, folder / "a [1].png", tmp_path / "run*" / "*.png"):
        samples, problems = pictures(str(name), "What?", None)
        assert [Path(sample.id).name for sample in samples] == ["a [1].png"] and not problems


def damaged(whole: bytes, seed: int) -> bytes:
    """An encoded image with some bytes changed, removed or inserted, most of them in its headers."""
    draw, content = random.Random(seed), bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(min(len(content), draw.choice((64, 200, len(content)))))
        length = draw.choice((0, 1, 4))
        content[place : place + length] = draw.choice(
            (b"\xff" * length, b"\0" * length, draw.randbytes(draw.choice((1, 4))))
        )
    return bytes(content[: draw.choice((len(content), len(content), draw.randrange(len(content))))]) or b"\0"


@pytest.mark.parametrize("kind", [*FORMATS, "exif"])
def test_damage_of_any_kind_is_an_error_in_one_line(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a description", 0x011A: 72.0})
    stream = BytesIO()
    picture(60, 40).save(stream, "JPEG" if kind == "exif" else kind, exif=exif)
    read = 0
    for seed in range(300):
        content = damaged(stream.getvalue()[: 120 if kind == "exif" else None], seed)
        if kind == "exif":
            content += stream.getvalue()[len(content) :]
        try:
            read += open_image("a.png", content).mode == "RGB"
        except MMTokError as error:
            assert error.message.startswith("a.png") and "\n" not in error.message and error.hint
    assert 0 < read < 300 and not recwarn.list


@pytest.mark.parametrize(
    "error", [struct.error("unpack requires"), IndexError(), KeyError(3), zlib.error("x"), TypeError()]
)
def test_whatever_a_decoder_raises(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(20, 20).save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(MMTokError, match=r"a\.png is damaged: \S"):
            open_image(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    assert open_image(tmp_path / "a.png").size == (20, 20)  # damaged metadata; the picture is there
