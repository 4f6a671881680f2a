"""Budgets and the rectangles that meet them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtok_cli.budget import Budget, parse_budgets, rectangle
from mmtok_cli.errors import MMTokError


def test_counts_and_shares() -> None:
    assert Budget.parse("64").resolve(576) == 64
    assert Budget.parse(" 10% ").resolve(576) == 57  # rounded down, as MMTok's release does
    assert Budget.parse("100%").resolve(576) == 576
    assert Budget.parse("2.5 %").resolve(576) == 14
    assert [str(b) for b in parse_budgets("64,10%,64")] == ["64", "10%"]


@given(st.text(max_size=6))
def test_anything_else_is_refused_in_words(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except MMTokError as error:
        assert error.message and error.hint
    else:
        assert (budget.count or 0) > 0 or 0 < (budget.percent or 0) <= 100


@given(st.integers(1, 2000), st.floats(0.001, 100))
def test_a_share_is_never_more_than_the_whole(total: int, percent: float) -> None:
    try:
        kept = Budget(percent=percent).resolve(total)
    except MMTokError as error:
        least = float(error.hint.split("at least ")[1].split("%")[0])
        assert Budget(percent=least).resolve(total) >= 1
    else:
        assert 1 <= kept <= total


@pytest.mark.parametrize(
    ("budget", "aspect", "shape"),
    [
        (64, 1, (8, 8)),
        (128, 0.7, (8, 16)),
        (128, 1.5, (16, 8)),
        (192, 0.7, (12, 16)),
        (4, 0.1, (2, 2)),
        (576, 1, (24, 24)),
    ],
)
def test_rectangles_of_published_budgets(budget: int, aspect: float, shape: tuple[int, int]) -> None:
    assert rectangle(budget, (24, 24), aspect) == shape


@given(st.integers(1, 600), st.integers(1, 30), st.integers(1, 30), st.floats(0.1, 10))
def test_rectangles_are_exact_or_refused_with_neighbours(budget: int, rows: int, columns: int, aspect: float) -> None:
    try:
        height, width = rectangle(budget, (rows, columns), aspect)
    except MMTokError as error:
        for near in (int(word) for word in error.hint.split() if word.isdigit()):
            height, width = rectangle(near, (rows, columns), aspect)
            assert height * width == near
    else:
        assert height * width == budget and height <= rows and width <= columns
