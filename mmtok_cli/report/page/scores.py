"""What is left of a model's answers, with the interval that so many questions deserve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtok_cli.report.columns import is_scored

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison


@dataclass(frozen=True)
class PlottedScore:
    """A share of questions and its 95 % interval (Wilson's); retained: the same as a share of the unreduced model's."""

    share: float
    low: float
    high: float
    retained: float | None


def plotted_score(case: CaseResult, comparison: Comparison) -> PlottedScore | None:
    """Right answers, or top-1 agreement where none are known; None for a case that was not measured."""
    if not case.seconds:
        return None
    if is_scored(comparison):
        counts = case.score_counts
        return _with_interval(counts.right, counts.asked, case.retention) if counts else None
    asked = comparison.schedule.samples
    if case is comparison.results[0]:
        return PlottedScore(1.0, 1.0, 1.0, None)  # agrees with itself by definition
    return _with_interval(case.fidelity.top1 * asked, asked, case.fidelity.top1) if case.fidelity else None


def _with_interval(right: float, asked: int, retained: float | None) -> PlottedScore:
    from scipy.stats import binomtest

    interval = binomtest(round(right), asked).proportion_ci(0.95, method="wilson")
    return PlottedScore(right / asked, float(interval.low), float(interval.high), retained)
