"""The geometry of the page's drawings; the template turns it into SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtok_cli.report.columns import is_scored, stage_seconds
from mmtok_cli.report.page.scales import Scale, linear, logarithmic
from mmtok_cli.report.page.scores import PlottedScore, plotted_score
from mmtok_cli.report.units import number, seconds, share
from mmtok_cli.stages import ALL_STAGES

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison, OfCase

STACKED = ALL_STAGES


@dataclass(frozen=True)
class Frame:
    """The size of a plot's drawing, and of the field in it."""

    width: float = 400
    height: float = 316
    left: float = 44
    right: float = 392
    top: float = 10
    bottom: float = 268


FRAME = Frame()


@dataclass(frozen=True)
class Point:
    """A case on a plot, with the ends of its intervals."""

    x: float
    y: float
    left: float
    right: float
    top: float
    bottom: float
    title: str


@dataclass(frozen=True)
class Series:
    """The cases of one method from the smallest budget to the largest; number: its place in the legend."""

    number: int
    name: str
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{point.x:.1f} {point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Plot:
    """title: above the drawing, if any."""

    x_title: str
    y_title: str
    x: Scale
    y: Scale
    series: tuple[Series, ...]
    full: Point | None = None
    title: str = ""


@dataclass(frozen=True)
class Bar:
    """One stage: where it starts and how long it is, in percent of the longest case."""

    stage: str
    start: float
    length: float
    title: str


@dataclass(frozen=True)
class Stack:
    name: str
    bars: tuple[Bar, ...]
    total: str


@dataclass(frozen=True)
class Span:
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def series_name(case: OfCase, comparison: Comparison) -> str:
    """What a case's method is called; the batch size belongs to it where there are several."""
    several = isinstance(comparison.schedule.batch_size, list)
    return f"{case.case.title}, batch size {case.case.batch_size}" if several else case.case.title


def method_numbers(comparison: Comparison) -> dict[str, int]:
    """Each method's number, by which plot, legend and table share a colour and a shape."""
    return {
        name: i
        for i, name in enumerate(dict.fromkeys(series_name(case, comparison) for case in comparison.results[1:]))
    }


def quality_title(comparison: Comparison) -> str:
    return "right answers" if is_scored(comparison) else "top-1 agreement"


def label_width(label: str) -> float:
    """How wide the label of a tick is, with some space around it, in the units of a plot's drawing."""
    return 6.8 * len(label) + 10


def tradeoff_plots(comparison: Comparison) -> list[Plot]:
    """Quality against tokens, prefill and time to the first token; none if nothing but the baseline was measured."""
    measured = [(case, score) for case in comparison.results if (score := plotted_score(case, comparison))]
    if all(case is comparison.results[0] for case, _ in measured):
        return []
    floor = min(score.low for _, score in measured)
    y = linear(max(0.0, floor - 0.02), 1.03, FRAME.bottom, FRAME.top, lambda value: f"{100 * value:.0f} %")
    axes: list[tuple[str, Callable[[CaseResult], Span | None]]] = [
        ("vision tokens per decoder layer", _layer_average),
        ("prefill, median", _time("prefill")),
        ("time to the first token, median", _time("ttft")),
    ]
    return [_plot(comparison, measured, x_title, span, y) for x_title, span in axes]


def _plot(
    comparison: Comparison,
    measured: Sequence[tuple[CaseResult, PlottedScore]],
    x_title: str,
    span: Callable[[CaseResult], Span | None],
    y: Scale,
) -> Plot:
    placed = [(case, score, x) for case, score in measured if (x := span(case))]
    tokens = span is _layer_average
    ends = [end for _, _, x in placed for end in (x.low, x.high)]
    label, base = (number, 2) if tokens else (seconds, 10)
    x_scale = logarithmic(ends, FRAME.left, FRAME.right, label, base=base, room=label_width)
    words = "right" if is_scored(comparison) else "top-1 agreement"

    def point(case: CaseResult, score: PlottedScore, x: Span) -> Point:
        where = f"{number(round(x.value, 1))} tokens per layer" if tokens else seconds(x.value)
        return Point(
            x=x_scale.place(x.value),
            y=y.place(score.share),
            left=x_scale.place(x.low),
            right=x_scale.place(x.high),
            top=y.place(score.high),
            bottom=y.place(score.low),
            title=f"{case}: {where}, {share(score.share)} {words} ({100 * score.low:.1f}–{100 * score.high:.1f})",
        )

    baseline = comparison.results[0]
    series = []
    for name, i in method_numbers(comparison).items():
        of_it = [p for p in placed if p[0] is not baseline and series_name(p[0], comparison) == name]
        mine = sorted(of_it, key=lambda p: p[0].tokens.kept)
        if mine:
            series.append(Series(i, name, tuple(point(*p) for p in mine)))
    full = next((point(*p) for p in placed if p[0] is baseline), None)
    return Plot(x_title, quality_title(comparison), x_scale, y, tuple(series), full)


def _layer_average(case: CaseResult) -> Span | None:
    average = case.tokens.layer_average
    return Span(average, average, average)


def _time(stage: str) -> Callable[[CaseResult], Span | None]:
    def span(case: CaseResult) -> Span | None:
        times = case.seconds.get(stage)
        return Span(times.median, times.p10, times.p90) if times else None

    return span


def stacked_stages(cases: Sequence[CaseResult]) -> tuple[str, ...]:
    """The stages that any of the cases has."""
    return tuple(stage for stage in STACKED if any(stage_seconds(case, stage) is not None for case in cases))


def stage_stacks(comparison: Comparison) -> tuple[list[Stack], Scale | None]:
    """One bar for each case, made of its stages' medians, and the scale that they share, in percent."""
    timed = [
        (case, {stage: value for stage in STACKED if (value := stage_seconds(case, stage)) is not None})
        for case in comparison.results
        if case.seconds
    ]
    longest = max((sum(medians.values()) for _, medians in timed), default=0.0)
    if longest <= 0:
        return [], None
    scale = linear(0, longest, 0, 100, lambda value: seconds(value) if value else "0")
    stacks = []
    for case, medians in timed:
        bars, start = [], 0.0
        for stage, value in medians.items():
            bars.append(Bar(stage, scale.place(start), scale.place(value), f"{case}, {stage}: {seconds(value)}"))
            start += value
        total = stage_seconds(case, "total")
        name = str(case) + (f" ({case.case.batch_size})" if isinstance(comparison.schedule.batch_size, list) else "")
        stacks.append(Stack(name, tuple(bars), "" if total is None else seconds(total)))
    return stacks, scale
