"""From values to places on a drawing, and the ticks that a reader expects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

FINE = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Scale:
    """ticks: place and label. place: from a value to a place."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def linear(low: float, high: float, start: float, end: float, label: Callable[[float], str], steps: int = 5) -> Scale:
    """A scale from low to high with round ticks, about `steps` of them."""
    step = _round_step((high - low) / steps)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    return Scale(place, tuple((place(i * step), label(i * step)) for i in range(first, last + 1)))


def logarithmic(
    values: Iterable[float],
    start: float,
    end: float,
    label: Callable[[float], str],
    *,
    base: int = 10,
    most: int = 7,
    room: Callable[[str], float] = lambda label: 0,
) -> Scale:
    """A scale on which equal steps are equal ratios; a zero has its place one step below the smallest value.

    Ticks are powers of two for base 2, else round multiples of powers of ten; at most `most` of them, and none whose
    label would touch another or be the same. room: how much of the axis a label takes.
    """
    seen = sorted(set(values))
    positive = [value for value in seen if value > 0] or [1.0]
    lowest, highest = positive[0], max(positive[-1], positive[0] * 1.1)
    margin = (highest / lowest) ** 0.05
    bottom, top = math.log(lowest / margin), math.log(highest * margin)
    with_zero = bool(seen) and seen[0] <= 0
    left = start + (end - start) * 0.1 if with_zero else start

    def place(value: float) -> float:
        if value <= 0:
            return start + (end - start) * 0.03
        return left + (math.log(value) - bottom) / (top - bottom) * (end - left)

    zero = [0.0] if with_zero else []

    def fit(found: Sequence[float]) -> bool:
        labels = [label(tick) for tick in (*zero, *found)]
        placed = [(place(tick), room(text) / 2) for tick, text in zip((*zero, *found), labels, strict=True)]
        apart = all(abs(two - one) >= half + other for (one, half), (two, other) in pairwise(placed))
        return len(found) <= most and len(set(labels)) == len(labels) and apart

    ticks = [*zero, *_log_ticks(lowest / margin, highest * margin, base, fit)]
    return Scale(place, tuple((place(tick), label(tick)) for tick in ticks))


def _log_ticks(low: float, high: float, base: int, fit: Callable[[Sequence[float]], bool]) -> Sequence[float]:
    """Two or more round values between low and high: the finest set that fits, the coarsest thinned out until it does,
    or, where there are no powers of the base or multiples of them, equal steps. None where nothing fits."""
    powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
    multiples = ((1.0,),) if base == 2 else (FINE, (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,))
    sets: list[list[float]] = []
    for chosen in multiples:
        sets.append([m * float(base) ** p for p in powers for m in chosen if low <= m * float(base) ** p <= high])
    sets += [sets[-1][::step] for step in range(2, len(sets[-1]))]
    for steps in (5, 3, 2, 1):
        step = _round_step((high - low) / steps)
        sets.append([i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)])
    return next((found for found in sets if len(found) > 1 and fit(found)), [])


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
