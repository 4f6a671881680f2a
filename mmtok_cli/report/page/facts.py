"""What a reader wants to know first, in a few figures with their conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtok_cli.report.cells import speedup_cell
from mmtok_cli.report.columns import is_scored, stage_seconds
from mmtok_cli.report.page.scores import PlottedScore, plotted_score
from mmtok_cli.report.units import number, seconds, share

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison

ENOUGH = 0.95  # the share of the unreduced model's score below which a saving is not called one


Measured = list[tuple["CaseResult", PlottedScore]]


@dataclass(frozen=True)
class Fact:
    label: str
    value: str
    detail: str


def headline(comparison: Comparison) -> list[Fact]:
    """The unreduced model; the fewest tokens and the largest speedup that keep ENOUGH of its score."""
    baseline, *others = comparison.results
    scored = is_scored(comparison)
    facts = []
    before, first = plotted_score(baseline, comparison), stage_seconds(baseline, "ttft")
    if before and first is not None:
        tokens = f"{number(baseline.tokens.kept)} vision tokens"
        facts.append(Fact("Unreduced, to the first token", seconds(first), f"{tokens}; {_right(before, scored)}"))
    enough = [
        (case, score)
        for case in others
        if (score := plotted_score(case, comparison)) and score.retained is not None and score.retained >= ENOUGH
    ]
    if baseline.score == 0:
        return [*facts, Fact("Score of the unreduced model", share(0.0), "it cannot do this task: nothing can be kept")]
    bar = f"at ≥ {100 * ENOUGH:.0f} % {'of the score' if scored else 'agreement'}"
    if enough:
        facts.append(_fewest(enough, bar, scored))
        if timed := [(case, score) for case, score in enough if "ttft" in case.speedup]:
            facts.append(_earliest(timed, bar, scored))
    elif any(plotted_score(case, comparison) for case in others):
        facts.append(Fact(f"Cases {bar}", "none", "every reduction measured here loses more than that"))
    return facts


def _fewest(enough: Measured, bar: str, scored: bool) -> Fact:
    average = min(case.tokens.layer_average for case, _ in enough)
    best = [(case, score) for case, score in enough if case.tokens.layer_average == average]
    case = best[0][0]
    tokens = f"{number(round(average, 1))} of {number(case.tokens.total)}"
    names = "; ".join(f"{case}, {_right(score, scored)}" for case, score in best)
    return Fact(f"Fewest tokens per layer {bar}", tokens, names)


def _earliest(timed: Measured, bar: str, scored: bool) -> Fact:
    """The largest speedup, and the cases whose intervals overlap with it."""
    case, score = max(timed, key=lambda pair: pair[0].speedup["ttft"].median)
    gain = case.speedup["ttft"]
    shown = speedup_cell(gain)
    said = f"95 % interval {shown.interval}" if shown.interval else "too few rounds for an interval"
    if shown.interval and gain.conclusive:
        near = [str(other) for other, _ in timed if other is not case and _reaches(other, gain.low)]
        said += f", overlapped by {', '.join(near)}" if near else ""
    elif shown.interval:
        said += ", inconclusive"
    return Fact(f"Largest speedup (TTFT) {bar}", shown.text, f"{case}, {said}; {_right(score, scored)}")


def _reaches(case: CaseResult, low: float | None) -> bool:
    high = case.speedup["ttft"].high
    return low is not None and high is not None and high >= low


def _right(score: PlottedScore, scored: bool) -> str:
    if score.low == score.high:
        return "the reference of the others"
    words = "right" if scored else "agreement"
    return f"{share(score.share)} {words} ({100 * score.low:.1f}–{100 * score.high:.1f})"
