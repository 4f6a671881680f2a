"""Budgets and the rectangles that meet them."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtok_cli.budget import Budget, parse_budgets, rectangle
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.models.llava import Llava
from mmtok_cli.models.qwen_vl import QwenVL
from mmtok_cli.pipeline import reduce
from mmtok_cli.rules import Rules, Track


def test_counts_and_shares() -> None:
    assert Budget.parse("64").resolve(576) == 64
    assert Budget.parse(" 10% ").resolve(576) == 57  # rounded down
    assert Budget.parse("100%").resolve(576) == 576
    assert Budget.parse("2.5 %").resolve(576) == 14
    assert [str(b) for b in parse_budgets("64,10%,64")] == ["64", "10%"]


# DivPrune's code rounds, halves to the even number; MMTok's truncates a floating-point product; FastV's rounds what the
# removed share leaves; VisionZip's file for Qwen has two settings.
@pytest.mark.parametrize(
    ("name", "share", "total", "kept"),
    [
        ("divprune", "5%", 1598, 80),
        ("divprune", "9.8%", 576, 56),
        ("divprune", "10%", 25, 2),
        ("divprune", "10%", 35, 4),
        ("mmtok", "5%", 1598, 79),
        ("mmtok", "29%", 100, 28),
        ("random", "5%", 1598, 79),
        ("pyramiddrop", "12.5%", 61, 7),
        ("fastv", "5%", 1598, 80),
        ("fastv", "10%", 355, 35),
        ("random:inside", "10%", 355, 35),
        ("visionzip", "70%", 216, 140 + 10),
        ("visionzip", "50%", 216, 97 + 10),
        ("visionzip", "70%", 15, 9 + 1),
        ("visionzip", "10%", 216, 21),
    ],
)
def test_shares_are_rounded_as_released(name: str, share: str, total: int, kept: int) -> None:
    budget, method = Budget.parse(share), make_method(name)
    count = partial(method.count, signals=method.signals_among(QwenVL.signals))
    assert budget.resolve(total, count) == kept
    assert budget.resolve(total) == int(Fraction(share.rstrip("%")) * total / 100)


@pytest.mark.parametrize("name", method_names())
def test_every_method_keeps_all_of_100_percent(name: str) -> None:
    for total in (1, 2, 36, 345, 576, 2928):
        assert Budget.parse("100%").resolve(total, make_method(name).count) == total


@pytest.mark.parametrize(("track", "kept"), [("released", (2, 2, 1)), ("harmonised", (1, 1, 1))])
def test_the_track_decides_how_shares_are_rounded(
    track: Track, kept: tuple[int, int, int], tiny_sdpa: Llava, samples: list[Sample]
) -> None:
    """4.5 % of 36 vision tokens are 1.62."""
    for grids in (None, [(6, 6)]):
        for name, count in zip(("divprune", "fastv", "mmtok"), kept, strict=True):
            method = make_method(name, **({"layer": 1} if name == "fastv" else {}))
            budget, rules = Budget.parse("4.5%"), Rules(track)
            assert reduce(tiny_sdpa, method, samples[:1], budget, rules=rules, grids=grids).tokens[0].kept == count


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
    for count in (None, *(make_method(name).count for name in ("mmtok", "divprune", "fastv", "visionzip"))):
        try:
            kept = Budget(percent=percent).resolve(total, count)
        except MMTokError as error:
            least = float(error.hint.split("at least ")[1].split("%")[0])
            assert Budget(percent=least).resolve(total, count) >= 1
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
