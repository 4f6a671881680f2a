"""The columns of a comparison, for every table that leaves the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtok_cli.report.answers import retention_interval
from mmtok_cli.report.units import count, number, p_value, ratio, seconds, share, size

if TYPE_CHECKING:
    from mmtok_cli.results.schema import CaseResult, Comparison, FailedCase, Speedup


@dataclass(frozen=True)
class Cell:
    """What one case has in one column.

    value: what the cell sorts by; None where nothing was measured. interval: 95 %. doubtful: the interval contains 1,
    or there is none.
    """

    text: str = "–"
    value: float | None = None
    interval: str = ""
    doubtful: bool = False

    def __str__(self) -> str:
        return self.text + (f" ({self.interval})" if self.interval else "") + ("?" if self.doubtful else "")


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and what each case has there. brief: belongs into a short table as well."""

    heading: str
    meaning: str
    cell: Callable[[CaseResult], Cell]
    brief: bool = True


def trouble(case: CaseResult) -> str | None:
    """Why a case has no figures; None if it has."""
    return None if case.seconds else "not measured"


@dataclass(frozen=True)
class Row:
    """One case in a table: its title, why it has no figures if that is so, and its cells."""

    case: CaseResult | FailedCase
    trouble: str | None
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        return self.case.case.title


def rows(comparison: Comparison, columns: Sequence[Column]) -> list[Row]:
    """The cases that were measured, then those that failed."""
    measured = [Row(case, trouble(case), tuple(column.cell(case) for column in columns)) for case in comparison.results]
    return measured + [_failed_row(failed, columns) for failed in comparison.failures]


def _failed_row(failed: FailedCase, columns: Sequence[Column]) -> Row:
    said = {
        KEPT.heading: Cell(failed.case.budget or "–"),
        BATCH.heading: Cell(str(failed.case.batch_size), failed.case.batch_size),
    }
    return Row(failed, failed.reason, tuple(said.get(column.heading, Cell()) for column in columns))


def stage_seconds(case: CaseResult, stage: str) -> float | None:
    """Median seconds of a stage, where it was measured."""
    times = case.seconds.get(stage)
    return times.median if times else None


def layers_differ(cases: Sequence[CaseResult]) -> bool:
    """Whether the tokens kept and their layer average differ anywhere, so that the average says something."""
    return any(abs(case.tokens.layer_average - case.tokens.kept) > 0.05 for case in cases)


def comparison_columns(comparison: Comparison) -> list[Column]:
    """Tokens, seconds, speedups, memory, operations and quality, as far as the comparison has them."""
    return [*cost_columns(comparison), *quality_columns(comparison)]


def cost_columns(comparison: Comparison) -> list[Column]:
    """Tokens, seconds, speedups, memory and operations."""
    cases = [case for case in comparison.results if trouble(case) is None]
    columns = [*([BATCH] if isinstance(comparison.schedule.batch_size, list) else []), KEPT]
    if layers_differ(cases):
        columns.append(Column("avg", "vision tokens per decoder layer, on average", _layer_average))
    columns += [
        Column("select", "choosing tokens and assembling the shorter prompt, median", _seconds("select")),
        Column("prefill", "reading the prompt, median", _seconds("prefill")),
        Column("speedup (prefill)", "baseline / method, paired within rounds, 95 % interval", _speedup("prefill")),
        Column("TTFT", "time to the first token: prepare, encode, select and prefill, median", _seconds("ttft")),
        Column("speedup (TTFT)", "baseline / method, paired within rounds, 95 % interval", _speedup("ttft")),
        Column("KV cache", "bytes per sample", _measured(size, lambda case: case.memory.kv_cache)),
    ]
    if any(case.memory.peak is not None for case in cases):
        columns.append(
            Column("peak", "bytes of a batch above the weights", _measured(size, lambda case: case.memory.peak), False)
        )
    columns.append(Column("FLOPs", "per sample", _measured(count, lambda case: case.flops.get("total")), False))
    return columns


def quality_columns(comparison: Comparison) -> list[Column]:
    """Scores, retention, flips and fidelity."""
    cases = [case for case in comparison.results if trouble(case) is None]
    scored = any(case.score is not None for case in cases)
    columns: list[Column] = []
    if scored:
        columns += [
            Column("score", "F1" if any(case.yes_no for case in cases) else "right answers", _score),
            Column("retention", "score / score of the unreduced model, 95 % interval over images", _retention),
            Column(
                "lost / gained", "answers that the unreduced model alone has right, and alone has wrong", _flips, False
            ),
            Column("p", "McNemar's exact test of lost against gained", _p_value, False),
        ]
    if any(case.fidelity for case in cases):
        same = _measured(share, lambda case: case.fidelity.same if case.fidelity else None)
        top1 = _measured(share, lambda case: case.fidelity.top1 if case.fidelity else None)
        kl = _measured("{:.3f}".format, lambda case: case.fidelity.kl if case.fidelity else None)
        if any(case.fidelity and case.fidelity.same is not None for case in cases):
            columns.append(Column("same", "answers in the same words as the unreduced model's", same, not scored))
        columns += [
            Column("top-1", "agreement with the unreduced model at each token of its answer", top1, not scored),
            Column("KL", "divergence from the unreduced model at each token of its answer, nats", kl, not scored),
        ]
    return columns


def kind_columns(comparison: Comparison) -> list[Column]:
    """Score by kind of question, where there are kinds."""
    counts = next((case.score_counts for case in comparison.results if case.score_counts), None)
    if counts is None or len(counts.by_kind) < 2:
        return []
    kinds = [
        Column(kind, f"right answers to {asked} questions", _measured(share, _kind_share(kind)))
        for kind, (_, asked) in counts.by_kind.items()
    ]
    return [KEPT, *kinds]


def _kind_share(kind: str) -> Callable[[CaseResult], float | None]:
    def value(case: CaseResult) -> float | None:
        right, asked = case.score_counts.by_kind.get(kind, (0, 0)) if case.score_counts else (0, 0)
        return right / asked if asked else None

    return value


def _measured(
    unit: Callable[[float], str], value: Callable[[CaseResult], float | None]
) -> Callable[[CaseResult], Cell]:
    def cell(case: CaseResult) -> Cell:
        found = None if trouble(case) else value(case)
        return Cell() if found is None else Cell(unit(found), found)

    return cell


def _seconds(stage: str) -> Callable[[CaseResult], Cell]:
    return _measured(seconds, lambda case: stage_seconds(case, stage))


def _speedup(stage: str) -> Callable[[CaseResult], Cell]:
    return lambda case: speedup_cell(case.speedup.get(stage))


def speedup_cell(speedup: Speedup | None) -> Cell:
    if speedup is None:
        return Cell()
    bounded = speedup.low is not None and speedup.high is not None
    interval = f"{ratio(speedup.low or 0)}–{ratio(speedup.high or 0)}" if bounded else ""
    return Cell(f"{ratio(speedup.median)}x", speedup.median, interval, not speedup.conclusive)


_score = _measured(share, lambda case: case.score)
_p_value = _measured(p_value, lambda case: case.flips.p_value if case.flips else None)


def _retention(case: CaseResult) -> Cell:
    if trouble(case) or case.retention is None:
        return Cell()
    return Cell(share(case.retention), case.retention, retention_interval(case))


def _flips(case: CaseResult) -> Cell:
    if trouble(case) or case.flips is None:
        return Cell()
    lost, gained = case.flips.right_wrong, case.flips.wrong_right
    return Cell(f"{lost} / {gained}", lost - gained)


def _kept(case: CaseResult) -> Cell:
    if trouble(case):
        return Cell(case.case.budget or "–")
    return Cell(f"{number(case.tokens.kept)}/{number(case.tokens.total)}", case.tokens.kept)


def _layer_average(case: CaseResult) -> Cell:
    return Cell() if trouble(case) else Cell(number(round(case.tokens.layer_average, 1)), case.tokens.layer_average)


KEPT = Column("kept", "vision tokens behind the last reduction, of those of the image", _kept)
BATCH = Column("batch", "samples in a batch", lambda case: Cell(str(case.case.batch_size), case.case.batch_size))
