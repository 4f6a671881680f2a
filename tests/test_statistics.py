"""Intervals that hold what they promise, and signs of trouble."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mmtok_cli.timing.statistics import drift, outliers, paired_speedup, summarise


def student(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Noise of two degrees of freedom, whose variance is infinite."""
    return np.exp(0.1 * rng.standard_t(2, shape))


def bursts(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Lognormal noise, and now and then something else has the machine."""
    return rng.lognormal(0, 0.05, shape) * np.where(rng.random(shape) < 0.1, 1 + rng.exponential(2, shape), 1)


@pytest.mark.parametrize("noise", [student, bursts])
@pytest.mark.parametrize("ratio", [1.0, 1.3])
@pytest.mark.parametrize("rounds", [6, 8, 10, 20, 40])
def test_the_interval_holds_the_true_speedup_in_95_of_100_cases(rounds: int, ratio: float, noise: object) -> None:
    """Within three points; the level of the machine changes from round to round, and both sides of a pair share it."""
    rng = np.random.default_rng([rounds, round(10 * ratio), noise is student])
    draws = 600
    level = rng.lognormal(0, 1, (draws, rounds))
    baseline, seconds = level * ratio * noise(rng, level.shape), level * noise(rng, level.shape)  # type: ignore[operator]
    held = 0
    for before, after in zip(baseline, seconds, strict=True):
        speedup = paired_speedup(before.tolist(), after.tolist())
        assert speedup.low is not None and speedup.high is not None
        held += speedup.low <= ratio <= speedup.high
    assert 0.92 <= held / draws <= 0.98


def test_order_statistics_alone_would_promise_too_little() -> None:
    """Why the interval interpolates: the exact one of eight values holds the truth in 99 of 100 cases."""
    from scipy.stats import quantile_test

    rng = np.random.default_rng(8)
    logs = rng.standard_t(2, (600, 8))
    exact = [quantile_test(row).confidence_interval(0.95) for row in logs]
    assert np.mean([interval.low <= 0 <= interval.high for interval in exact]) > 0.98
    ours = [paired_speedup(np.exp(row).tolist(), [1.0] * 8) for row in logs]
    assert np.mean([np.log((s.high or 0) / (s.low or 0)) for s in ours]) < np.mean([i.high - i.low for i in exact])


def test_percentiles_keep_the_raw_values() -> None:
    times = summarise([3.0, 1.0, 2.0], [[3.0, 4.0], [1.0, 1.0], [2.0, 0.5]])
    assert times.median == 2 and times.values == [3, 1, 2] and times.p10 < 2 < times.p90
    assert times.repetitions == [[3, 4], [1, 1], [2, 0.5]]


def test_speedup_of_noise_is_inconclusive_and_of_a_gain_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0, 0.3, (2, 40))
    level = np.repeat(rng.lognormal(0, 1, 20), 2)  # what slows both sides of a pair
    same = paired_speedup(level * noise[0], level * noise[1])
    assert same.low is not None and same.high is not None
    assert same.low <= 1 <= same.high and not same.conclusive
    faster = paired_speedup(level * noise[0], level * noise[1] / 1.8)
    assert faster.conclusive and faster.low is not None and faster.low > 1.3
    slower = paired_speedup(level * noise[0], level * noise[1] * 1.8)
    assert slower.conclusive and slower.high is not None and slower.high < 1


def test_the_other_way_round_a_speedup_is_its_inverse() -> None:
    rng = np.random.default_rng(5)
    before, after = rng.lognormal(0, 0.3, (2, 10)).tolist()
    there, back = paired_speedup(before, after), paired_speedup(after, before)
    assert there.low and there.high and back.low and back.high
    assert there.median * back.median == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1) and there.high * back.low == pytest.approx(1)


def test_few_or_equal_rounds() -> None:
    few = paired_speedup([2] * 5, [1] * 5)
    assert few.median == pytest.approx(2) and few.low is None and not few.conclusive
    assert paired_speedup([2] * 6, [1] * 6).conclusive
    assert not paired_speedup([1] * 6, [1] * 6).conclusive


def test_outliers_stand_far_above_the_rest() -> None:
    rng = np.random.default_rng(1)
    usual = rng.lognormal(0, 0.05, 40)
    assert outliers(usual.tolist()) == []
    usual[[7, 30]] = 3.0
    assert outliers(usual.tolist()) == [7, 30]
    assert outliers([1.0] * 9 + [1.05]) == [] and outliers([1.0] * 9 + [1.2]) == [9]
    assert outliers([1.0] * 4 + [9.0]) == []
    assert outliers([1.0] * 9 + [0.1]) == []  # what went faster disturbed nobody
    assert sum(bool(outliers(rng.lognormal(0, 0.2, 40).tolist())) for _ in range(200)) <= 2


def test_drift_is_told_from_noise() -> None:
    rng = np.random.default_rng(2)
    noise = rng.lognormal(0, 0.03, 40)
    assert drift(noise.tolist()) is None
    slower = drift((noise * np.linspace(1, 1.3, 40)).tolist())
    assert slower is not None and slower.change == pytest.approx(0.26, abs=0.05) and slower.p < 1e-6
    faster = drift((noise * np.linspace(1.3, 1, 40)).tolist())
    assert faster is not None and faster.change < -0.2
    assert drift(np.linspace(1, 1.01, 40).tolist()) is None  # steady, but nobody needs to know
    assert drift(np.linspace(1, 2, 9).tolist()) is None and drift([1.0] * 20) is None
    alarms = sum(drift(rng.lognormal(0, 0.2, 40).tolist()) is not None for _ in range(400))
    assert alarms <= 10
