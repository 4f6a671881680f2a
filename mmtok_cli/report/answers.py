"""Tables of what the answers of a comparison are worth, and of what the cases take up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from mmtok_cli.report.tables import Column, case_table, layers_differ
from mmtok_cli.report.units import count, number, p_value, share, shares, size

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison


def quality_table(comparison: Comparison) -> Table | None:
    """Methods x budgets: scores, how much of the unreduced one is left, and answers that changed sides; None where no
    answer is known."""
    if not is_scored(comparison):
        return None
    columns: list[Column] = [
        ("score", lambda r: share(r.score)),
        ("retention", lambda r: retention_text(r)),
        ("lost", lambda r: str(r.flips.right_wrong) if r.flips else "–"),
        ("gained", lambda r: str(r.flips.wrong_right) if r.flips else "–"),
        ("p", lambda r: p_value(r.flips.p_value) if r.flips else "–"),
    ]
    return case_table("Quality", comparison.results, columns)


def yes_no_table(comparison: Comparison) -> Table | None:
    """POPE's scores, where every answer is yes or no."""
    if not any(result.yes_no for result in comparison.results):
        return None
    columns: list[Column] = [
        (name, lambda r, field=field: share(getattr(r.yes_no, field)) if r.yes_no else "–")  # type: ignore[misc]
        for name, field in (
            ("accuracy", "accuracy"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("F1", "f1"),
            ("says yes", "yes_ratio"),
        )
    ]
    return case_table("Yes or no", comparison.results, columns)


def cost_and_fidelity_table(comparison: Comparison) -> Table:
    """Methods x budgets: closeness to the unreduced model, and the memory and operations that are saved."""
    results = comparison.results
    columns: list[Column] = []
    if layers_differ((r.tokens.kept, r.tokens.layer_average) for r in results):
        columns.append(("avg", lambda r: number(round(r.tokens.layer_average, 1))))
    if close := any(r.fidelity for r in results):
        columns.append(("same", lambda r: share(r.fidelity.same if r.fidelity else None)))
        columns.append(("top-1", lambda r: share(r.fidelity.top1 if r.fidelity else None)))
        columns.append(("KL", lambda r: f"{r.fidelity.kl:.3f}" if r.fidelity else "–"))
    columns.append(("KV cache", lambda r: size(r.memory.kv_cache)))
    if any(r.memory.peak is not None for r in results):
        columns.append(("peak", lambda r: size(r.memory.peak)))
    columns.append(("FLOPs", lambda r: count(r.flops["total"])))
    title = "Fidelity, memory, operations" if close else "Memory, operations"
    return case_table(title, results, columns, tight=len(columns) > 5)


def kind_table(comparison: Comparison) -> Table | None:
    """Score by kind of question, where there are kinds."""
    results = comparison.results
    counts = next((result.score_counts for result in results if result.score_counts), None)
    if counts is None or len(counts.by_kind) < 2:
        return None
    columns: list[Column] = [(kind, _kind_cell(kind)) for kind in counts.by_kind]
    asked = ", ".join(f"{total} {kind}" for kind, (_, total) in counts.by_kind.items())
    return case_table(f"Score by kind of question ({asked})", results, columns)


def is_scored(comparison: Comparison) -> bool:
    """Whether right answers are known."""
    return any(result.score is not None for result in comparison.results)


def retention_text(result: CaseResult) -> str:
    """ "97.5 % (95.1–99.4)"; without the brackets where the samples do not tell."""
    return share(result.retention) + (f" ({interval})" if (interval := retention_interval(result)) else "")


def retention_interval(result: CaseResult) -> str:
    """The interval of the retention in percent; empty where there is none."""
    if result.retention_low is None or result.retention_high is None:
        return ""
    return f"{shares(result.retention_low)}–{shares(result.retention_high)}"


def _kind_cell(kind: str) -> Callable[[CaseResult], str]:
    def cell(result: CaseResult) -> str:
        right, asked = result.score_counts.by_kind.get(kind, (0, 0)) if result.score_counts else (0, 0)
        return share(right / asked) if asked else "–"

    return cell
