"""Training the demo on dense pictures: what its patches are said to show, and continuing from saved weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmtok_cli.demo.dense import LAYOUTS, WORDS, Chart, Dots, Page, make_dense
from mmtok_cli.demo.dense_drawing import number_box, word_box
from mmtok_cli.demo.dense_questions import dense_held_out
from mmtok_cli.demo.scenes import COLOURS


def test_vocabulary_covers_dense_questions_and_keeps_the_ids_of_scenes() -> None:
    from mmtok_cli.demo.architecture import build_tokenizer, vocabulary

    tokenizer = build_tokenizer()
    for question in dense_held_out(120):
        assert tokenizer.unk_token_id not in tokenizer(question.text)["input_ids"]
        assert len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) == 1
    assert vocabulary()[70:74] == ("written", "yellow", "yes", "you") and len(set(vocabulary())) == len(vocabulary())


def test_every_training_question_fits_its_block() -> None:
    from mmtok_cli.demo.batches import BLOCK, make_batch

    for grid, pictures in ((24, LAYOUTS), (12, ("page",))):
        batch = make_batch(3, 6, grid, pictures, 20)
        ends = batch.text.gather(1, batch.answer_at + 2)
        assert (ends == 2).all() and (batch.answer_at % BLOCK <= BLOCK - 3).all()


def test_labels_name_what_the_patch_shows() -> None:
    from mmtok_cli.demo.batches import make_batch
    from mmtok_cli.demo.labels import GROUPS, IGNORE

    batch = make_batch(7, 3, 24, LAYOUTS, 1)
    page, chart, dots = (make_dense(layout, 7 + i, "train") for i, layout in enumerate(LAYOUTS))
    assert isinstance(page, Page) and isinstance(chart, Chart) and isinstance(dots, Dots)
    for entry in page.entries:
        for box in (word_box(page, entry), number_box(page, entry)):
            patch = int((box[1] + box[3]) / 2) // 14 * 24 + int((box[0] + box[2]) / 2) // 14
            assert batch.words[0, patch] == WORDS.index(entry.word) + 1 and batch.colours[0, patch] == IGNORE
            assert (batch.rows[0, patch], batch.sides[0, patch]) == (entry.row, entry.side)
        assert batch.digits[0, patch] == entry.number
    for bar in chart.bars:
        left, top, right, bottom = bar.box
        column = (left + right) // 2 // 14
        shown = batch.colours[1].reshape(24, 24)[top // 14 + 1 : bottom // 14, column]
        assert (shown == list(COLOURS).index(bar.colour) + 1).all()
        values = batch.digits[1].reshape(24, 24)[:, column]
        assert set(values[values >= 0].tolist()) == {bar.value} and (values >= 0).sum() == 1
    for dot in dots.dots:
        patch = dot.centre[1] // 14 * 24 + dot.centre[0] // 14
        assert batch.colours[2, patch] in (list(COLOURS).index(dot.colour) + 1, IGNORE) and batch.centres[2, patch] == 1
    assert batch.groups.min() >= 0 and batch.groups.max() == GROUPS
    assert (batch.rows[1:] == IGNORE).all() and (batch.words[1:] <= 0).all()


@pytest.mark.parametrize(("columns", "rows", "lefts"), [(12, 0, {0, 12}), (24, 10, {0})])
def test_parts_of_pages_are_at_their_place(columns: int, rows: int, lefts: set[int]) -> None:
    """A part of a page shows what the page shows there, with the labels of those patches; what is asked is in it."""
    from mmtok_cli.demo.architecture import vocabulary
    from mmtok_cli.demo.batches import ALL_KINDS, make_batch
    from mmtok_cli.demo.labels import ATTRIBUTES
    from mmtok_cli.demo.scenes import PAIRS

    parts, whole = make_batch(3, 6, columns, ("page",), 4, rows), make_batch(3, 6, 24, ("page",), 1)
    height, width = parts.pixels.shape[2:]
    assert (height, width) == (14 * (rows or columns), 14 * columns)
    found = set()
    for i in range(6):
        window = parts.positions[i, 1:] - 1
        top, left = int(window[0]) // 24, int(window[0]) % 24
        grid = np.arange(576).reshape(24, 24)
        assert (window.numpy() == grid[top : top + height // 14, left : left + columns].ravel()).all()
        shown = whole.pixels[i, :, 14 * top : 14 * top + height, 14 * left : 14 * left + width]
        assert (parts.pixels[i] == shown).all()
        for name in ("words", "digits", "rows", "sides", "groups", "colours"):
            assert (getattr(parts, name)[i] == getattr(whole, name)[i, window]).all()
        words = {WORDS[word - 1] for word in parts.words[i].tolist() if word > 0}
        present = parts.present[i, len(ATTRIBUTES) + len(PAIRS) :].bool().tolist()
        assert words == {word for word, there in zip(WORDS, present, strict=True) if there}
        cells = parts.kinds[i] == ALL_KINDS.index("cell")
        answers = {vocabulary()[token] for token in parts.text[i, parts.answer_at[i, cells] + 1].tolist()}
        assert answers <= words
        found.add(left)
    assert found == lefts


def test_training_continues_from_a_model_with_fewer_words(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from mmtok_cli.demo.architecture import build_model
    from mmtok_cli.demo.train import Trainee, save

    torch.manual_seed(0)
    saved = build_model()
    save(saved, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name][:74].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path / "config.json", lambda config: config["text_config"].update(vocab_size=74))
    change(tmp_path / "tokenizer.json", lambda tokenizer: shorten(tokenizer["model"]["vocab"], 74))

    trainee = Trainee()
    trainee.load(tmp_path)
    theirs = saved.half().float().state_dict()
    for name, mine in trainee.model.state_dict().items():
        rows = 74 if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else len(mine)
        assert torch.equal(mine[:rows], theirs[name][:rows]) and mine.shape == theirs[name].shape, name

    change(tmp_path / "tokenizer.json", lambda tokenizer: swap(tokenizer["model"]["vocab"], "red", "blue"))
    with pytest.raises(ValueError, match="words"):
        trainee.load(tmp_path)


def change(path: Path, how: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    how(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def shorten(vocabulary: dict[str, int], words: int) -> None:
    for word in [word for word, index in vocabulary.items() if index >= words]:
        del vocabulary[word]


def swap(vocabulary: dict[str, int], one: str, other: str) -> None:
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
