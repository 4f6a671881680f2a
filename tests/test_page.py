"""What the page of a comparison says and draws; test_page_in_browser.py opens it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from comparisons import HOSTILE, case, comparison, overlays, unmeasured, usual

from mmtok_cli.report.exports import write_export
from mmtok_cli.report.page import page_text
from mmtok_cli.report.page.charts import FRAME, stage_stacks, tradeoff_plots
from mmtok_cli.report.page.facts import headline
from mmtok_cli.report.page.scales import linear, logarithmic
from mmtok_cli.report.page.scores import plotted_score
from mmtok_cli.results.schema import Fidelity, Speedup


def test_escaped_without_a_browser() -> None:
    text = page_text(comparison([case("full", 576), case(HOSTILE)], model=HOSTILE), overlays())
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", text)


def test_headline_gives_figures_with_their_conditions() -> None:
    unreduced, tokens, speed = headline(usual())
    assert unreduced.value == "46 ms" and "100.0 % right (91.2–100.0)" in unreduced.detail
    assert tokens.value == "16 of 576" and tokens.detail.startswith("mmtok @ 16, 97.5 % right (87.1–99.6)")
    best = usual().results[2].speedup["ttft"]
    assert speed.value == f"{best.median:.2f}x"
    assert f"{best.low:.2f}–{best.high:.2f}" in speed.detail and speed.detail.startswith("mmtok @ 16")
    assert "fastv" not in speed.detail.split("overlapped")[0]


def test_headline_where_nothing_keeps_enough() -> None:
    facts = headline(comparison([case("full", 576, prefill=0.02, right=40), case("mmtok", right=30)]))
    assert [fact.value for fact in facts] == ["46 ms", "none"]


def test_headline_tells_an_inconclusive_speedup() -> None:
    few = {"ttft": Speedup(median=1.2, low=None, high=None, conclusive=False)}
    assert "too few rounds" in headline(comparison([case("full", 576), case("mmtok", right=40, speedup=few)]))[2].detail
    wide = {"ttft": Speedup(median=1.2, low=0.9, high=1.5, conclusive=False)}
    assert "inconclusive" in headline(comparison([case("full", 576), case("mmtok", right=40, speedup=wide)]))[2].detail


def test_quality_is_agreement_where_no_answers_are_known() -> None:
    cases = [case("full", 576, right=None), case("mmtok", right=None, fidelity=Fidelity(kl=0.1, top1=0.75))]
    result = comparison(cases)
    quality = plotted_score(result.results[1], result)
    assert quality is not None and quality.share == quality.retained == 0.75
    assert 0.59 < quality.low < 0.61 and 0.85 < quality.high < 0.87  # Wilson's interval of 30 of 40
    text = page_text(result)
    assert "Top-1 agreement in percent" in text and "right answers" not in text.lower()


def test_plots_put_points_where_they_belong() -> None:
    result = comparison([case("full", 576, prefill=0.02, right=40), case("a", 64, right=20), case("b", 4, right=30)])
    tokens, prefill, _ = tradeoff_plots(result)
    a, b = (series.points[0] for series in tokens.series)
    assert tokens.full is not None and b.x < a.x < tokens.full.x
    assert tokens.full.y < b.y < a.y  # better is higher
    assert b.top < b.y < b.bottom and b.left == b.x == b.right
    timed = prefill.series[0].points[0]
    assert timed.left < timed.x < timed.right
    for plot in (tokens, prefill):
        for point in (plot.full, *(p for series in plot.series for p in series.points)):
            assert point is not None
            assert FRAME.left <= point.left and point.right <= FRAME.right
            assert FRAME.top <= point.top and point.bottom <= FRAME.bottom


def test_stage_bars_add_up() -> None:
    stacks, scale = stage_stacks(usual())
    assert scale is not None and scale.ticks[0] == (0, "0")
    assert [stack.name for stack in stacks] == [str(one) for one in usual().results[:-1]]
    longest = next(stack for stack in stacks if stack.name == "slow @ 8")
    assert longest.bars[-1].start + longest.bars[-1].length == pytest.approx(100)
    prefill = next(bar for bar in longest.bars if bar.stage == "prefill")
    assert prefill.length == pytest.approx(100 * 0.1 / 0.129)
    assert all(one.start + one.length == pytest.approx(two.start) for one, two in pairwise(longest.bars))


@pytest.mark.parametrize(
    "cases",
    [
        [case("full", 576)],
        [unmeasured("full", 576), case("mmtok", speedup={}, retention=None)],
        [unmeasured("full", 576), unmeasured("mmtok", 64)],
        [case("full", 576, right=0), case("mmtok", right=0, retention=None)],
        [case("full", 576), case("none", 0)],
    ],
    ids=["baseline alone", "no baseline", "nothing measured", "nothing right", "zero tokens"],
)
def test_pages_of_comparisons_with_gaps(cases: Sequence[Any]) -> None:
    text = page_text(comparison(cases))
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert text.count('class="trouble"') == text.count("<table") * sum(not one.seconds for one in cases)


def test_ticks_are_round_and_in_range() -> None:
    scale = linear(0.2, 1.03, 300, 0, lambda value: f"{value:.1f}")
    assert [label for _, label in scale.ticks] == ["0.2", "0.4", "0.6", "0.8", "1.0"]
    assert scale.place(0.2) == 300 and scale.place(1.03) == 0
    tokens = logarithmic([0, 4, 64, 576], 0, 100, lambda value: f"{value:.0f}", base=2, most=9)
    labels = [label for _, label in tokens.ticks]
    assert labels[0] == "0" and set(labels[1:]) == {"4", "8", "16", "32", "64", "128", "256", "512"}
    places = [place for place, _ in tokens.ticks]
    assert places == sorted(places) and min(places) >= 0 and max(places) <= 100
    assert tokens.place(16) - tokens.place(8) == pytest.approx(tokens.place(64) - tokens.place(32))


@pytest.mark.parametrize("values", [[0.005], [0.0041, 0.0042], [1e-6, 3600], [0.0], [21.9, 3.2]])
def test_logarithmic_scales_of_any_range(values: list[float]) -> None:
    scale = logarithmic(values, 0, 100, str)
    assert len(scale.ticks) <= 8
    assert all(0 <= place <= 100 for place, _ in scale.ticks)
    assert all(0 <= scale.place(value) <= 100 for value in values)


def test_a_page_is_of_reasonable_size(tmp_path: Path) -> None:
    write_export(usual(), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 100_000


def test_kinds_of_questions_have_a_table() -> None:
    result = usual()
    assert page_text(result).count("<table") == 2  # one kind of question needs no table of kinds
    counts = result.results[0].score_counts
    assert counts is not None
    two = counts.model_copy(update={"by_kind": {"colour": (3, 4), "count": (1, 4)}})
    kinds = comparison([case("full", 576, score_counts=two), case("mmtok", score_counts=two)])
    text = page_text(kinds)
    assert text.count("<table") == 3 and "75.0 %" in text and "25.0 %" in text
