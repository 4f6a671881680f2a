"""What the model is trained for: answers, patches that mean words, and a class token that knows the scene."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mmtok_cli.demo.architecture import GRID, WIDTH, vocabulary
from mmtok_cli.demo.batches import Batch
from mmtok_cli.demo.dense import ROWS, SIDES, WORDS
from mmtok_cli.demo.labels import ATTRIBUTES, IGNORE
from mmtok_cli.demo.scenes import COLOURS, PAIRS, SHAPES

_OBJECT_WORDS = ("object", "objects", "shape")
_DIGIT_WORDS = ("digit", "number")
_SCENE_WORDS = ("image", "picture", "background")


class Heads(nn.Module):
    """Parameters that only the training losses use; they are not part of the model that is saved."""

    def __init__(self) -> None:
        super().__init__()
        outputs = len(ATTRIBUTES) + len(PAIRS) + len(WORDS)
        self.scene_from_features = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs))
        self.scene_from_pooled = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs))
        self.locate = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))  # centre of an object, x, y
        self.softmax_scale = nn.Parameter(torch.tensor(2.3))
        self.sigmoid_scale = nn.Parameter(torch.tensor(2.0))
        self.sigmoid_bias = nn.Parameter(torch.tensor(-3.0))


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the answer, and lightly of the end after it. `logits` is [batch, q, 2, vocabulary]."""
    answers = batch.text.gather(1, batch.answer_at + 1)
    ends = batch.text.gather(1, batch.answer_at + 2)
    return _cross_entropy(logits[:, :, 0], answers) + 0.1 * _cross_entropy(logits[:, :, 1], ends)


def alignment_losses(
    projected: torch.Tensor, words: torch.Tensor, heads: Heads, batch: Batch
) -> dict[str, torch.Tensor]:
    """Pulls the projected token of a patch towards the input embeddings of the words for what it shows.

    `projected` is [batch, n, dim], `words` the language model's embedding matrix [vocabulary, dim].
    This is also what makes the similarity of text and vision tokens mean something.
    """
    names = vocabulary()
    cosines = F.normalize(projected.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
    scaled = cosines * heads.softmax_scale.float().exp()

    def classes(*wanted: str) -> torch.Tensor:
        return scaled[..., [names.index(word) for word in wanted]]

    colour = _balanced(classes("background", *COLOURS), batch.colours)
    shape = _balanced(classes("background", *SHAPES), batch.shapes)
    digit = _cross_entropy(classes(*map(str, range(10))), batch.digits)
    pairs = cosines * heads.sigmoid_scale.float().exp() + heads.sigmoid_bias.float()
    found = {"colour": colour, "shape": shape, "digit": digit, "words": _word_loss(pairs, names, batch)}
    if (batch.rows != IGNORE).any():
        found["page"] = _balanced(classes("background", *WORDS), batch.words)
        found["place"] = _cross_entropy(classes(*ROWS), batch.rows) + _cross_entropy(classes(*SIDES), batch.sides)
    return found


def _word_loss(logits: torch.Tensor, names: tuple[str, ...], batch: Batch) -> torch.Tensor:
    """For each word and patch: does the word apply? `logits` is [batch, n, vocabulary]."""
    is_object, has_digit = batch.colours > 0, batch.digits >= 0
    applies: dict[str, torch.Tensor] = {}
    for i, colour in enumerate(COLOURS):
        applies[colour] = batch.colours == i + 1
    for i, (singular, plural) in enumerate(SHAPES.items()):
        applies[singular] = applies[plural] = batch.shapes == i + 1
    for digit in range(10):
        applies[str(digit)] = batch.digits == digit
    for i, word in enumerate(WORDS):
        applies[word] = batch.words == i + 1
    applies |= dict.fromkeys(_OBJECT_WORDS, is_object)
    applies |= dict.fromkeys(_DIGIT_WORDS, has_digit)
    applies |= dict.fromkeys(_SCENE_WORDS, batch.colours == 0)
    targets = torch.stack(list(applies.values()), dim=-1).float()
    losses = F.binary_cross_entropy_with_logits(
        logits[..., [names.index(word) for word in applies]], targets, reduction="none"
    )
    sure = ((batch.colours != IGNORE) | (batch.words > 0)).unsqueeze(-1).float()
    positive, negative = targets * sure, (1 - targets) * sure
    return (losses * positive).sum() / positive.sum() + (losses * negative).sum() / negative.sum()


def scene_loss(features: torch.Tensor, last: torch.Tensor, heads: Heads, batch: Batch) -> torch.Tensor:
    """The class token lists what is in the scene, at the last layer and at the one whose features are used.

    The second is what gives its attention a meaning. Both inputs are [batch, 1 + n, dim].
    """
    early = heads.scene_from_features(features[:, 0]).float()
    late = heads.scene_from_pooled(last[:, 0]).float()
    targets = batch.present
    return F.binary_cross_entropy_with_logits(early, targets) + F.binary_cross_entropy_with_logits(late, targets)


def location_loss(features: torch.Tensor, heads: Heads, batch: Batch) -> torch.Tensor:
    """Each patch knows whether it is the middle of an object, and where it is. `features` is [batch, n, dim]."""
    found = heads.locate(features).float()
    centre = F.binary_cross_entropy_with_logits(found[..., 0], batch.centres, pos_weight=torch.tensor(10.0))
    cells = batch.positions[:, 1:] - 1
    where = torch.stack([cells % GRID, cells // GRID], dim=-1) / (GRID / 2) - 1
    return centre + 0.2 * F.mse_loss(found[..., 1:], where)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def _balanced(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which objects weigh as much as the background, though they cover far fewer patches."""
    objects = labels.masked_fill(labels == 0, IGNORE)
    rest = labels.masked_fill(labels > 0, IGNORE)
    return 0.5 * _cross_entropy(logits, objects) + 0.5 * _cross_entropy(logits, rest)
