"""Plots for papers: intervals, lines that differ without colour, labels that do not touch, text that stays text."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from comparisons import case, comparison
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_profile_page import profile

from mmtok_cli.report import plots
from mmtok_cli.results.schema import Comparison
from mmtok_cli.timing.statistics import seconds_interval

NAMES = "mmtok mmtok:text random uniform visionzip vispruner divprune cdpruner fastv sparsevlm pyramiddrop".split()


def many() -> Comparison:
    cases = [case(name, kept, right=30 - i) for i, name in enumerate(NAMES) for kept in (64, 4)]
    return comparison([case("full", 576, prefill=0.02, right=40), *cases, case("none", 0, right=9)])


@pytest.fixture()
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draws a plot and returns the figure, laid out."""
    figures: list[Figure] = []
    usual = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        usual(figure, *arguments, **options)
        figures.append(figure)

    def draw(save: Any, result: Any) -> Figure:
        monkeypatch.setattr(Figure, "savefig", keep)
        save(result, tmp_path / "plot.png")
        FigureCanvasAgg(figures[-1]).draw()
        return figures[-1]

    return draw


def touching(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of labels of ticks of one axis that touch."""
    found = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [
                (tick.label1.get_text(), tick.label1.get_window_extent())
                for tick in axis.get_major_ticks()
                if tick.label1.get_visible() and tick.label1.get_text() and low <= tick.get_loc() <= high
            ]
            found += [(one, two) for (one, a), (two, b) in combinations(labels, 2) if a.overlaps(b)]
    return found


@pytest.mark.parametrize(
    ("save", "result"),
    [
        (plots.save_tradeoff, many()),
        (plots.save_tradeoff, comparison([case("full", 576, prefill=0.04), case("mmtok", 500, prefill=0.03)])),
        (plots.save_scaling, profile()),
    ],
    ids=["many methods", "narrow range", "scaling"],
)
def test_labels_do_not_touch(save: Any, result: Any, drawn: Any) -> None:
    figure = drawn(save, result)
    assert touching(figure) == []
    assert all(len([t for t in axes.get_xticks() if t >= 0]) >= 2 for axes in figure.axes[1:])


def test_many_sizes_of_scaling_are_thinned(drawn: Any) -> None:
    whole = profile()
    points = [
        point.model_copy(update={"tokens": tokens})
        for point in whole.scaling[:2]
        for tokens in (576, 625, 676, 729, 784, 1024, 4096, 16384)
    ]
    figure = drawn(plots.save_scaling, whole.model_copy(update={"scaling": points}))
    assert touching(figure) == []
    assert {label.get_text() for label in figure.axes[0].get_xticklabels()} == {"676", "1024", "4096", "16384"}


def test_lines_differ_without_colour(drawn: Any) -> None:
    legend = drawn(plots.save_tradeoff, many()).legends[0]
    looks = [(line.get_marker(), line.get_linestyle()) for line in legend.get_lines()]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*NAMES, "none", "full (576 tokens)"] and len(set(looks)) == len(looks)
    assert looks[-1][0] == "*"
    first_ten = [line.get_color() for line in legend.get_lines()][:10]
    assert len(set(first_ten)) == 10


def test_bars_are_the_intervals(drawn: Any) -> None:
    """Of a share of 40 questions, by Wilson, and of the median of eight rounds."""
    result = comparison([case("full", 576, prefill=0.02, right=40), case("mmtok", 64, right=30)])
    by_tokens, by_time = drawn(plots.save_tradeoff, result).axes
    segments = [path.vertices for bars in by_time.collections for path in bars.get_paths()]
    heights = [v for v in segments if v[0][0] == v[1][0] and v[1][1] - v[0][1] > 20]
    assert len(heights) == 1 and heights[0][0][1] == pytest.approx(59.81, abs=0.01)
    assert heights[0][1][1] == pytest.approx(85.81, abs=0.01)
    widths = [v for v in segments if v[0][1] == v[1][1]]
    times = result.results[1].seconds["ttft"]
    assert (
        times.low is not None and times.high is not None and (times.low, times.high) == seconds_interval(times.values)
    )
    assert any(v[0][0] == pytest.approx(1e3 * times.low) and v[1][0] == pytest.approx(1e3 * times.high) for v in widths)
    assert len(by_tokens.collections) == 2  # no bars along the axis of tokens


def test_intervals_of_f1_are_those_of_the_retention() -> None:
    """F1 is no share of the answers, so its interval comes from the bootstrap over images."""
    one = case("mmtok", right=30, score=0.8, retention=0.9, retention_low=0.8, retention_high=0.95)
    result = comparison([case("full", 576, right=36, score=0.9), one])
    assert plots._quality_interval(result.results[1], result) == pytest.approx((0.72, 0.855))
    assert plots._quality_interval(result.results[0], result) == pytest.approx((0.769, 0.960), abs=0.001)


def test_too_few_rounds_have_no_bars() -> None:
    assert seconds_interval([1.0] * 5) is None
    low, high = seconds_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) or (0, 0)
    assert 1 <= low < 3.5 < high <= 6


@pytest.mark.parametrize(("save", "result"), [(plots.save_tradeoff, many()), (plots.save_scaling, profile())])
def test_text_stays_text(save: Any, result: Any, tmp_path: Path) -> None:
    for kind in ("svg", "pdf"):
        save(result, tmp_path / f"plot.{kind}")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "plot.svg").read_text())
    assert "bars: 95 % intervals" in texts and any("mmtok" in text for text in texts)
    content = (tmp_path / "plot.pdf").read_bytes()
    assert b"/FontFile2" in content and b"/CIDFontType2" in content and b"/Type3" not in content
    width, height = re.search(rb"/MediaBox \[ 0 0 ([0-9.]+) ([0-9.]+) \]", content).groups()  # type: ignore[union-attr]
    assert float(width) == pytest.approx(72 * plots.WIDTH) and 200 < float(height) < 300
