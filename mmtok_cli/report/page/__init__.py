"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from mmtok_cli.report import checks, tables
from mmtok_cli.report.cells import Column, rows
from mmtok_cli.report.columns import KEPT, kind_columns, section_columns
from mmtok_cli.report.page import charts
from mmtok_cli.report.page.environment import batch_sizes, environment_facts
from mmtok_cli.report.page.facts import headline
from mmtok_cli.report.page.render import render
from mmtok_cli.report.text import printable, printable_record
from mmtok_cli.report.turns import shown_columns
from mmtok_cli.report.units import plural

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison

LONGEST_SIDE = 480  # pixels of an embedded picture: sharp at its widest on a screen of twice the density


@dataclass(frozen=True)
class Overlay:
    """A picture of what one case kept, and what it answered.

    flip: "lost" or "gained" where the answer is wrong or right and that of the unreduced model is not.
    """

    caption: str
    image: Image
    note: str = ""
    flip: str = ""


@dataclass(frozen=True)
class OverlayGroup:
    """One sample's overlays, side by side, under its question. references: its reference answers, in one line."""

    title: str
    overlays: Sequence[Overlay]
    references: str = ""


def page_text(comparison: Comparison, overlays: Sequence[OverlayGroup] = ()) -> str:
    """The page: facts, plots, stages, sortable tables, overlays, notes and what everything was measured on.

    It loads nothing from elsewhere and allows no script and no style but its own.
    """
    comparison = printable_record(comparison)
    stacks, stack_scale = charts.stage_stacks(comparison)
    columns = section_columns(comparison, "cost")
    answers = _with_kept(section_columns(comparison, "quality"))
    kinds = _with_kept(kind_columns(comparison))
    return render(
        "comparison.html.j2",
        comparison=comparison,
        model=comparison.model,
        stages=charts.stacked_stages(comparison.results),
        version=comparison.environment.mmtok,
        kicker="Vision-token reduction compared",
        subtitle=_subtitle(comparison),
        facts=headline(comparison),
        plots=charts.tradeoff_plots(comparison),
        numbers=charts.method_numbers(comparison),
        quality=charts.quality_title(comparison),
        stacks=stacks,
        stack_scale=stack_scale,
        columns=columns,
        rows=_rows(comparison, columns),
        answers=answers,
        answer_rows=_rows(comparison, answers),
        kinds=kinds,
        kind_rows=_rows(comparison, kinds),
        overlays=list(map(_overlays, overlays)),
        turns=shown_columns(comparison),
        turn_rows=_turn_rows(comparison),
        ceiling="; ".join(tables.ceilings(comparison.results)),
        notes=checks.notes(comparison, ceilings=False),
        environment=environment_facts(comparison),
        command=shlex.join(comparison.environment.command),
    )


def _with_kept(columns: list[Column]) -> list[Column]:
    return [KEPT, *columns] if columns else []


def _rows(comparison: Comparison, columns: Sequence[Column]) -> list[dict[str, Any]]:
    numbers = charts.method_numbers(comparison)
    first = comparison.results[0] if comparison.results else None
    return [
        {
            "method": row.title,
            "number": numbers.get(charts.series_name(row.case, comparison)) if row.case is not first else None,
            "baseline": row.case is first,
            "missing": row.missing,
            "cells": row.cells,
        }
        for row in rows(comparison, columns)
    ]


def _turn_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each turn of conversations, with the key of its case in the plots."""
    numbers, columns = charts.method_numbers(comparison), shown_columns(comparison)
    return [
        {
            "method": str(result),
            "number": None if result.case.is_baseline else numbers.get(charts.series_name(result, comparison)),
            "baseline": result.case.is_baseline,
            "missing": None,
            "cells": [column.cell_of(result) for column in columns],
        }
        for result in comparison.turns
    ]


def _subtitle(comparison: Comparison) -> str:
    schedule, environment = comparison.schedule, comparison.environment
    others: list[CaseResult] = [result for result in comparison.results[1:] if not result.case.again]
    methods = dict.fromkeys(result.case.method for result in others)
    scales = dict.fromkeys(str(result.case.image_scale or 1) for result in others)
    budgets = dict.fromkeys(result.case.budget for result in others if result.case.budget)
    said = [
        plural(len(methods), "method")
        + (f" at {'a budget' if len(budgets) == 1 else 'budgets'} of {', '.join(budgets)}" if budgets else ""),
        f"images at scales {', '.join(scales)}" if len(scales) > 1 else "",
        plural(schedule.samples, "sample"),
        schedule.sampling or "",
        f"batch size {batch_sizes(comparison)}",
        f"{environment.processor} ({environment.device}, {environment.dtype})",
        tables.rules_text(comparison.rules) or f"{comparison.rules.track} track",
        tables.measured_text(environment),
        "interrupted" if comparison.interrupted else "",
    ]
    return " · ".join(filter(None, said))


def _overlays(group: OverlayGroup) -> tuple[str, str, list[tuple[Any, ...]]]:
    """A group's title and reference answers, and of each picture caption, note, flip, address, width and height."""
    pictures = [(*map(printable, (o.caption, o.note, o.flip)), *_picture(o.image)) for o in group.overlays]
    return printable(group.title), printable(group.references), pictures


def _picture(image: Image) -> tuple[str, int, int]:
    """A data URL of the picture, made small enough to send, and its size in pixels."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small.width, small.height
