"""What is left of a model's answers, with the interval that so many questions deserve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from mmtok_cli.report.columns import trouble

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison


@dataclass(frozen=True)
class Quality:
    """A share of questions and its 95 % interval (Wilson's); retained: the same as a share of the unreduced model's."""

    share: float
    low: float
    high: float
    retained: float | None


def is_scored(comparison: Comparison) -> bool:
    """Whether right answers are known; if not, quality is agreement with the unreduced model."""
    return any(case.score_counts is not None for case in comparison.results)


def quality_of(case: CaseResult, comparison: Comparison) -> Quality | None:
    """Right answers, or top-1 agreement where none are known; None for a case that was not measured."""
    if trouble(case):
        return None
    if is_scored(comparison):
        counts = case.score_counts
        return _quality(counts.right, counts.asked, case.retention) if counts else None
    asked = comparison.schedule.samples
    if case is comparison.results[0]:
        return Quality(1.0, 1.0, 1.0, None)  # agrees with itself by definition
    return _quality(case.fidelity.top1 * asked, asked, case.fidelity.top1) if case.fidelity else None


def _quality(right: float, asked: int, retained: float | None) -> Quality:
    interval = binomtest(round(right), asked).proportion_ci(0.95, method="wilson")
    return Quality(right / asked, float(interval.low), float(interval.high), retained)
