"""Scenes of coloured shapes: what is in them. `drawing.py` turns them into pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "eval"]
Density = Literal["sparse", "dense"]

IMAGE_SIZE = 336
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 210),
    "green": (44, 160, 60),
    "yellow": (248, 220, 40),
    "orange": (244, 134, 28),
    "purple": (138, 52, 180),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}
SHAPES: dict[str, str] = {  # singular -> plural
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "heart": "hearts",
}
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# Some colours and shapes are drawn more often than others, so that "popular" absences mean something.
COLOUR_WEIGHTS = np.array([1.6, 1.5, 1.3, 1.0, 0.9, 0.8, 0.8, 0.8])
SHAPE_WEIGHTS = np.array([1.5, 1.3, 1.1, 0.9, 0.8, 0.8])
PAIR_WEIGHTS = np.outer(COLOUR_WEIGHTS, SHAPE_WEIGHTS).ravel() / np.outer(COLOUR_WEIGHTS, SHAPE_WEIGHTS).sum()
POPULAR_PAIRS = tuple(PAIRS[i] for i in np.argsort(-PAIR_WEIGHTS, kind="stable")[:12])

OBJECTS: dict[Density, tuple[int, int]] = {"sparse": (2, 6), "dense": (6, 10)}
RADII: dict[Density, tuple[int, int]] = {"sparse": (17, 42), "dense": (17, 34)}
DIGIT_RADIUS = 24  # objects at least this large may carry a digit
DIGIT_SHARE = 0.75

_SPLIT_KEYS: dict[Split, int] = {"train": 1, "eval": 2}


@dataclass(frozen=True)
class SceneObject:
    """One shape. `centre` is (x, y) and `radius` the half-size, both in pixels; `tilt` is in degrees."""

    shape: str
    colour: str
    digit: int | None
    centre: tuple[int, int]
    radius: int
    tilt: int = 0

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `split` decides the family of its background, `seed` everything else."""

    seed: int
    split: Split
    size: int
    objects: tuple[SceneObject, ...]

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset(item.pair for item in self.objects)

    @property
    def absent_look_alikes(self) -> tuple[tuple[str, str], ...]:
        """Absent pairs whose colour and whose shape are both in the scene, on different objects."""
        colours = {item.colour for item in self.objects}
        shapes = {item.shape for item in self.objects}
        return tuple(pair for pair in PAIRS if pair[0] in colours and pair[1] in shapes and pair not in self.pairs)


def generator(split: Split, seed: int, purpose: int = 0) -> np.random.Generator:
    """Random numbers that no other split, seed or purpose shares."""
    return np.random.default_rng((_SPLIT_KEYS[split], seed, purpose))


def make_scene(seed: int, split: Split = "eval", density: Density = "sparse") -> Scene:
    """The 336 px scene of this seed: 2-6 objects when sparse, 6-10 when dense."""
    return sample_scene(seed, split, IMAGE_SIZE, OBJECTS[density], RADII[density])


def sample_scene(seed: int, split: Split, size: int, objects: tuple[int, int], radii: tuple[int, int]) -> Scene:
    """A random scene; asks for `objects` (low, high) and draws fewer only where no room is left."""
    rng = generator(split, seed)
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    while True:
        pairs = _sample_pairs(rng, wanted)
        places = _sample_places(rng, len(pairs), size, radii)
        items = tuple(
            SceneObject(shape, colour, _sample_digit(rng, radius), (x, y), radius, int(rng.integers(-12, 13)))
            for (colour, shape), (x, y, radius) in zip(pairs, places, strict=False)
        )
        scene = Scene(seed, split, size, items)
        if len(items) == 1 or (len(items) >= objects[0] and scene.absent_look_alikes):
            return scene


def _sample_pairs(rng: np.random.Generator, wanted: int) -> list[tuple[str, str]]:
    """Distinct (colour, shape) pairs; a shape or a colour is often repeated, to make counting worthwhile."""
    weights = PAIR_WEIGHTS.reshape(len(COLOURS), len(SHAPES)).copy()
    theme = rng.random()
    if theme < 0.35:
        weights[:, rng.integers(len(SHAPES))] *= 6
    elif theme < 0.7:
        weights[rng.integers(len(COLOURS))] *= 6
    flat = weights.ravel() / weights.sum()
    return [PAIRS[i] for i in rng.choice(len(PAIRS), size=wanted, replace=False, p=flat)]


def _sample_places(
    rng: np.random.Generator, wanted: int, size: int, radii: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """Up to `wanted` circles (x, y, radius) that neither overlap nor leave the picture."""
    places: list[tuple[int, int, int]] = []
    for _ in range(40 * wanted):
        radius = int(rng.integers(radii[0], radii[1] + 1))
        x, y = (int(v) for v in rng.integers(radius + 2, size - radius - 1, size=2))
        if all(math.hypot(x - a, y - b) > radius + r + 3 for a, b, r in places):
            places.append((x, y, radius))
            if len(places) == wanted:
                break
    return places


def _sample_digit(rng: np.random.Generator, radius: int) -> int | None:
    digit, has_digit = int(rng.integers(10)), rng.random() < DIGIT_SHARE
    return digit if has_digit and radius >= DIGIT_RADIUS else None
