"""Training batches: drawn scenes, packed questions, and what every patch shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image

from mmtok_cli.demo import questions as ask
from mmtok_cli.demo.architecture import GRID, PATCH_SIZE, vocabulary
from mmtok_cli.demo.dense import DensePicture, Layout, Page, make_dense
from mmtok_cli.demo.dense_drawing import Box, draw_dense, number_box, word_box
from mmtok_cli.demo.dense_questions import DENSE_KINDS, DENSE_PHRASES, KINDS_OF, DenseKind, ask_dense
from mmtok_cli.demo.drawing import draw
from mmtok_cli.demo.labels import Labels, dense_labels, scene_labels
from mmtok_cli.demo.scenes import COLOURS, OBJECTS, RADII, SHAPES, Density, Scene, generator, sample_scene
from mmtok_cli.models import hf

BLOCK = 14  # tokens of the longest question, "assistant :", the answer and </s>
ALL_KINDS: tuple[str, ...] = (*ask.KINDS, *DENSE_KINDS)

_KIND_SHARES: dict[ask.Kind, float] = {"existence": 0.36, "count": 0.24, "digit": 0.16, "colour": 0.12, "shape": 0.12}
_TOKEN_IDS = {word: i for i, word in enumerate(vocabulary())}


@dataclass(frozen=True)
class Batch:
    """Tensors of one step. n patches, q questions of `BLOCK` tokens each; patch label 0 is background."""

    pixels: torch.Tensor  # [batch, 3, size, size]
    positions: torch.Tensor  # [batch, 1 + n] rows of the position embedding, class token first
    text: torch.Tensor  # [batch, q * BLOCK]
    answer_at: torch.Tensor  # [batch, q] index in `text` of the token before the answer
    kinds: torch.Tensor  # [batch, q] index in ALL_KINDS
    colours: torch.Tensor  # [batch, n]
    shapes: torch.Tensor  # [batch, n]
    digits: torch.Tensor  # [batch, n] the digit shown, or the value of the bar that ends there; else IGNORE
    words: torch.Tensor  # [batch, n] the word shown, or the one that the number shown is beside
    rows: torch.Tensor  # [batch, n] of a page's entry, else IGNORE
    sides: torch.Tensor  # [batch, n] of a page's entry, else IGNORE
    groups: torch.Tensor  # [batch, n] below GROUPS, 0 background; GROUPS where the patch is barely touched
    centres: torch.Tensor  # [batch, n] 1 where the middle of an object is
    present: torch.Tensor  # [batch, attributes + pairs + words] what the picture contains


def tokenise(text: str) -> list[int]:
    """What the tokenizer does, without its overhead."""
    unknown = _TOKEN_IDS["<unk>"]
    return [_TOKEN_IDS.get(word, unknown) for word in re.findall(r"\w+|[^\w\s]", text.lower())]


def make_batch(
    first_seed: int, size: int, grid: int, pictures: tuple[Density | Layout, ...], per_image: int, rows: int = 0
) -> Batch:
    """`size` training pictures of `grid` x `grid` patches, from consecutive seeds, cycling through `pictures`.

    With `rows`, pages are cut to so many rows of patches.
    """
    columns = []
    for i in range(size):
        shape = (rows or grid, grid)
        image, window, labels, text = _picture(first_seed + i, shape, pictures[i % len(pictures)], per_image)
        named = (getattr(labels, field.name) for field in fields(labels))
        columns.append((_pixels(image), np.concatenate([[0], 1 + window]), *text, *named))
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)))


Text = tuple[np.ndarray, np.ndarray, np.ndarray]  # `text`, `answer_at` and `kinds` of one picture, as in `Batch`


def _picture(
    seed: int, shape: tuple[int, int], kind: Density | Layout, per_image: int
) -> tuple[Image.Image, np.ndarray, Labels, Text]:
    """The picture of this seed, where its patches are on the whole grid, what they show, and `per_image` questions."""
    rng = generator("train", seed, purpose=4)
    grid = shape[1]
    if kind == "sparse" or kind == "dense":
        scene = training_scene(seed, grid, kind)
        questions = (training_question(scene, rng) for _ in range(per_image))
        return draw(scene), _window(seed, grid), scene_labels(scene, grid), _text(questions, per_image, rng)
    picture = make_dense(kind, seed, "train")
    image, labels, window = draw_dense(picture), dense_labels(picture), _window(seed, grid)
    if isinstance(picture, Page) and shape != (GRID, GRID):
        picture, image, labels, window = _part_of_page(picture, image, labels, shape, rng)
    dense_questions = (dense_question(picture, rng) for _ in range(per_image))
    return image, window, labels, _text(dense_questions, per_image, rng)


def _part_of_page(
    page: Page, image: Image.Image, labels: Labels, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[Page, Image.Image, Labels, np.ndarray]:
    """Some rows of a page's left or right part, or of its whole width, at their place in the grid; with the entries
    that are wholly in it."""
    top, left = int(rng.integers(0, GRID - shape[0] + 1)), int(rng.integers(2)) * (GRID - shape[1])
    window = _cells(top, left, shape)
    x, y, right, bottom = (PATCH_SIZE * edge for edge in (left, top, left + shape[1], top + shape[0]))

    def inside(box: Box) -> bool:
        return x <= box[0] and box[2] <= right and y <= box[1] and box[3] <= bottom

    entries = tuple(e for e in page.entries if inside(word_box(page, e)) and inside(number_box(page, e)))
    return replace(page, entries=entries), image.crop((x, y, right, bottom)), labels.part(window), window


def training_scene(seed: int, grid: int, density: Density) -> Scene:
    """Small pictures hold fewer objects of the same size in pixels: 1-2 on 8 x 8 patches, 2-4 on 12 x 12."""
    objects = {8: (1, 2), 12: (2, 4), GRID: OBJECTS[density]}[grid]
    smallest, largest = RADII[density]
    return sample_scene(seed, "train", grid * PATCH_SIZE, objects, (smallest, min(largest, grid * 4)))


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, dtype=np.float32) / 255
    mean, deviation = hf.pixel_statistics("OPENAI_CLIP")
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _window(seed: int, grid: int) -> np.ndarray:
    """A random window of the position grid, so that small pictures train all of it."""
    top, left = generator("train", seed, purpose=3).integers(0, GRID - grid + 1, size=2)
    return _cells(int(top), int(left), (grid, grid))


def _cells(top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    return ((top + np.arange(shape[0]))[:, None] * GRID + left + np.arange(shape[1])).ravel()


def _text(questions: Iterator[tuple[str, str, str]], count: int, rng: np.random.Generator) -> Text:
    """`count` questions (kind, text, answer), which may draw from `rng` as well, in blocks of tokens."""
    text = np.full((count, BLOCK), _TOKEN_IDS["<pad>"], dtype=np.int64)
    answer_at = np.empty(count, dtype=np.int64)
    kinds = np.empty(count, dtype=np.int64)
    for i, (kind, prompt, answer) in enumerate(questions):
        tokens = [*_blur(tokenise(prompt), rng), _TOKEN_IDS["assistant"], _TOKEN_IDS[":"]]
        answer_at[i] = i * BLOCK + len(tokens) - 1
        tokens += [_TOKEN_IDS[answer], _TOKEN_IDS["</s>"]]
        text[i, : len(tokens)] = tokens
        kinds[i] = ALL_KINDS.index(kind)
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
    return kind, _phrase(ask.PHRASES[kind], rng).format(**values), answer


def dense_question(picture: DensePicture, rng: np.random.Generator) -> tuple[DenseKind, str, str]:
    """Kind, text and answer of a random question about a dense picture."""
    kind = KINDS_OF[picture.layout][int(rng.integers(2))]
    values, answer = ask_dense(picture, kind, rng)
    return kind, _phrase(DENSE_PHRASES[kind], rng).format(**values), answer


def _phrase(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrases[0] if rng.random() < 0.5 else phrases[int(rng.integers(len(phrases)))]


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
