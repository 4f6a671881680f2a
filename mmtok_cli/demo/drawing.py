"""From a scene to its picture, with NumPy and Pillow only."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmtok_cli.demo.scenes import COLOURS, Scene, SceneObject, Split, generator

_SMOOTH = 3  # shapes are drawn this much larger and averaged down, for smooth edges
_DARK_INK, _LIGHT_INK = (16, 16, 16), (250, 250, 250)
_LIGHT_COLOURS = frozenset({"yellow", "white", "orange"})
_DIGIT_SCALE = {"circle": 1.25, "square": 1.3, "triangle": 0.95, "star": 0.95, "cross": 0.95, "heart": 1.05}
_DIGIT_DROP = {"triangle": 0.22, "star": 0.03, "heart": -0.08}


def draw(scene: Scene) -> Image.Image:
    """The picture, `size` x `size` RGB."""
    image = Image.fromarray(background(scene.split, scene.seed, scene.size))
    for item in scene.objects:
        _paint(image, item)
    return image


def background(split: Split, seed: int, size: int) -> np.ndarray:
    """A muted texture, uint8 `[size, size, 3]`. Training and evaluation draw from different families."""
    rng = generator(split, seed, purpose=1)
    families = FAMILIES[split]
    relief = families[int(rng.integers(len(families)))](rng, size)
    relief = relief + np.float32(rng.uniform(0.02, 0.35)) * rng.standard_normal((size, size), dtype=np.float32)
    contrast = rng.uniform(3, 28) if split == "train" else rng.uniform(6, 20)
    grey = rng.uniform(75, 180) if split == "train" else rng.uniform(85, 170)
    tint = grey + rng.uniform(-16, 16, 3)
    tilt = contrast * (1 + rng.uniform(-0.3, 0.3, 3))  # the relief itself is slightly coloured
    pixels = tint.astype(np.float32) + relief[..., None].astype(np.float32) * tilt.astype(np.float32)
    return np.clip(pixels, 45, 205).astype(np.uint8)


def outline(
    item: SceneObject, scale: float = 1.0, origin: tuple[float, float] = (0.0, 0.0)
) -> list[tuple[float, float]]:
    """The polygon of an object in pixels, after subtracting `origin` and scaling."""
    angle = math.radians(item.tilt)
    turn, side = math.cos(angle), math.sin(angle)
    x0, y0 = (item.centre[0] - origin[0]) * scale, (item.centre[1] - origin[1]) * scale
    size = item.radius * scale
    return [
        (x0 + size * (x * turn - y * side), y0 + size * (x * side + y * turn)) for x, y in _unit_polygon(item.shape)
    ]


def digit_box(item: SceneObject) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the square in which an object's digit is drawn."""
    height = item.radius * _DIGIT_SCALE[item.shape]
    x, y = item.centre[0], item.centre[1] + item.radius * _DIGIT_DROP.get(item.shape, 0.0)
    return x - 0.4 * height, y - 0.5 * height, x + 0.4 * height, y + 0.5 * height


def _paint(image: Image.Image, item: SceneObject) -> None:
    reach = item.radius + 2
    left, top = item.centre[0] - reach, item.centre[1] - reach
    mask = Image.new("L", (2 * reach * _SMOOTH, 2 * reach * _SMOOTH))
    ImageDraw.Draw(mask).polygon(outline(item, _SMOOTH, (left, top)), fill=255)
    image.paste(COLOURS[item.colour], (left, top), mask.reduce(_SMOOTH))
    if item.digit is not None:
        ink = _DARK_INK if item.colour in _LIGHT_COLOURS else _LIGHT_INK
        _, y0, _, y1 = digit_box(item)
        ImageDraw.Draw(image).text(
            (item.centre[0], (y0 + y1) / 2),
            str(item.digit),
            fill=ink,
            font=font(round((y1 - y0) * 1.15)),
            anchor="mm",
            stroke_width=1,
            stroke_fill=ink,
        )


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=16)
def _unit_polygon(shape: str) -> tuple[tuple[float, float], ...]:
    """The outline of a shape inside the unit circle, y downwards."""
    if shape == "square":
        return (-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)
    if shape == "triangle":
        return (0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)
    if shape == "cross":
        a, b = 0.98, 0.34
        upper = (-a, -b), (-b, -b), (-b, -a), (b, -a), (b, -b), (a, -b)
        return *upper, *((-x, -y) for x, y in upper)
    if shape == "star":
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return tuple((math.cos(t) * r, math.sin(t) * r) for t, r in zip(angles, [1.0, 0.46] * 5, strict=True))
    turns = [2 * math.pi * i / 48 for i in range(48)]
    if shape == "heart":
        return tuple(
            (
                0.95 * math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.08,
            )
            for t in turns
        )
    return tuple((math.cos(t) * 0.95, math.sin(t) * 0.95) for t in turns)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    coarse, fine = (max(2, round(size / rng.uniform(*span))) for span in ((40, 120), (8, 30)))
    return _smooth_noise(rng, size, coarse) + rng.uniform(0, 0.8) * _smooth_noise(rng, size, fine)


def _wave(rng: np.random.Generator, size: int, shortest: float, longest: float) -> np.ndarray:
    angle, length = rng.uniform(0, math.pi), rng.uniform(shortest, longest)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / length) + rng.uniform(0, 6.3))


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    wave = _wave(rng, size, 10, 70)
    hardness = rng.uniform(1, 8)
    return np.tanh(hardness * wave) + 0.5 * _smooth_noise(rng, size, max(2, size // 50))


def _weave(rng: np.random.Generator, size: int) -> np.ndarray:
    return 0.7 * (_wave(rng, size, 8, 60) + _wave(rng, size, 8, 60))


def _tiles(rng: np.random.Generator, size: int) -> np.ndarray:
    edge = int(rng.integers(28, 64))
    cells = rng.normal(0, 0.8, (size // edge + 2, size // edge + 2)).astype(np.float32)
    shift = rng.integers(0, edge, 2)
    return cells.repeat(edge, 0).repeat(edge, 1)[shift[0] : shift[0] + size, shift[1] : shift[1] + size]


def _rings(rng: np.random.Generator, size: int) -> np.ndarray:
    x0, y0 = rng.uniform(-0.3, 1.3, 2) * size
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return np.sin(np.hypot(x - x0, y - y0) * (2 * math.pi / rng.uniform(18, 60)))


def _folds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Broad shading with bent creases, like cloth."""
    bend = 2.5 * _smooth_noise(rng, size, 4)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    slope = rng.uniform(2, 6, 2)
    return np.abs(np.sin(slope[0] * x + slope[1] * y + bend)) * 2 - 1


FAMILIES: dict[Split, tuple[Callable[[np.random.Generator, int], np.ndarray], ...]] = {
    "train": (_clouds, _stripes, _weave),
    "eval": (_tiles, _rings, _folds),
}
