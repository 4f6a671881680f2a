"""Time against the number of vision tokens, as tables and notes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from mmtok_cli.report.tables import plain_table
from mmtok_cli.report.units import seconds, size

if TYPE_CHECKING:
    from mmtok_cli.results.profile import Growth, ProfileResult, ScalingPoint


def scaling_table(points: Sequence[ScalingPoint]) -> Table:
    """A row for each case at each number of tokens."""
    table = plain_table("Against the number of vision tokens: medians")
    with_peaks = any(point.peak is not None for point in points)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in ("kept", "select", "prefill", *(["peak"] if with_peaks else []), "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tokens, group in groupby(points, key=lambda point: point.tokens):
        for rank, point in enumerate(group):
            first, bold = (str(tokens), "bold") if rank == 0 else ("", "")
            if point.refused:
                cells = ["–", "–", "–", *(["–"] if with_peaks else []), "0"]
                table.add_row(first, f"{point.case.method} {point.refused}", *cells, style="dim")
                continue
            chosen = "–" if point.kept == point.tokens else seconds(point.select_seconds or 0)
            peaks = [size(point.peak)] if with_peaks else []
            after = [seconds(point.prefill_seconds or 0), *peaks, str(len(point.select_values))]
            table.add_row(first, point.case.method, str(point.kept), chosen, *after, style=bold)
        table.add_section()
    return table


def growth_table(growth: Sequence[Growth], sizes: Sequence[int]) -> Table:
    """Exponents by method and stage, with the points that they were fitted to; sizes: all that were measured."""
    table = plain_table("Growth: seconds ~ tokens ^ exponent (95 % interval)")
    for heading in ("method", "stage"):
        table.add_column(heading, no_wrap=True)
    table.add_column("exponent", justify="right", no_wrap=True)
    table.add_column("fixed", justify="right", no_wrap=True)
    table.add_column("fitted at tokens")
    for name, group in groupby(growth, key=str):
        rows = [fit for fit in group if fit.exponent is not None]
        for rank, fit in enumerate(rows):
            fixed = "–" if fit.fixed_seconds is None else seconds(fit.fixed_seconds)
            table.add_row("" if rank else name, fit.stage, exponent_text(fit), fixed, _points(fit.tokens, sizes))
        if not rows:
            table.add_row(name, "–", Text("–", style="dim"), "–", "–")
    return table


def exponent_text(fit: Growth) -> str:
    """ "1.96 (1.88–2.04)"; a dash where nothing was fitted."""
    return "–" if fit.exponent is None else f"{fit.exponent:.2f} ({fit.low:.2f}–{fit.high:.2f})"


def _points(used: Sequence[int], sizes: Sequence[int]) -> str:
    """ "1024–16384 (5 points)", or all of them where some between were left out."""
    between = [tokens for tokens in sizes if used[0] <= tokens <= used[-1]]
    return f"{used[0]}–{used[-1]} ({len(used)} points)" if between == list(used) else " ".join(map(str, used))


def scaling_notes(profile: ProfileResult, context_length: int) -> list[str]:
    """How to read the tables."""
    from mmtok_cli.results.profile import DOMINATES, FEWEST_POINTS

    frames = dict.fromkeys(point.frames for point in profile.scaling if point.frames)
    notes = [
        f"measured with {', '.join(map(str, frames))} frames of the video"
        if frames
        else "encoded at square grids other than its own, the model sees the image in one piece: times mean something "
        "there, answers may not",
        f"exponents are fitted where a stage takes at least {DOMINATES:g} times what its fastest run takes (fixed) at "
        + (f"{profile.fixed[0].tokens} tokens" if profile.fixed else "the smallest grid (which was not measured)")
        + f", and where there are {FEWEST_POINTS} such points; – there are fewer, or the stage does not grow",
    ]
    runs = [len(point.select_values) for point in profile.scaling if not point.refused]
    if runs and min(runs) < max(runs):
        notes.append(f"slow cases were run less often, down to {min(runs)} of {max(runs)} times (column runs)")
    beyond = [point.tokens for point in profile.scaling if (point.kept or 0) > context_length]
    if beyond:
        notes.append(
            f"{profile.model} reads {context_length} tokens: where more enter, from {min(beyond)} on, times are all "
            "that is to be had"
        )
    return notes
