"""Questions about scenes, with exact answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from mmtok_cli.demo.scenes import (
    COLOURS,
    PAIRS,
    POPULAR_PAIRS,
    SHAPES,
    Density,
    Scene,
    SceneObject,
    generator,
    make_scene,
)

Kind = Literal["existence", "colour", "shape", "count", "digit"]
Item = TypeVar("Item")
KINDS: tuple[Kind, ...] = ("existence", "colour", "shape", "count", "digit")
NEGATIVES = ("random", "popular", "adversarial")

LARGEST_COUNT = 3

# The first phrase of each kind is the one that evaluation uses; training uses all of them.
PHRASES: dict[Kind, tuple[str, ...]] = {
    "existence": (
        "Is there {thing} in the image?",
        "Is there {thing}?",
        "Does the image contain {thing}?",
        "Can you see {thing} in the picture?",
        "Do you see {thing}?",
    ),
    "colour": (
        "What color is the {shape}?",
        "What colour is the {shape}?",
        "What is the color of the {shape}?",
        "Which color does the {shape} have?",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "What is the shape of the {colour} object?",
        "What shape does the {colour} object have?",
    ),
    "count": (
        "How many {things} are there?",
        "How many {things} are in the image?",
        "How many {things} do you see?",
        "Count the {things}.",
    ),
    "digit": (
        "What digit is on the {colour} {shape}?",
        "What number is on the {colour} {shape}?",
        "Which digit is written on the {colour} {shape}?",
        "Which number does the {colour} {shape} have?",
    ),
}
CHOICES: dict[Kind, tuple[str, ...]] = {
    "existence": ("yes", "no"),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "count": tuple(str(n) for n in range(10)),
    "digit": tuple(str(n) for n in range(10)),
}

# One scene of the held-out set is asked all of these; "yes" and "no" alternate in the questions about existence.
_SLOTS: tuple[Kind, ...] = ("existence", "colour", "existence", "shape", "existence", "count", "existence", "digit")


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer. `variant` tells apart easy and hard questions of a kind."""

    scene: Scene
    kind: Kind
    text: str
    answer: str
    choices: tuple[str, ...]
    variant: str = ""
    density: Density = "sparse"


def held_out(count: int = 1200, seed: int = 0) -> list[Question]:
    """The first `count` questions of an endless list, 8 on each scene; of the scenes every other one is dense.

    The list is read from blocks of 8 scenes, a different slot of each scene at every pass. So any
    8 consecutive questions show 8 scenes, hold every kind, and have as many "yes" as "no" answers.
    """
    return list(itertools.islice(_endless(seed), count))


def held_out_conversations(count: int, seed: int = 0) -> list[list[Question]]:
    """The questions about each of `count` held-out scenes: a colour, a shape and a digit, of three different objects.

    Every other scene is dense. The kinds take turns in being the first, so that each turn has as many of each.
    """
    conversations = []
    for index in range(count):
        density: Density = "dense" if index % 2 else "sparse"
        for attempt in itertools.count():
            scene = make_scene((seed * 1_000_003 + index) * 1000 + attempt, "eval", density)
            if triples := _different_objects(scene):
                break
        by_shape, by_colour, with_digit = _choose(triples, generator("eval", scene.seed, purpose=3))
        asked: list[tuple[Kind, Asked]] = [
            ("colour", ({"shape": by_shape.shape}, by_shape.colour, "")),
            ("shape", ({"colour": by_colour.colour}, by_colour.shape, "")),
            ("digit", ({"colour": with_digit.colour, "shape": with_digit.shape}, str(with_digit.digit), "")),
        ]
        first = index % len(asked)
        conversations.append(
            [
                Question(scene, kind, PHRASES[kind][0].format(**values), answer, CHOICES[kind], variant, density)
                for kind, (values, answer, variant) in asked[first:] + asked[:first]
            ]
        )
    return conversations


def _different_objects(scene: Scene) -> list[tuple[SceneObject, SceneObject, SceneObject]]:
    """Three different objects: one that its shape alone identifies, one that its colour does, and one with a digit."""
    digits = [item for item in scene.objects if item.digit is not None]
    triples = itertools.product(unique(scene, "shape"), unique(scene, "colour"), digits)
    return [triple for triple in triples if len({item.pair for item in triple}) == len(triple)]


def _endless(seed: int) -> Iterator[Question]:
    for block in itertools.count():
        scenes = [_askable_scene(seed, block * len(_SLOTS) + i) for i in range(len(_SLOTS))]
        asked = [_held_out_questions(scene, density) for scene, density in scenes]
        for turn in range(len(_SLOTS)):
            for i, questions in enumerate(asked):
                yield questions[(i + turn) % len(_SLOTS)]


def _askable_scene(seed: int, index: int) -> tuple[Scene, Density]:
    """The index-th held-out scene, the first of its candidates about which every kind can be asked."""
    density: Density = "dense" if index % 2 else "sparse"
    for attempt in itertools.count():
        scene = make_scene((seed * 1_000_003 + index) * 1000 + attempt, "eval", density)
        if unique(scene, "shape") and unique(scene, "colour") and any(o.digit is not None for o in scene.objects):
            return scene, density
    raise AssertionError("unreachable")


def _held_out_questions(scene: Scene, density: Density) -> list[Question]:
    rng = generator("eval", scene.seed, purpose=2)
    first = int(rng.integers(len(NEGATIVES)))
    negatives = itertools.cycle(NEGATIVES[first:] + NEGATIVES[:first])
    present = itertools.cycle(rng.permutation(len(scene.objects)).tolist())
    exists = itertools.cycle((True, False))
    questions = []
    for kind in _SLOTS:
        if kind != "existence":
            values, answer, variant = _ASK[kind](scene, rng)
        elif next(exists):
            values, answer, variant = _present(scene.objects[next(present)])
        else:
            values, answer, variant = absent(scene, next(negatives), rng)
        text = PHRASES[kind][0].format(**values)
        questions.append(Question(scene, kind, text, answer, CHOICES[kind], variant, density))
    return questions


def unique(scene: Scene, attribute: Literal["shape", "colour"]) -> list[SceneObject]:
    """The objects that are the only one of their shape or colour."""
    counts = Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, attribute)] == 1]


# Each function below returns the words of a question, its answer and its variant.
Asked = tuple[dict[str, str], str, str]


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _present(item: SceneObject) -> Asked:
    return {"thing": with_article(f"{item.colour} {item.shape}")}, "yes", "present"


def absent(scene: Scene, negative: str, rng: np.random.Generator) -> Asked:
    """An absent object: any, one of the popular pairs, or one whose colour and shape are both there."""
    pools = {"random": PAIRS, "popular": POPULAR_PAIRS, "adversarial": scene.absent_look_alikes}
    pool = [pair for pair in pools[negative] if pair not in scene.pairs]
    colour, shape = pool[int(rng.integers(len(pool)))]
    return {"thing": with_article(f"{colour} {shape}")}, "no", negative


def ask_colour(scene: Scene, rng: np.random.Generator) -> Asked:
    item = _choose(unique(scene, "shape"), rng)
    return {"shape": item.shape}, item.colour, ""


def ask_shape(scene: Scene, rng: np.random.Generator) -> Asked:
    item = _choose(unique(scene, "colour"), rng)
    return {"colour": item.colour}, item.shape, ""


def ask_count(scene: Scene, rng: np.random.Generator) -> Asked:
    """A count of a shape or of a colour. Each count that the scene offers is equally likely, zero included.

    Held-out scenes are asked for counts up to `LARGEST_COUNT`: beyond it the model guesses.
    """
    by_shape = rng.random() < 0.67
    found = Counter(item.shape if by_shape else item.colour for item in scene.objects)
    names = SHAPES if by_shape else COLOURS
    largest = LARGEST_COUNT if scene.split == "eval" else len(scene.objects)
    count = _choose(sorted({found[name] for name in names if found[name] <= largest}), rng)
    name = _choose([name for name in names if found[name] == count], rng)
    things = SHAPES[name] if by_shape else f"{name} objects"
    return {"things": things}, str(count), "shape" if by_shape else "colour"


def ask_digit(scene: Scene, rng: np.random.Generator) -> Asked:
    item = _choose([item for item in scene.objects if item.digit is not None], rng)
    return {"colour": item.colour, "shape": item.shape}, str(item.digit), ""


def _choose(items: Sequence[Item], rng: np.random.Generator) -> Item:
    return items[int(rng.integers(len(items)))]


_ASK: dict[Kind, Callable[[Scene, np.random.Generator], Asked]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "digit": ask_digit,
}
