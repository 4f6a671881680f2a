"""Medians, speedups with confidence intervals, and signs that a measurement was disturbed.

scipy is imported where it is used, since commands that compute no statistics should start without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmtok_cli.results.schema import CONFIDENCE, Drift, Speedup, Times

FEWEST = 6  # with fewer values, even the smallest and the largest enclose the median with less confidence

# As hyperfine has it: ten standard deviations of a normal distribution with the same median absolute deviation.
OUTLIER = 14.826

DRIFT_ROUNDS = 10
DRIFT_CHANGE = 0.05
DRIFT_P = 0.01


def summarise(values: Sequence[float], repetitions: Sequence[Sequence[float]] = ()) -> Times:
    """Median and 10th and 90th percentile of raw seconds, which are kept."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return Times(
        median=median, p10=p10, p90=p90, values=list(values), repetitions=[list(round_) for round_ in repetitions]
    )


def paired_speedup(baseline: Sequence[float], seconds: Sequence[float]) -> Speedup:
    """Median over rounds of baseline / method seconds, with a 95 % interval.

    Each pair was measured in the same round, so what slows the whole machine down cancels out. The interval is that of
    Hettmansperger and Sheather (1986), order statistics between which is interpolated, of the logarithms: whichever of
    two cases is called the baseline, the intervals are each other's inverse. It was chosen by simulation (the tests
    repeat it): under heavy-tailed noise and a true ratio of 1 or 1.3 it holds the truth in 94 to 96 % of 6, 8, 10, 20
    or 40 rounds. Order statistics alone, exact for any noise, are too few to hit 95 %: they hold it in up to 99 % (8
    rounds) and 98 % (10) and are the wider for it; a bootstrap of the median is bound to the same few values and has no
    such promise. Fewer than six rounds have no interval. The speedup is conclusive when it does not contain 1.
    """
    logs = np.log(np.asarray(baseline, float) / np.asarray(seconds, float))
    median = float(np.exp(np.median(logs)))
    if len(logs) < FEWEST:
        return Speedup(median=median, low=None, high=None, conclusive=False)
    low, high = np.exp(median_interval(logs)).tolist()
    return Speedup(median=median, low=low, high=high, conclusive=not low <= 1 <= high)


def median_interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bounds of the 95 % interval of the median, [2]. values: six or more."""
    from scipy.stats.mstats import median_cihs

    return np.asarray(median_cihs(values, alpha=1 - CONFIDENCE))


def outliers(seconds: Sequence[float]) -> list[int]:
    """The places of values that exceed the median by more than 14.8 median absolute deviations.

    What is less than a tenth above the median is none, however alike the rest are. Fewer than six values have none.
    """
    if len(seconds) < FEWEST:
        return []
    from scipy.stats import median_abs_deviation

    values = np.asarray(seconds, float)
    middle = float(np.median(values))
    deviation = max(float(median_abs_deviation(values)), 0.1 * middle / OUTLIER)
    return np.flatnonzero(values - middle > OUTLIER * deviation).tolist()


def drift(seconds: Sequence[float]) -> Drift | None:
    """How much slower the last round is than the first, on a line through all (Theil and Sen's); None for no drift.

    Counts as drift from 5 % on, where chance (Kendall's tau) would bring it about less than once in a hundred times.
    Fewer than ten rounds have none.
    """
    if len(seconds) < DRIFT_ROUNDS or len(set(seconds)) == 1:
        return None
    from scipy.stats import kendalltau, theilslopes

    rounds = np.arange(len(seconds))
    change = float(theilslopes(seconds, rounds).slope) * (len(seconds) - 1) / float(np.median(seconds))
    p = float(kendalltau(rounds, seconds).pvalue)
    return Drift(change=change, p=p) if abs(change) >= DRIFT_CHANGE and p < DRIFT_P else None
