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
    """Median, 10th and 90th percentile of raw seconds, and the 95 % interval of the median from six rounds on. The raw
    values are kept."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    low, high = seconds_interval(values) or (None, None)
    return Times(
        median=median,
        p10=p10,
        p90=p90,
        values=list(values),
        repetitions=[list(round_) for round_ in repetitions],
        low=low,
        high=high,
    )


def seconds_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median of raw seconds; None for fewer than six."""
    if len(values) < FEWEST:
        return None
    low, high = median_interval(np.asarray(values, float)).tolist()
    return low, high


def paired_speedup(baseline: Sequence[float], seconds: Sequence[float]) -> Speedup:
    """Median over rounds of baseline / method seconds, with a 95 % interval.

    Each pair is measured in the same round, so a slowdown of the whole machine cancels out. The interval is that of
    Hettmansperger and Sheather (1986), interpolated between order statistics, on logarithms: if baseline and method
    change places, the interval becomes its inverse. It was chosen by simulation, which the tests repeat: under
    heavy-tailed noise and a true ratio of 1 or 1.3, it covers the true value in 94 to 96 % of experiments of 6, 8, 10,
    20 or 40 rounds. Plain order statistics are exact for any noise but too coarse for 95 %: they cover it in up to 99 %
    (8 rounds) and 98 % (10), with wider intervals. A bootstrap of the median uses the same few values and guarantees
    nothing. With fewer than six rounds there is no interval. The speedup is conclusive if the interval excludes 1.
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

    A value less than a tenth above the median never counts. Of fewer than six values, none do.
    """
    if len(seconds) < FEWEST:
        return []
    from scipy.stats import median_abs_deviation

    values = np.asarray(seconds, float)
    middle = float(np.median(values))
    deviation = max(float(median_abs_deviation(values)), 0.1 * middle / OUTLIER)
    return np.flatnonzero(values - middle > OUTLIER * deviation).tolist()


def drift(seconds: Sequence[float]) -> Drift | None:
    """How much slower the last round is than the first, on the Theil-Sen line through all; None for no drift.

    A change counts as drift from 5 % on, if its probability by chance (Kendall's tau) is below 1 %. With fewer than ten
    rounds there is none.
    """
    if len(seconds) < DRIFT_ROUNDS or len(set(seconds)) == 1:
        return None
    from scipy.stats import kendalltau, theilslopes

    rounds = np.arange(len(seconds))
    change = float(theilslopes(seconds, rounds).slope) * (len(seconds) - 1) / float(np.median(seconds))
    p = float(kendalltau(rounds, seconds).pvalue)
    return Drift(change=change, p=p) if abs(change) >= DRIFT_CHANGE and p < DRIFT_P else None
