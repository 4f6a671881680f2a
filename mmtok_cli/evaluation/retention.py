"""A method against the baseline on the same samples: retention with its interval, and answers that changed sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

from mmtok_cli.results.schema import Flips
from mmtok_cli.timing.statistics import CONFIDENCE

RESAMPLES = 4000
CELLS = 4_000_000  # numbers resampled at a time

Ratio = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Retention:
    """Score / baseline score; low and high bound a 95 % interval, None where the samples do not tell it."""

    value: float
    low: float | None
    high: float | None


def mean_retention(
    baseline: Sequence[float], found: Sequence[float], clusters: Sequence[str], *, seed: int
) -> Retention | None:
    """Mean score / mean baseline score, of the same samples in the same order. None where the baseline scores 0.

    clusters: samples of one cluster, such as all questions about an image, err together and are drawn together.
    """
    columns = _by_cluster([baseline, found], clusters)
    return _retention(columns, lambda base, mine: _divide(mine, base), seed)


def f1_retention(
    known: Sequence[bool], baseline: Sequence[bool], found: Sequence[bool], clusters: Sequence[str], *, seed: int
) -> Retention | None:
    """The same of F1, from answers that say yes (True) or no and from what is known."""
    truth, base, mine = (np.asarray(values, dtype=float) for values in (known, baseline, found))
    columns = _by_cluster([truth, base, mine, truth * base, truth * mine], clusters)

    def ratio(
        truth: np.ndarray, base: np.ndarray, mine: np.ndarray, base_hits: np.ndarray, my_hits: np.ndarray
    ) -> np.ndarray:
        return _divide(my_hits * (base + truth), base_hits * (mine + truth))

    return _retention(columns, ratio, seed)


def count_flips(baseline: Sequence[bool], found: Sequence[bool]) -> Flips:
    """Compare right (True) and wrong answers to the same samples."""
    pairs = list(zip(baseline, found, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return Flips(
        right_right=pairs.count((True, True)),
        right_wrong=lost,
        wrong_right=gained,
        wrong_wrong=pairs.count((False, False)),
        p_value=float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
    )


def _by_cluster(columns: Sequence[Sequence[float] | np.ndarray], clusters: Sequence[str]) -> list[np.ndarray]:
    """Sums over each cluster: ratios of means are ratios of such sums."""
    _, members = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return [np.bincount(members, weights=np.asarray(column, dtype=float)) for column in columns]


def _retention(columns: list[np.ndarray], ratio: Ratio, seed: int) -> Retention | None:
    """The ratio of column sums, and its interval by the percentile bootstrap over clusters.

    There is no interval where the samples do not tell how wide it is: with one cluster, where every resample gives the
    same ratio (no answer changed, or all are wrong), and where the baseline scores 0 in so many that a bound is
    infinite.
    """

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return ratio(*(column.sum(axis=axis) for column in drawn))

    value = float(statistic(*columns))
    if not np.isfinite(value):
        return None
    if len(columns[0]) < 2:
        return Retention(value, None, None)
    with np.errstate(invalid="ignore"):  # percentiles between a finite and an infinite ratio
        found = bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=RESAMPLES,
            batch=max(1, CELLS // len(columns[0])),
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    if not (np.isfinite(low) and np.isfinite(high)) or low == high:
        return Retention(value, None, None)
    return Retention(value, low, high)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio, infinite where nothing is below the line: a resample in which the baseline scores 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full_like(above, np.inf), where=below > 0)
