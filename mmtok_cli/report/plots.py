"""Plots, drawn by matplotlib without a display.

They have the width of a page with two columns, text of 8 points that stays text in .svg and .pdf, and lines that differ
without colour.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok_cli.files import write_whole
from mmtok_cli.report.page.scores import plotted_score
from mmtok_cli.report.text import printable
from mmtok_cli.report.units import plural, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmtok_cli.results.profile import ProfileResult, ScalingPoint
    from mmtok_cli.results.schema import CaseResult, Comparison

WIDTH = 6.9  # inches
MARKERS = "osD^vP<X>hp"  # one more than there are colours, so that those that share a colour differ
LINES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.fonttype": "none",  # text instead of outlines
}

Interval = tuple[float, float]


def save_gain_curve(gains: Sequence[float], path: Path, title: str) -> None:
    """The gain of each pick and the coverage reached; where the curve is flat, more tokens add little."""
    with drawing(path, WIDTH / 2, 2.4) as figure:
        reached = figure.add_subplot()
        picks = range(1, len(gains) + 1)
        reached.plot(picks, list(accumulate(gains)), color="tab:blue", label="coverage")
        reached.set(xlabel="tokens kept", ylabel="coverage reached", title=plain(title), ylim=(0, None))
        gain = reached.twinx()
        gain.plot(picks, gains, color="tab:orange", linestyle="--", label="gain")
        gain.set(ylabel="gain of the pick", ylim=(0, None))
        reached.yaxis.label.set_color("tab:blue")
        gain.yaxis.label.set_color("tab:orange")
        reached.legend(handles=[*reached.lines, *gain.lines], loc="center right")


def save_tradeoff(comparison: Comparison, path: Path) -> None:
    """Quality against vision tokens and against time to first token, with 95 % intervals.

    Tokens are counted per decoder layer, on average, lest methods inside the language model look cheaper than they
    are. Quality is the score, or top-1 agreement with the unreduced model where no answers are known.
    """
    baseline, *results = comparison.results
    scored = baseline.score is not None
    methods: dict[str, list[CaseResult]] = defaultdict(list)
    for result in results:
        methods[result.case.title].append(result)
    with drawing(path, WIDTH, 2.9) as figure:
        by_tokens, by_time = figure.subplots(1, 2, sharey=True)
        panels: list[tuple[Axes, Callable[[CaseResult], float], Callable[[CaseResult], Interval | None]]] = [
            (by_tokens, lambda case: case.tokens.layer_average, lambda case: None),
            (by_time, lambda case: 1e3 * case.seconds["ttft"].median, _milliseconds),
        ]
        for axes, place, spread in panels:
            full = 100 * _quality(baseline, scored)
            axes.axhline(full, color="0.6", linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
            for number, cases in enumerate(methods.values()):
                cases.sort(key=lambda case: case.tokens.kept)
                _draw(axes, cases, place, spread, comparison, _style(number) | {"label": plain(cases[0].case.title)})
            star = {"color": "black", "marker": "*", "markersize": 8, "linestyle": "none"}
            label = f"{plain(baseline.case.title)} ({baseline.tokens.total:.0f} tokens)"
            _draw(axes, [baseline], place, spread, comparison, star | {"label": label})
            axes.grid(alpha=0.25, linewidth=0.5)
        _token_axis(by_tokens, [case.tokens.layer_average for case in comparison.results])
        by_time.locator_params(axis="x", nbins=5)
        by_tokens.set_ylim(*_quality_limits(comparison, scored))
        asked = baseline.score_counts.asked if baseline.score_counts else comparison.schedule.samples
        by_tokens.set(xlabel="vision tokens per decoder layer", ylabel="score [%]" if scored else "top-1 agreement [%]")
        by_time.set(xlabel="time to first token, median [ms]")
        by_tokens.set_title(f"{plain(comparison.model)}, {plural(asked, 'question')}", loc="left")
        by_time.set_title("bars: 95 % intervals", loc="right")
        _legend(figure, by_tokens)


def save_scaling(profile: ProfileResult, path: Path) -> None:
    """Seconds of selection and of prefill against the number of vision tokens, both axes logarithmic.

    The legend gives the exponent of each line, where there is one; the points that it was fitted to are filled. Bars
    are 95 % intervals of the median, where there are six runs.
    """
    cases: dict[str, list[ScalingPoint]] = defaultdict(list)
    for point in profile.scaling:
        if not point.refused:
            cases[str(point)].append(point)
    sizes = sorted({point.tokens for point in profile.scaling})
    with drawing(path, WIDTH, 2.9) as figure:
        for axes, stage in zip(figure.subplots(1, 2), ("select", "prefill"), strict=True):
            _draw_scaling(axes, stage, cases, profile)
            axes.set(xscale="log", yscale="log", xlabel="vision tokens", ylabel=f"{stage}, median")
            _log_ticks(axes, sizes)
            axes.grid(alpha=0.25, linewidth=0.5)
            if axes.lines:
                axes.legend(framealpha=0.8)
        title = f"{plain(profile.model)}, {profile.environment.dtype}, {profile.environment.device}"
        figure.axes[0].set_title(title, loc="left")
        figure.axes[1].set_title("bars: 95 % intervals", loc="right")


def _draw_scaling(axes: Axes, stage: str, cases: dict[str, list[ScalingPoint]], profile: ProfileResult) -> None:
    """One line for each case; nothing for the selection of cases that keep every token."""
    fits = {(str(fit), fit.stage): fit for fit in profile.growth}
    for number, (name, points) in enumerate(cases.items()):
        if stage == "select" and all(point.kept == point.tokens for point in points):
            continue
        timed = [(p, (p.select_seconds if stage == "select" else p.prefill_seconds) or 0.0) for p in points]
        fit, style = fits[name, stage], _style(number)
        label = plain(name) + ("" if fit.exponent is None else f": tokens^{fit.exponent:.2f}")
        axes.plot([p.tokens for p, _ in timed], [s for _, s in timed], label=label, markerfacecolor="white", **style)
        used = [(p.tokens, s) for p, s in timed if fit.exponent is not None and p.tokens in fit.tokens]
        if used:
            axes.plot(*zip(*used, strict=True), **style | {"linestyle": "none"})
        for point, middle in timed:
            interval = point.select_interval if stage == "select" else point.prefill_interval
            if interval:
                _bar(axes, (point.tokens, middle), style["color"], y=interval)


def _draw(
    axes: Axes,
    cases: Sequence[CaseResult],
    place: Callable[[CaseResult], float],
    spread: Callable[[CaseResult], Interval | None],
    comparison: Comparison,
    style: dict[str, Any],
) -> None:
    """A line through some cases, each with its intervals. place, spread: on the horizontal axis."""
    scored = comparison.results[0].score is not None
    points = [(place(case), 100 * _quality(case, scored)) for case in cases]
    axes.plot(*zip(*points, strict=True), **style)
    for case, point in zip(cases, points, strict=True):
        _bar(axes, point, style["color"], x=spread(case), y=_percents(_quality_interval(case, comparison)))


def _bar(
    axes: Axes, point: tuple[float, float], color: str, x: Interval | None = None, y: Interval | None = None
) -> None:
    """Error bars of one point. Bounds that do not enclose it, by rounding, end at it."""
    x_error, y_error = (
        None if bounds is None else [[max(0.0, middle - bounds[0])], [max(0.0, bounds[1] - middle)]]
        for middle, bounds in zip(point, (x, y), strict=True)
    )
    if x_error or y_error:
        axes.errorbar(
            *point, xerr=x_error, yerr=y_error, fmt="none", ecolor=color, elinewidth=0.7, capsize=1.5, alpha=0.6
        )


def _style(number: int) -> dict[str, Any]:
    """How the line of one method is drawn: those of the first methods differ in colour, marker and dashes."""
    return {
        "color": f"C{number % 10}",
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def _quality(case: CaseResult, scored: bool) -> float:
    if scored:
        return case.score or 0.0
    return case.fidelity.top1 if case.fidelity else 1.0


def _quality_interval(case: CaseResult, comparison: Comparison) -> Interval | None:
    """The 95 % interval of the quality: Wilson's of a share of the answers, otherwise, as for F1, that of the retention
    times the score of the unreduced model."""
    baseline, score = comparison.results[0], plotted_score(case, comparison)
    quality = _quality(case, baseline.score is not None)
    if score and math.isclose(score.share, quality, abs_tol=1e-9):
        return (score.low, score.high) if score.low < score.high else None
    if case.retention_low is None or case.retention_high is None or baseline.score is None:
        return None
    return case.retention_low * baseline.score, case.retention_high * baseline.score


def _milliseconds(case: CaseResult) -> Interval | None:
    times = case.seconds["ttft"]
    return None if times.low is None or times.high is None else (1e3 * times.low, 1e3 * times.high)


def _percents(interval: Interval | None) -> Interval | None:
    return interval and (100 * interval[0], 100 * interval[1])


def _quality_limits(comparison: Comparison, scored: bool) -> Interval:
    """The ends of the axis of quality, in percent: at least two points apart, the whole range if all are 0."""
    qualities = [100 * _quality(case, scored) for case in comparison.results]
    intervals = [each for case in comparison.results if (each := _percents(_quality_interval(case, comparison)))]
    if max(qualities) == 0:
        return 0, 100
    low, high = (end(*qualities, *(each[i] for each in intervals)) for i, end in enumerate((min, max)))
    margin = max(1, (high - low) / 20)
    return max(0, low - margin), high + margin


def _token_axis(axes: Axes, tokens: Sequence[float]) -> None:
    """A logarithmic axis with a place for zero, labelled at powers of two that are far enough apart."""
    low, high = min(tokens), max(tokens)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(-0.5 if low < 1 else low / 1.3, high * 1.3)
    axes.minorticks_off()
    powers = [2**i for i in range(24) if low <= 2**i <= high]
    ticks = [0] * (low < 1) + powers[:: math.ceil(len(powers) / 8) or 1]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _log_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Ticks at the numbers of tokens, without those whose labels would touch; seconds in human units."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = math.log(sizes[0]), math.log(sizes[-1])
    ticks: list[int] = []
    for size in reversed(sizes):  # of the label of the largest there must be room
        if not ticks or math.log(ticks[-1]) - math.log(size) > 0.11 * (high - low):
            ticks.append(size)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.minorticks_off()


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the panels, in as many columns as names leave room for; further rows make the figure higher."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(8, int(100 / (6 + max(map(len, names))))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.17 * (math.ceil(len(names) / columns) - 1))


def plain(text: str) -> str:
    """Text that matplotlib shows as it is, without formulas between dollar signs."""
    return printable(text).replace("$", r"\$")


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of a size in inches, which is saved when it is complete. Raises MMTokError if it cannot be written."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kind = path.suffix.lstrip(".").lower()
    with warnings.catch_warnings(), rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn for it
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        write_whole(path, lambda part: figure.savefig(part, format=kind, dpi=220))
