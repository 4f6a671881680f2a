"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image

from mmtok_cli.report import checks, tables
from mmtok_cli.report.cells import Column, missing, rows
from mmtok_cli.report.columns import KEPT, is_scored, kind_columns, section_columns
from mmtok_cli.report.page import charts
from mmtok_cli.report.page.facts import headline
from mmtok_cli.report.text import printable, printable_record
from mmtok_cli.report.turns import shown_columns
from mmtok_cli.report.units import plural

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison

LONGEST_SIDE = 480  # pixels of an embedded picture: sharp at its widest on a screen of twice the density
STYLES, SHAPES = 8, 5  # colours of the style sheet, shapes of the template


@dataclass(frozen=True)
class Overlay:
    """A picture of what one case kept, and what came of it."""

    caption: str
    image: Image
    note: str = ""


@dataclass(frozen=True)
class OverlayGroup:
    """One sample's overlays, side by side."""

    title: str
    overlays: Sequence[Overlay]


def page_text(comparison: Comparison, overlays: Sequence[OverlayGroup] = ()) -> str:
    """The page: facts, plots, stages, sortable tables, overlays, notes and what everything was measured on.

    It loads nothing from elsewhere and allows no script and no style but its own.
    """
    comparison = printable_record(comparison)
    style, script = (Markup(_resource(name)) for name in ("page.css", "page.js"))
    plots = charts.tradeoff_plots(comparison)
    stacks, stack_scale = charts.stage_stacks(comparison)
    columns = section_columns(comparison, "cost")
    answers = _with_kept(section_columns(comparison, "quality"))
    kinds = _with_kept(kind_columns(comparison))
    page = Environment(
        loader=PackageLoader("mmtok_cli.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return page.get_template("page.html.j2").render(
        comparison=comparison,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        subtitle=_subtitle(comparison),
        facts=headline(comparison),
        plots=plots,
        numbers=charts.method_numbers(comparison),
        styles=STYLES,
        shapes=SHAPES,
        frame=charts.FRAME,
        quality="right answers" if is_scored(comparison) else "top-1 agreement",
        stages=charts.STACKED,
        stacks=stacks,
        stack_scale=stack_scale,
        columns=columns,
        rows=_rows(comparison, columns),
        answers=answers,
        answer_rows=_rows(comparison, answers),
        kinds=kinds,
        kind_rows=_rows(comparison, kinds),
        turns=shown_columns(comparison),
        turn_rows=_turn_rows(comparison),
        overlays=[
            (
                printable(group.title),
                [(printable(o.caption), printable(o.note), *_picture(o.image)) for o in group.overlays],
            )
            for group in overlays
        ],
        ceiling="" if missing(comparison.results[0]) else tables.ceiling(comparison.results[0]),
        notes=checks.notes(comparison, ceilings=False),
        environment=_environment(comparison),
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
    others: list[CaseResult] = comparison.results[1:]
    methods = dict.fromkeys(result.case.title for result in others)
    budgets = dict.fromkeys(result.case.budget for result in others if result.case.budget)
    said = [
        plural(len(methods), "method")
        + (f" at {'a budget' if len(budgets) == 1 else 'budgets'} of {', '.join(budgets)}" if budgets else ""),
        plural(schedule.samples, "sample"),
        f"batch size {_sizes(comparison)}",
        f"{environment.processor} ({environment.device}, {environment.dtype})",
        tables.rules_text(comparison.rules) or f"{comparison.rules.track} track",
        tables.weights_text(environment.weights),
        "interrupted" if comparison.interrupted else "",
    ]
    return " · ".join(filter(None, said))


def _sizes(comparison: Comparison) -> str:
    sizes = comparison.schedule.batch_size
    return " and ".join(map(str, sizes)) if isinstance(sizes, list) else str(sizes)


def _environment(comparison: Comparison) -> list[tuple[str, str]]:
    e, s = comparison.environment, comparison.schedule
    timed = f" on {plural(s.timed, 'sample')}" if s.timed else ""
    commit = f"{e.git_commit}{' (changed)' if e.git_dirty else ''}" if e.git_commit else "not from a checkout"
    return [
        ("processor", e.processor),
        ("device", f"{e.device}, {plural(e.threads, 'thread')}"),
        ("weights", f"{e.weights}, {e.dtype}, {e.attention} attention"),
        (
            "data",
            f"{s.data}, {plural(s.samples, 'sample')}, batch size {_sizes(comparison)}, at most "
            f"{plural(s.max_new_tokens, 'new token')}",
        ),
        *([("metric", f"{s.metric}: {s.metric_title}")] if s.metric else []),
        ("schedule", f"{plural(s.rounds, 'round')}{timed}, {s.warmup} for warm-up, in random order, seed {s.seed}"),
        ("rules", tables.rules_text(comparison.rules) or f"{comparison.rules.track} track"),
        ("versions", f"mmtok {e.mmtok}, torch {e.torch}, transformers {e.transformers}, Python {e.python}"),
        ("platform", e.platform),
        ("git commit", commit),
    ]


def _picture(image: Image) -> tuple[str, int, int]:
    """A data URL of the picture, made small enough to send, and its size in pixels."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small.width, small.height


def _resource(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """The source expression by which a content security policy allows this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
