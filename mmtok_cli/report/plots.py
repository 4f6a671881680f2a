"""Plots, drawn by matplotlib without a display."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok_cli.files import write_whole
from mmtok_cli.report.text import printable
from mmtok_cli.report.units import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmtok_cli.results.profile import ProfileResult, ScalingPoint
    from mmtok_cli.results.schema import CaseResult, Comparison


def save_gain_curve(gains: Sequence[float], path: Path, title: str) -> None:
    """The gain of each pick and the coverage reached; where the curve is flat, more tokens add little."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    reached = figure.add_subplot()
    picks = range(1, len(gains) + 1)
    reached.plot(picks, list(accumulate(gains)), color="tab:blue")
    reached.set(xlabel="tokens kept", ylabel="coverage reached", title=plain(title), ylim=(0, None))
    gain = reached.twinx()
    gain.plot(picks, gains, color="tab:orange")
    gain.set(ylabel="gain of the pick", ylim=(0, None))
    reached.yaxis.label.set_color("tab:blue")
    gain.yaxis.label.set_color("tab:orange")
    save(figure, path)


def save_tradeoff(comparison: Comparison, path: Path) -> None:
    """Quality against vision tokens and against time to first token.

    Tokens are counted per decoder layer, on average, lest methods inside the language model look cheaper than they
    are. Quality is the score, or top-1 agreement with the unreduced model where no answers are known.
    """
    from matplotlib.figure import Figure

    baseline, *results = comparison.results
    scored = baseline.score is not None
    methods: dict[str, list[CaseResult]] = defaultdict(list)
    for result in results:
        methods[result.case.title].append(result)

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for name, cases in methods.items():
        cases.sort(key=lambda case: case.tokens.kept)
        quality = [100 * _quality(case, scored) for case in cases]
        style = {"marker": "o", "markersize": 4, "label": plain(name)}
        by_tokens.plot([case.tokens.layer_average for case in cases], quality, **style)
        by_time.plot([case.seconds["ttft"].median * 1e3 for case in cases], quality, **style)
    full = 100 * _quality(baseline, scored)
    by_tokens.axhline(
        full, color="black", linestyle="--", linewidth=1, label=f"full ({baseline.tokens.total:.0f} tokens)"
    )
    by_time.plot(baseline.seconds["ttft"].median * 1e3, full, "k*", markersize=11)
    seen = [case.tokens.layer_average for case in results]
    by_tokens.set_xscale("symlog", base=2, linthresh=1)
    by_tokens.set_xlim(left=-0.5 if min(seen) < 1 else min(seen) / 1.3)
    by_tokens.minorticks_off()
    ticks = [0] * (min(seen) < 1) + [2**i for i in range(16) if min(seen) <= 2**i <= max(seen)]
    by_tokens.set_xticks(ticks, [str(tick) for tick in ticks])
    by_tokens.set_ylim(*_quality_limits([full, *(100 * _quality(case, scored) for case in results)]))
    asked = baseline.score_counts.asked if baseline.score_counts else comparison.schedule.samples
    by_tokens.set(xlabel="vision tokens per decoder layer", ylabel="score [%]" if scored else "top-1 agreement [%]")
    by_time.set(xlabel="time to first token, median [ms]")
    by_tokens.set_title(f"{plain(comparison.model)}, {plural(asked, 'question')}", loc="left")
    handles, names = by_tokens.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=8, fontsize="small")
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    save(figure, path)


def save_scaling(profile: ProfileResult, path: Path) -> None:
    """Seconds of selection and of prefill against the number of vision tokens, both axes logarithmic.

    The legend gives the exponent of each line, where there is one; the points that it was fitted to are filled.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    cases: dict[str, list[ScalingPoint]] = defaultdict(list)
    for point in profile.scaling:
        if not point.refused:
            cases[str(point)].append(point)
    fits = {(str(fit), fit.stage): fit for fit in profile.growth}
    sizes = sorted({point.tokens for point in profile.scaling})
    for axes, stage in zip(figure.subplots(1, 2), ("select", "prefill"), strict=True):
        for color, (name, points) in enumerate(cases.items()):
            if stage == "select" and all(point.kept == point.tokens for point in points):
                continue
            seconds = [p.select_seconds if stage == "select" else p.prefill_seconds for p in points]
            fit, style = fits[name, stage], {"color": f"C{color}", "marker": "o", "markersize": 5}
            label = plain(name) + ("" if fit.exponent is None else f": tokens^{fit.exponent:.2f}")
            axes.plot([p.tokens for p in points], seconds, label=label, markerfacecolor="white", **style)
            if fit.exponent is not None:
                used = [(p.tokens, s) for p, s in zip(points, seconds, strict=True) if p.tokens in fit.tokens]
                axes.plot(*zip(*used, strict=True), linestyle="none", **style)
        axes.set(xscale="log", yscale="log", xlabel="vision tokens", ylabel=f"{stage}, median [s]")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    title = f"{plain(profile.model)}, {profile.environment.dtype}, {profile.environment.device}"
    figure.axes[0].set_title(title, loc="left")
    save(figure, path)


def _quality(case: CaseResult, scored: bool) -> float:
    if scored:
        return case.score or 0.0
    return case.fidelity.top1 if case.fidelity else 1.0


def _quality_limits(percents: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis of quality, in percent: at least two points apart, the whole range if all are 0."""
    low, high = min(percents), max(percents)
    if high == 0:
        return 0, 100
    margin = max(1, (high - low) / 20)
    return max(0, low - margin), high + margin


def plain(text: str) -> str:
    """Text that matplotlib shows as it is, without formulas between dollar signs."""
    return printable(text).replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    kind = path.suffix.lstrip(".").lower()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn for it
        write_whole(path, lambda part: figure.savefig(part, format=kind, dpi=150))
