"""Medians, and speedups with the interval that they deserve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

from mmtok_cli.bench.results import Speedup, Times

RESAMPLES = 2000
CONFIDENCE = 0.95


def summarise(values: Sequence[float]) -> Times:
    """Median and 10th and 90th percentile of raw seconds, which are kept."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return Times(median=median, p10=p10, p90=p90, values=list(values))


def paired_speedup(baseline: Sequence[float], seconds: Sequence[float], seed: int = 0) -> Speedup:
    """Median over rounds of baseline / method seconds, with a 95 % percentile-bootstrap interval.

    Each pair was measured in the same round, so what slows the whole machine down cancels out. The speedup is
    conclusive when the interval does not contain 1; from fewer than three rounds nothing can be concluded.
    """
    ratios = np.asarray(baseline, float) / np.asarray(seconds, float)
    median = float(np.median(ratios))
    if len(ratios) < 3:
        return Speedup(median=median, low=None, high=None, conclusive=False)
    if np.ptp(ratios) == 0:
        return Speedup(median=median, low=median, high=median, conclusive=median != 1)
    interval = bootstrap(
        (ratios,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return Speedup(median=median, low=low, high=high, conclusive=not low <= 1 <= high)
