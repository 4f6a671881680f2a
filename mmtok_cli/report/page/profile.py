"""A profile as one self-contained HTML page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from mmtok_cli.report import tables
from mmtok_cli.report.cells import speedup_cell
from mmtok_cli.report.columns import STAGES, stage_seconds
from mmtok_cli.report.page import charts
from mmtok_cli.report.page.environment import environment_facts
from mmtok_cli.report.page.facts import Fact
from mmtok_cli.report.page.profile_charts import (
    MEMORY_FRAME,
    SCALING_FRAME,
    memory_charts,
    scaling_numbers,
    scaling_plots,
    shares_of_ceilings,
)
from mmtok_cli.report.page.render import render
from mmtok_cli.report.profiles import ceiling_table, profile_tables, profiles_by_batch_size
from mmtok_cli.report.scaling import growth_table, scaling_table
from mmtok_cli.report.text import printable, printable_record
from mmtok_cli.report.units import count, plural, seconds, share

if TYPE_CHECKING:
    from mmtok_cli.results.profile import ProfileResult


@dataclass(frozen=True)
class PlainCell:
    text: str
    dim: bool = False


@dataclass(frozen=True)
class PlainTable:
    """A table of the terminal, to be shown as HTML.

    headings: with whether a column holds words, not figures. rows: whether a row is bold, and its cells.
    """

    title: str
    headings: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[bool, tuple[PlainCell, ...]], ...]


def profile_page_text(profile: ProfileResult, notes: Sequence[str] = (), top: int = 5) -> str:
    """The page: facts, stages, tokens and memory, ceilings, operators, scaling, notes and the environment.

    It loads nothing from elsewhere. notes: how to read the tables. top: operators to list per stage.
    """
    profile = printable_record(profile)
    comparison = profile.comparison
    stacks, stack_scale = charts.stage_stacks(comparison)
    operators = {case: [o for o in profile.operators if o.case == case] for case in _traced(profile)}
    sizes = sorted({point.tokens for point in profile.scaling})
    return render(
        "profile.html.j2",
        model=profile.model,
        stages=charts.stacked_stages(profile.cases),
        version=profile.environment.mmtok,
        kicker="Where the time and the memory go",
        subtitle=_subtitle(profile),
        facts=_facts(profile),
        stacks=stacks,
        stack_scale=stack_scale,
        tables=[plain(table) for part in profiles_by_batch_size(profile) for table in profile_tables(part)],
        memory=memory_charts(profile.memory),
        memory_frame=MEMORY_FRAME,
        ceilings=plain(ceiling_table(profile, profile.ceilings)) if profile.ceilings else None,
        shares=shares_of_ceilings(profile),
        operators=[(case, plain(tables.operator_table(found, top))) for case, found in operators.items()],
        plots=scaling_plots(profile),
        numbers=scaling_numbers(profile),
        frame=SCALING_FRAME,
        scaling=[plain(scaling_table(profile.scaling)), plain(growth_table(profile.growth, sizes))] if sizes else [],
        notes=list(map(printable, notes)),
        environment=environment_facts(comparison),
        command=shlex.join(profile.environment.command),
    )


def plain(table: Table) -> PlainTable:
    """A table of the terminal as plain text."""
    columns = [[_cell(cell) for cell in column.cells] for column in table.columns]
    rows = zip(table.rows, zip(*columns, strict=True), strict=True)
    return PlainTable(
        title=str(table.title or ""),
        headings=tuple((str(column.header), column.justify != "right") for column in table.columns),
        rows=tuple((row.style == "bold", cells) for row, cells in rows),
    )


def _cell(content: object) -> PlainCell:
    return PlainCell(str(content), isinstance(content, Text) and content.style == "dim")


def _traced(profile: ProfileResult) -> list[str]:
    return list(dict.fromkeys(operator.case for operator in profile.operators))


def _subtitle(profile: ProfileResult) -> str:
    e, schedule = profile.environment, profile.schedule
    said = [
        plural(len(profile.cases), "case"),
        f"{count(profile.parameters)} parameters",
        f"{plural(schedule.rounds, 'round')} on {schedule.data}",
        schedule.sampling or "",
        f"{e.processor} ({e.device}, {e.dtype})",
        tables.rules_text(profile.rules) or f"{profile.rules.track} track",
        tables.measured_text(e),
        "interrupted" if profile.interrupted else "",
    ]
    return " · ".join(filter(None, said))


def _facts(profile: ProfileResult) -> list[Fact]:
    """The time to the first token with its longest stage, the upper bound of the speedup, and the largest one."""
    baseline, *others = profile.cases
    first = stage_seconds(baseline, "ttft")
    if not first:
        return []
    parts = {stage: stage_seconds(baseline, stage) or 0.0 for stage in STAGES if stage in charts.STACKED}
    longest = sorted((stage for stage in parts if stage != "decode"), key=lambda stage: -parts[stage])[:2]
    detail = " and ".join(f"{stage} {share(parts[stage] / first)}" for stage in longest)
    facts = [Fact(f"{baseline}, to the first token", seconds(first), f"of which {detail}")]
    faster = [case for case in others if "ttft" in case.speedup and case.case.batch_size == baseline.case.batch_size]
    if faster:
        best = max(faster, key=lambda case: case.speedup["ttft"].median)
        cell = speedup_cell(best.speedup["ttft"])
        interval = f"95 % interval {cell.interval}" if cell.interval else "too few rounds for an interval"
        doubt = ", inconclusive" if cell.doubtful and cell.interval else ""
        facts.append(Fact("Largest speedup (TTFT)", cell.text, f"{best}, {interval}{doubt}"))
    bound = f"{tables.speedup_bound(baseline):.2f}x"
    return [*facts, Fact("Upper bound for methods after the encoder", bound, "if selection and prefill took no time")]
