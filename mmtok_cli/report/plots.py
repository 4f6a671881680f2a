"""Plots, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def save_gain_curve(gains: Sequence[float], path: Path, title: str) -> None:
    """What each pick added to the coverage, and the coverage reached: where the curve is flat, tokens are spare."""
    from itertools import accumulate

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    reached = figure.add_subplot()
    picks = range(1, len(gains) + 1)
    reached.plot(picks, list(accumulate(gains)), color="tab:blue")
    reached.set(xlabel="tokens kept", ylabel="coverage reached", title=title, ylim=(0, None))
    gain = reached.twinx()
    gain.plot(picks, gains, color="tab:orange")
    gain.set(ylabel="gain of the pick", ylim=(0, None))
    reached.yaxis.label.set_color("tab:blue")
    gain.yaxis.label.set_color("tab:orange")
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format=path.suffix.lstrip(".").lower(), dpi=150)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
