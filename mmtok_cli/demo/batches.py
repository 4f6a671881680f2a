"""Training batches: drawn scenes, packed questions, and what every patch shows."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmtok_cli.demo import questions as ask
from mmtok_cli.demo.architecture import GRID, PATCH_SIZE, vocabulary
from mmtok_cli.demo.drawing import digit_box, draw, outline
from mmtok_cli.demo.scenes import COLOURS, OBJECTS, PAIRS, RADII, SHAPES, Density, Scene, generator, sample_scene
from mmtok_cli.models import hf

BLOCK = 14  # tokens of the longest question, "assistant :", the answer and </s>
IGNORE = -100
ATTRIBUTES = (*COLOURS, *SHAPES)

_KIND_SHARES: dict[ask.Kind, float] = {"existence": 0.36, "count": 0.24, "digit": 0.16, "colour": 0.12, "shape": 0.12}
_TOKEN_IDS = {word: i for i, word in enumerate(vocabulary())}
_COLOUR_INDEX = {name: i + 1 for i, name in enumerate(COLOURS)}
_SHAPE_INDEX = {name: i + 1 for i, name in enumerate(SHAPES)}


@dataclass(frozen=True)
class Batch:
    """Tensors of one step. n patches, q questions of `BLOCK` tokens each; patch label 0 is background."""

    pixels: torch.Tensor  # [batch, 3, size, size]
    positions: torch.Tensor  # [batch, 1 + n] rows of the position embedding, class token first
    text: torch.Tensor  # [batch, q * BLOCK]
    answer_at: torch.Tensor  # [batch, q] index in `text` of the token before the answer
    kinds: torch.Tensor  # [batch, q] index in KINDS
    colours: torch.Tensor  # [batch, n]
    shapes: torch.Tensor  # [batch, n]
    digits: torch.Tensor  # [batch, n] the digit shown, else IGNORE
    centres: torch.Tensor  # [batch, n] 1 where the middle of an object is
    present: torch.Tensor  # [batch, attributes + pairs] what the picture contains


def tokenise(text: str) -> list[int]:
    """What the tokenizer does, without its overhead."""
    unknown = _TOKEN_IDS["<unk>"]
    return [_TOKEN_IDS.get(word, unknown) for word in re.findall(r"\w+|[^\w\s]", text.lower())]


def make_batch(first_seed: int, size: int, grid: int, densities: tuple[Density, ...], per_image: int) -> Batch:
    """`size` training scenes of `grid` x `grid` patches, from consecutive seeds, cycling through `densities`."""
    rows = []
    for i in range(size):
        scene = training_scene(first_seed + i, grid, densities[i % len(densities)])
        rows.append((_pixels(scene), _positions(scene, grid), *_text(scene, per_image), *_patch_labels(scene, grid)))
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def training_scene(seed: int, grid: int, density: Density) -> Scene:
    """Small pictures hold fewer objects of the same size in pixels: 1-2 on 8 x 8 patches, 2-4 on 12 x 12."""
    objects = {8: (1, 2), 12: (2, 4), GRID: OBJECTS[density]}[grid]
    smallest, largest = RADII[density]
    return sample_scene(seed, "train", grid * PATCH_SIZE, objects, (smallest, min(largest, grid * 4)))


def _pixels(scene: Scene) -> np.ndarray:
    pixels = np.asarray(draw(scene), dtype=np.float32) / 255
    mean, deviation = hf.pixel_statistics("OPENAI_CLIP")
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _positions(scene: Scene, grid: int) -> np.ndarray:
    """A random window of the position grid, so that small pictures train all of it."""
    top, left = generator("train", scene.seed, purpose=3).integers(0, GRID - grid + 1, size=2)
    window = (top + np.arange(grid))[:, None] * GRID + left + np.arange(grid)
    return np.concatenate([[0], 1 + window.ravel()])


def _text(scene: Scene, per_image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = generator("train", scene.seed, purpose=4)
    text = np.full((per_image, BLOCK), _TOKEN_IDS["<pad>"], dtype=np.int64)
    answer_at = np.empty(per_image, dtype=np.int64)
    kinds = np.empty(per_image, dtype=np.int64)
    for i in range(per_image):
        kind, prompt, answer = training_question(scene, rng)
        tokens = [*_blur(tokenise(prompt), rng), _TOKEN_IDS["assistant"], _TOKEN_IDS[":"]]
        answer_at[i] = i * BLOCK + len(tokens) - 1
        tokens += [_TOKEN_IDS[answer], _TOKEN_IDS["</s>"]]
        text[i, : len(tokens)] = tokens
        kinds[i] = ask.KINDS.index(kind)
    return text.ravel(), answer_at, kinds


def training_question(scene: Scene, rng: np.random.Generator) -> tuple[ask.Kind, str, str]:
    """Kind, text and answer of a random question that can be asked about this scene."""
    kinds = list(_KIND_SHARES)
    kind = kinds[int(rng.choice(len(kinds), p=list(_KIND_SHARES.values())))]
    if kind == "colour" and ask.unique(scene, "shape"):
        values, answer, _ = ask.ask_colour(scene, rng)
    elif kind == "shape" and ask.unique(scene, "colour"):
        values, answer, _ = ask.ask_shape(scene, rng)
    elif kind == "digit" and any(item.digit is not None for item in scene.objects):
        values, answer, _ = ask.ask_digit(scene, rng)
    elif kind == "count":
        values, answer, _ = ask.ask_count(scene, rng)
    else:
        kind = "existence"
        values, answer = _existence(scene, rng)
    phrases = ask.PHRASES[kind]
    phrase = phrases[0] if rng.random() < 0.5 else phrases[int(rng.integers(len(phrases)))]
    return kind, phrase.format(**values), answer


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[dict[str, str], str]:
    """Mostly about a colour and a shape together, sometimes about one of them alone."""
    wanted = rng.random() < 0.5
    if rng.random() < 0.2:
        by_shape = rng.random() < 0.5
        there = {item.shape if by_shape else item.colour for item in scene.objects}
        pool = [name for name in (SHAPES if by_shape else COLOURS) if (name in there) == wanted]
        if pool:
            name = pool[int(rng.integers(len(pool)))]
            return {"thing": ask.with_article(name if by_shape else f"{name} object")}, "yes" if wanted else "no"
    if wanted:
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        return {"thing": ask.with_article(f"{item.colour} {item.shape}")}, "yes"
    kinds = [kind for kind in ask.NEGATIVES if kind != "adversarial" or scene.absent_look_alikes]
    values, answer, _ = ask.absent(scene, kinds[int(rng.integers(len(kinds)))], rng)
    return values, answer


def _blur(tokens: list[int], rng: np.random.Generator) -> list[int]:
    """Sometimes no question mark, rarely an unknown word in front: people type such things."""
    if rng.random() < 0.1:
        tokens = tokens[:-1]
    if rng.random() < 0.05 and len(tokens) < BLOCK - 4:
        tokens = [_TOKEN_IDS["<unk>"], *tokens]
    return tokens


def _patch_labels(scene: Scene, grid: int) -> tuple[np.ndarray, ...]:
    """Colour, shape, digit and centre labels `[n]`, and what is present. A patch barely touched is ignored."""
    owners = Image.new("L", (scene.size, scene.size))
    canvas = ImageDraw.Draw(owners)
    for i, item in enumerate(scene.objects):
        canvas.polygon(outline(item), fill=i + 1)
    cells = np.asarray(owners).reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).swapaxes(1, 2).reshape(grid * grid, -1)
    slots = len(scene.objects) + 1
    counts = np.bincount((np.arange(grid * grid)[:, None] * slots + cells).ravel(), minlength=grid * grid * slots)
    share = counts.reshape(grid * grid, slots)[:, 1:] / PATCH_SIZE**2
    owner, largest = share.argmax(1), share.max(1)
    known, touched = largest >= 0.3, largest > 0.02

    def spread(values: list[int]) -> np.ndarray:
        return np.where(known, np.array(values)[owner], np.where(touched, IGNORE, 0))

    digits = np.full((grid, grid), IGNORE)
    centres = np.zeros(grid * grid, dtype=np.float32)
    present = np.zeros(len(ATTRIBUTES) + len(PAIRS), dtype=np.float32)
    for item in scene.objects:
        x, y = (value // PATCH_SIZE for value in item.centre)
        centres[y * grid + x] = 1
        present[[ATTRIBUTES.index(item.colour), ATTRIBUTES.index(item.shape)]] = 1
        present[len(ATTRIBUTES) + PAIRS.index(item.pair)] = 1
        if item.digit is not None:
            left, top, right, bottom = (round(value / PATCH_SIZE) for value in digit_box(item))
            digits[top : max(bottom, top + 1), left : max(right, left + 1)] = item.digit
    colours = spread([_COLOUR_INDEX[item.colour] for item in scene.objects])
    shapes = spread([_SHAPE_INDEX[item.shape] for item in scene.objects])
    return colours, shapes, digits.ravel(), centres, present
