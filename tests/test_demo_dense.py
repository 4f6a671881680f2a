"""Dense pictures of the demo: pages, bar charts and dots, and their questions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mmtok_cli.data.datasets import open_dataset
from mmtok_cli.data.names import parse_name
from mmtok_cli.demo.dense import LAYOUTS, ROWS, SIDES, Chart, Dots, Page, make_dense
from mmtok_cli.demo.dense_drawing import draw_dense, number_box, word_box
from mmtok_cli.demo.dense_questions import DENSE_CHOICES, DENSE_KINDS, DenseQuestion, dense_held_out
from mmtok_cli.demo.scenes import COLOURS
from mmtok_cli.errors import MMTokError


@pytest.fixture(scope="module")
def questions() -> list[DenseQuestion]:
    return dense_held_out(600)


def test_held_out_is_endless_stable_and_seeded(questions: list[DenseQuestion]) -> None:
    assert dense_held_out(20) == questions[:20]
    assert dense_held_out(20, seed=1) != questions[:20]
    pictures = {seed: {q.picture.seed for q in dense_held_out(60, seed)} for seed in (0, 1, 2)}
    assert not pictures[0] & pictures[1] and not pictures[1] & pictures[2]
    assert {q.picture.split for q in questions} == {"eval"}


def test_any_six_questions_hold_every_kind_and_six_pictures(questions: list[DenseQuestion]) -> None:
    for start in range(100):
        assert {q.kind for q in questions[start : start + 6]} == set(DENSE_KINDS)
    for start in range(0, 600, 12):
        block = questions[start : start + 12]
        assert all(len({(q.picture.layout, q.picture.seed) for q in part}) == 6 for part in (block[:6], block[6:]))
        asked = Counter((q.picture.layout, q.picture.seed) for q in block)
        assert len(asked) == 6 and set(asked.values()) == {2}


def test_answers_are_balanced(questions: list[DenseQuestion]) -> None:
    """No answer is more than three times as frequent as it would be if all were equally likely."""
    for kind in DENSE_KINDS:
        answers = Counter(q.answer for q in questions if q.kind == kind)
        assert max(answers.values()) < 3 * answers.total() / len(DENSE_CHOICES[kind])
    firsts = [q.text.split()[3] == q.answer for q in questions if q.kind == "comparison"]
    assert 0.35 < sum(firsts) / len(firsts) < 0.65


def test_answers_follow_from_the_words(questions: list[DenseQuestion]) -> None:
    for question in questions:
        assert question.answer in question.choices == DENSE_CHOICES[question.kind]
        assert question.answer == answer_again(question), question


def answer_again(question: DenseQuestion) -> str:
    """The answer, found from the picture and the question's words alone."""
    words = question.text.lower().rstrip("?").split()
    picture = question.picture
    colours = [word for word in words if word in COLOURS]
    if isinstance(picture, Page):
        if question.kind == "beside":
            return str({entry.word: entry.number for entry in picture.entries}[words[-1]])
        (row,), (side,) = (set(words) & set(names) for names in (ROWS, SIDES))
        return {(ROWS[entry.row], SIDES[entry.side]): entry.word for entry in picture.entries}[row, side]
    if isinstance(picture, Chart):
        values = {bar.colour: bar.value for bar in picture.bars}
        if question.kind == "value":
            return str(values[colours[0]])
        return (max if words[-1] == "tallest" else min)(values, key=values.__getitem__)
    counts = Counter(dot.colour for dot in picture.dots)
    return max(colours or counts, key=counts.__getitem__)


def test_pages_are_tables_whose_text_stays_apart() -> None:
    for seed in range(24):
        page = make_dense("page", seed, "train" if seed % 2 else "eval")
        assert isinstance(page, Page) and len({entry.word for entry in page.entries}) == 12
        boxes = [box(page, entry) for entry in page.entries for box in (word_box, number_box)]
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and top >= 0 and right <= page.size and bottom <= page.size
            assert all(left >= r or right <= x or top >= b or bottom <= y for x, y, r, b in boxes[:i])
        for one in page.entries:
            for other in page.entries:
                assert one.row >= other.row or one.word_at[1] < other.word_at[1]
                assert one.side >= other.side or one.number_at[0] < other.word_at[0]


def test_charts_show_their_values() -> None:
    for seed in range(24):
        chart = make_dense("chart", seed)
        assert isinstance(chart, Chart)
        ranked = sorted(chart.bars, key=lambda bar: bar.value)
        assert len({bar.colour for bar in ranked}) == len({bar.value for bar in ranked}) == len(ranked) >= 5
        heights = [(bar.box[3] - bar.box[1]) / bar.value for bar in ranked]
        assert max(heights) == min(heights)
        edges = sorted((bar.box[0], bar.box[2]) for bar in chart.bars)
        assert edges[0][0] > 0 and edges[-1][1] < chart.size
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(edges))
        pixels = np.asarray(draw_dense(chart))
        for bar in chart.bars:
            left, top, right, _ = bar.box
            assert tuple(pixels[top + 1, left + 1]) == tuple(pixels[top + 1, right - 2]) == COLOURS[bar.colour]
            assert tuple(pixels[top - 2, left + 1]) != COLOURS[bar.colour]


def test_dots_are_many_apart_and_clearly_unequal_in_number() -> None:
    for seed in range(24):
        picture = make_dense("dots", seed)
        assert isinstance(picture, Dots) and len(picture.dots) >= 28
        counts = list(picture.counts.values())
        assert all(more >= 1.4 * fewer for more, fewer in itertools.pairwise(counts))
        places = np.array([dot.centre for dot in picture.dots])
        radii = np.array([dot.radius for dot in picture.dots])
        gaps = np.hypot(*(places[:, None] - places).transpose(2, 0, 1)) - radii[:, None] - radii
        assert gaps[~np.eye(len(radii), dtype=bool)].min() > 0
        assert (places - radii[:, None]).min() >= 0 and (places + radii[:, None]).max() <= picture.size
        pixels = np.asarray(draw_dense(picture))
        assert all(tuple(pixels[dot.centre[1], dot.centre[0]]) == COLOURS[dot.colour] for dot in picture.dots)


def test_training_and_evaluation_share_no_pictures() -> None:
    for layout in LAYOUTS:
        pictures = {split: [make_dense(layout, seed, split) for seed in range(8)] for split in ("train", "eval")}
        seen = {split: {draw_dense(picture).tobytes() for picture in found} for split, found in pictures.items()}
        assert len(seen["train"]) == len(seen["eval"]) == 8 and not seen["train"] & seen["eval"]


def test_dense_pictures_need_no_torch() -> None:
    code = "import sys; from mmtok_cli.data.samples import demo_dense; demo_dense(6); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_dense_pictures_are_a_dataset() -> None:
    data = open_dataset("demo:dense", limit=12)
    assert data.name == "demo:dense" and data.metric == "exact"
    assert Counter(sample.kind for sample in data.samples) == dict.fromkeys(DENSE_KINDS, 2)
    assert all(sample.images[0].size == (336, 336) for sample in data.samples)
    assert len({sample.image_ids for sample in data.samples}) == 6
    assert str(parse_name("demo:dense")) == "demo:dense"
    with pytest.raises(MMTokError, match="are fixed"):
        open_dataset("demo:dense", question="What?")
