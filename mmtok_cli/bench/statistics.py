"""Medians, and speedups with the interval that they deserve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import quantile_test

from mmtok_cli.bench.results import Speedup, Times

CONFIDENCE = 0.95


def summarise(values: Sequence[float]) -> Times:
    """Median and 10th and 90th percentile of raw seconds, which are kept."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return Times(median=median, p10=p10, p90=p90, values=list(values))


def paired_speedup(baseline: Sequence[float], seconds: Sequence[float]) -> Speedup:
    """Median over rounds of baseline / method seconds, with a 95 % interval.

    Each pair was measured in the same round, so what slows the whole machine down cancels out. The interval is the
    exact one of order statistics: it holds for any distribution of the noise and for few rounds, where a bootstrap of
    the median promises too much. Fewer than six rounds have none. The speedup is conclusive when it does not contain 1.
    """
    ratios = np.asarray(baseline, float) / np.asarray(seconds, float)
    median = float(np.median(ratios))
    interval = quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return Speedup(median=median, low=None, high=None, conclusive=False)
    low, high = float(interval.low), float(interval.high)
    return Speedup(median=median, low=low, high=high, conclusive=not low <= 1 <= high)
