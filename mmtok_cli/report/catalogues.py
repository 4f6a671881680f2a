"""The catalogues of models and methods, and a map of kept tokens, in characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from mmtok_cli.report.tables import plain_table
from mmtok_cli.report.units import count

if TYPE_CHECKING:
    from mmtok_cli.profiles import Profile


def models_table(profiles: Sequence[Profile]) -> Table:
    """Known models, one line each."""
    table = plain_table()
    table.add_column("name")
    for heading in ("parameters", "tokens", "budgets"):
        table.add_column(heading, justify="right")
    table.add_column("loaded from")
    for profile in profiles:
        where = "this package" if profile.location.startswith("package:") else profile.location
        budgets = " ".join(profile.budgets)
        table.add_row(
            profile.name, count(profile.parameters).replace(" G", " B"), str(profile.vision_tokens), budgets, where
        )
    return table


def methods_table(methods: Sequence[dict[str, Any]]) -> Table:
    """Methods, one line each."""
    table = plain_table()
    for heading in ("name", "what it keeps", "reads question", "source"):
        table.add_column(heading)
    for method in methods:
        reads = "yes" if method["reads_question"] else "no"
        table.add_row(method["name"], method["summary"], reads, method["source"])
    return table


def method_details(method: dict[str, Any]) -> Table:
    """One method with its parameters."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(method["name"], method["description"])
    table.add_row("acts", method["acts"])
    table.add_row("reads question", "yes" if method["reads_question"] else "no")
    table.add_row("source", method["source"] or "–")
    for name, default in method["parameters"].items():
        table.add_row(name, f"{default} by default")
    return table


def kept_map(
    grid: tuple[int, int], indices: Sequence[int], order: Sequence[int] | None, mark: int, eligible: Sequence[bool]
) -> Text:
    """The token grid: the first picks numbered, kept tokens as blocks, dropped ones as dots, padding left blank."""
    kept = set(indices)
    ranks = {index: rank for rank, index in enumerate(order[: min(mark, 99)] if order else (), start=1)}
    lines = []
    for row in range(grid[0]):
        line = Text()
        for i in range(row * grid[1], (row + 1) * grid[1]):
            if i in ranks:
                line.append(f"{ranks[i]:>2} ", style="bold red")
            elif i in kept:
                line.append(" ■ ", style="yellow")
            else:
                line.append(" · " if eligible[i] else "   ", style="dim")
        lines.append(line)
    return Text("\n").join(lines)
