"""The geometry of the drawings on a profile's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mmtok_cli.report.page.charts import Frame, Plot, Point, Series, label_width
from mmtok_cli.report.page.scales import Scale, linear, logarithmic
from mmtok_cli.report.units import count, number, seconds, share, size

if TYPE_CHECKING:
    from mmtok_cli.results.profile import MemoryTimeline, ProfileResult, ScalingPoint

MEMORY_FRAME = Frame(height=236, left=60, bottom=188)
SCALING_FRAME = Frame(left=60)
HEIGHT = 16  # of a tick's label


@dataclass(frozen=True)
class Band:
    """A stage behind the memory: from left to right."""

    stage: str
    left: float
    right: float
    title: str


@dataclass(frozen=True)
class MemoryChart:
    """Bytes over time of one case. line, area: SVG paths, of which the second is closed. peak: in words."""

    case: str
    bands: tuple[Band, ...]
    line: str
    area: str
    x: Scale
    y: Scale
    peak: str


@dataclass(frozen=True)
class ShareBar:
    """What share of a ceiling one stage of a case reaches; length in percent of the bar's field."""

    stage: str
    length: float
    text: str
    title: str


def memory_charts(timelines: Sequence[MemoryTimeline]) -> list[MemoryChart]:
    """One drawing for each traced case, all with the same scales."""
    frame = MEMORY_FRAME
    drawn = [timeline for timeline in timelines if timeline.seconds and timeline.stages]
    if not drawn:
        return []
    end = max(max(span.end for span in timeline.stages) for timeline in drawn)
    highest = max(max(timeline.bytes) for timeline in drawn)
    lowest = min(0, *(min(timeline.bytes) for timeline in drawn))
    if end <= 0 or highest <= lowest:
        return []
    x = linear(0, end, frame.left, frame.right, lambda value: seconds(value) if value else "0", steps=4)
    y = binary(lowest, highest * 1.05, frame.bottom, frame.top)
    return [_memory_chart(timeline, x, y, end) for timeline in drawn]


def _memory_chart(timeline: MemoryTimeline, x: Scale, y: Scale, end: float) -> MemoryChart:
    moments = [min(max(moment, 0.0), end) for moment in timeline.seconds]
    places = [(x.place(moment), y.place(level)) for moment, level in zip(moments, timeline.bytes, strict=True)]
    zero, last = y.place(0), x.place(min(max(span.end for span in timeline.stages), end))
    steps = f"M{places[0][0]:.1f} {zero:.1f}V{places[0][1]:.1f}"
    steps += "".join(f"H{two[0]:.1f}V{two[1]:.1f}" for _, two in pairwise(places))
    line = f"{steps}H{max(last, places[-1][0]):.1f}"
    return MemoryChart(
        case=timeline.case,
        bands=tuple(
            Band(span.stage, x.place(span.start), x.place(span.end), f"{span.stage}: {seconds(span.end - span.start)}")
            for span in timeline.stages
        ),
        line=line,
        area=f"{line}V{zero:.1f}Z",
        x=x,
        y=y,
        peak=size(max(timeline.bytes)),
    )


def binary(low: float, high: float, start: float, end: float) -> Scale:
    """A linear scale of bytes whose ticks are round in their unit."""
    unit = 1024.0 ** max(0, min(3, (max(int(high), 1).bit_length() - 1) // 10))
    scale = linear(low / unit, high / unit, start, end, lambda value: size(value * unit) if value else "0", steps=4)
    return Scale(lambda value: scale.place(value / unit), scale.ticks)


def shares_of_ceilings(profile: ProfileResult) -> list[tuple[str, list[ShareBar]]]:
    """For each case, the share of the peak FLOP/s of each stage, and of the peak bandwidth in decoding."""
    ceilings = profile.ceilings
    if ceilings is None:
        return []
    cases = []
    for case in profile.achieved:
        bars = []
        rates = [(stage, case.flops_per_second.get(stage), ceilings.flops_per_second, "FLOP/s") for stage in RATED]
        for stage, rate, peak, unit in [
            *rates,
            ("decode", case.decode_bytes_per_second, ceilings.bytes_per_second, "B/s"),
        ]:
            if rate is not None and peak > 0:
                text = f"{count(rate)}{'' if count(rate)[-1].isalpha() else ' '}{unit}"
                title = f"{case.case.label}, {stage}: {text} of {count(peak)}{unit}"
                bars.append(ShareBar(stage, min(100.0, 100 * rate / peak), share(rate / peak), title))
        cases.append((case.case.label, bars))
    return [(name, bars) for name, bars in cases if bars]


RATED = ("encode", "select", "prefill")


def scaling_numbers(profile: ProfileResult) -> dict[str, int]:
    """Each case's number, by which the plots and their legend share a colour and a shape."""
    names = dict.fromkeys(str(point) for point in profile.scaling if not point.refused)
    return {name: place for place, name in enumerate(names)}


def scaling_plots(profile: ProfileResult) -> list[Plot]:
    """Seconds of selection and of prefill against the number of vision tokens; none where nothing was measured."""
    frame = SCALING_FRAME
    points = [point for point in profile.scaling if not point.refused]
    plots = []
    for stage in ("select", "prefill"):
        timed = [(point, _seconds(point, stage)) for point in points]
        shown = [(p, s) for p, s in timed if s and not (stage == "select" and p.kept == p.tokens)]
        if not shown:
            continue
        x = logarithmic((p.tokens for p, _ in shown), frame.left, frame.right, number, base=2, room=label_width)
        ends = [end for p, s in shown for end in (_interval(p, stage) or (s,))]
        y = logarithmic([*ends, *(s for _, s in shown)], frame.bottom, frame.top, seconds, room=lambda label: HEIGHT)
        series = []
        for name, place in scaling_numbers(profile).items():
            mine = sorted(((p, s) for p, s in shown if str(p) == name), key=lambda pair: pair[0].tokens)
            if mine:
                series.append(Series(place, name, tuple(_point(p, s, stage, x, y) for p, s in mine)))
        plots.append(Plot("vision tokens", f"seconds of {stage}", x, y, tuple(series), title=f"{stage}, median"))
    return plots


def _seconds(point: ScalingPoint, stage: str) -> float:
    return (point.select_seconds if stage == "select" else point.prefill_seconds) or 0.0


def _interval(point: ScalingPoint, stage: str) -> tuple[float, float] | None:
    return point.select_interval if stage == "select" else point.prefill_interval


def _point(point: ScalingPoint, value: float, stage: str, x: Scale, y: Scale) -> Point:
    right, up, interval = x.place(point.tokens), y.place(value), _interval(point, stage)
    bottom, top = (y.place(end) for end in interval or (value, value))
    said = f" ({seconds(interval[0])}–{seconds(interval[1])})" if interval else ""
    return Point(right, up, right, right, top, bottom, f"{point}, {point.tokens} tokens: {seconds(value)}{said}")
