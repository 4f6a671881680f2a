"""Opening what people have: every mode and quirk either works as they expect or is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from mmtok_cli.data.images import open_image
from mmtok_cli.data.samples import demo_samples
from mmtok_cli.errors import MMTokError

RED = (200, 30, 40)


def opened(image: Image.Image, path: Path, **options: object) -> Image.Image:
    image.save(path, **options)
    result = open_image(path)
    assert result.mode == "RGB"
    return result


def near(image: Image.Image, place: tuple[int, int], colour: tuple[int, int, int], by: int = 12) -> bool:
    return all(abs(a - b) <= by for a, b in zip(image.getpixel(place), colour, strict=True))


def test_modes_of_red(tmp_path: Path) -> None:
    red = Image.new("RGB", (20, 10), RED)
    assert near(opened(red, tmp_path / "a.png"), (3, 3), RED)
    assert near(opened(red.convert("RGBA"), tmp_path / "b.png"), (3, 3), RED)
    assert near(opened(red.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path / "c.png"), (3, 3), RED)
    assert near(opened(red.convert("CMYK"), tmp_path / "d.jpg"), (3, 3), RED)
    assert near(opened(red.convert("L"), tmp_path / "e.png"), (3, 3), (82, 82, 82))
    assert near(opened(red.convert("1"), tmp_path / "f.png"), (3, 3), (255, 255, 255), 255)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 10), (*RED, 0))
    assert near(opened(clear, tmp_path / "a.png"), (3, 3), (255, 255, 255))
    assert near(opened(Image.new("LA", (20, 10), (0, 0)), tmp_path / "b.png"), (3, 3), (255, 255, 255))
    palette = Image.new("P", (20, 10), 0)
    palette.putpalette([*RED] * 256)
    assert near(opened(palette, tmp_path / "c.png", transparency=0), (3, 3), (255, 255, 255))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((10, 20), 32768, np.uint16))
    assert near(opened(grey, tmp_path / "a.png"), (3, 3), (128, 128, 128))
    assert near(opened(grey, tmp_path / "b.tif"), (3, 3), (128, 128, 128))
    small = Image.fromarray(np.full((10, 20), 200, np.int32))
    assert near(opened(small, tmp_path / "c.tif"), (3, 3), (200, 200, 200))
    with pytest.raises(MMTokError, match="more than 16 bits"):
        opened(Image.fromarray(np.full((10, 20), 70000, np.int32)), tmp_path / "d.tif")
    with pytest.raises(MMTokError, match="floating-point"):
        opened(Image.fromarray(np.ones((10, 20), np.float32)), tmp_path / "e.tif")


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, (0, 0, 255))]
    assert near(opened(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:]), (3, 3), RED)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "black")
    image.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = opened(image, tmp_path / "a.png", exif=exif)
    assert turned.size == (10, 20) and near(turned, (8, 2), RED) and near(turned, (2, 2), (0, 0, 0))


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MMTokError, match="there is no file"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(MMTokError, match="cannot be read: File name too long"):
        open_image("x" * 5000)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(MMTokError, match="is not an image"):
        open_image(tmp_path / "empty.png")
    picture(200, 200).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(MMTokError, match="is damaged"):
        open_image(tmp_path / "half.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MMTokError, match="more than 1,000 pixels"):
        open_image(tmp_path / "whole.png")


def test_demo_samples_are_the_same_every_time() -> None:
    first, second = demo_samples(10), demo_samples(10)
    assert [(s.question, s.answer, s.image_ids) for s in first] == [(s.question, s.answer, s.image_ids) for s in second]
    assert all(a.images[0].tobytes() == b.images[0].tobytes() for a, b in zip(first, second, strict=True))
    assert all(s.images[0].size == (336, 336) and s.answer and s.kind for s in first)
