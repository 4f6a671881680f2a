"""Pictures looked at by a program, and figures for people."""

from __future__ import annotations

import pytest
from PIL import Image

from mmtok_cli.report.catalogues import kept_map
from mmtok_cli.report.overlay import FIRST_FRAME, FRAME, overlay
from mmtok_cli.report.units import count, number, seconds, size, spread


def grid_boxes(cells: int, width: int) -> list[tuple[float, float, float, float]]:
    return [(c * width, r * width, (c + 1) * width, (r + 1) * width) for r in range(cells) for c in range(cells)]


def test_overlay_dims_what_was_dropped_and_frames_what_was_kept() -> None:
    image = Image.new("RGB", (720, 720), (80, 160, 240))
    drawn = overlay(image, grid_boxes(6, 120), kept=[0, 14], order=[14, 0], mark=1)
    assert drawn.size == (720, 720)
    assert drawn.getpixel((60, 60)) == (80, 160, 240)  # kept
    assert drawn.getpixel((0, 60)) == FRAME
    assert drawn.getpixel((240, 300)) == FIRST_FRAME  # the first pick
    assert max(drawn.getpixel((660, 660))) < 100  # dropped
    assert drawn.getpixel((300, 250)) == (80, 160, 240)  # kept, beside its number


def test_overlay_leaves_padding_out() -> None:
    image = Image.new("RGB", (720, 360), (80, 160, 240))
    boxes = [(left, top - 180, right, bottom - 180) for left, top, right, bottom in grid_boxes(6, 120)]
    drawn = overlay(image, boxes, kept=[0, 12], order=None)
    assert drawn.size == (720, 360)
    assert drawn.getpixel((0, 100)) == FRAME and max(drawn.getpixel((300, 10))) < 100


def test_kept_map() -> None:
    lines = kept_map((2, 3), [0, 5], [5, 0], 1, [True] * 3 + [False, True, True]).plain.split("\n")
    assert lines == [" ■  ·  · ", "    ·  1 "]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-6, "2 µs"), (0.0123, "12.3 ms"), (0.4567, "457 ms"), (1.234, "1.23 s"), (456.7, "457 s"), (0.99996, "1 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_units() -> None:
    assert spread(0.0154, 0.0106, 0.0177) == "15.4 ms (10.6–17.7)"
    assert (size(None), size(512), size(2.5 * 2**20), size(3 * 2**40)) == ("–", "512 B", "2.5 MiB", "3072 GiB")
    assert (count(950), count(2.05e6), count(8.45e12)) == ("950", "2.05 M", "8.45 T")
    assert (count(999.7e6), size(999.7 * 1024)) == ("1 G", "0.976 MiB")
    assert (number(64.0), number(57.25)) == ("64", "57.2")
