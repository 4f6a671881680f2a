"""What a column is, and what it shows of a case; the columns themselves are in columns.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from mmtok_cli.option_values import LARGEST_BATCH
from mmtok_cli.report.units import number, points, ratio, share, shares
from mmtok_cli.results.schema import CaseResult, FailedCase

if TYPE_CHECKING:
    from mmtok_cli.results.schema import Comparison, Speedup, TaskResult, TurnResult

Value = str | float | None  # text, int or float; None: there is none
Source = TypeVar("Source")
TableName = Literal["speed", "scale", "throughput", "quality", "yes-no", "groups", "cost"]
Section = Literal["cost", "quality"]


@dataclass(frozen=True)
class Cell:
    """The value of one case in one column, ready to be shown.

    value: what the cell is sorted by; None where there is none. interval: the 95 % interval as text. doubtful: a
    speedup whose interval contains 1 or that has no interval.
    """

    text: str = "–"
    value: Value = None
    interval: str = ""
    doubtful: bool = False

    def __str__(self) -> str:
        return self.text + (f" ({self.interval})" if self.interval else "") + ("?" if self.doubtful else "")


@dataclass(frozen=True)
class CsvColumn(Generic[Source]):
    """A column of the CSV.

    name: stable, with the unit (s: seconds). value: in seconds, bytes and shares. always: in every file, even if no
    case has a value.
    """

    name: str
    meaning: str
    value: Callable[[Source], Value]
    always: bool = False


@dataclass(frozen=True)
class Column(CsvColumn[CaseResult]):
    """A column of the tables, and of the CSV if it has a name.

    show: the value as text. cell: for what is more than a value, such as an interval.
    table: of the terminal. section: of the HTML page and of Markdown. None: not shown there.
    shown: for which comparisons; by default where any case has a value, or `always`. in_markdown: whether the section
    has it in Markdown too, which is short.
    narrow: in the terminal, the heading may wrap and the interval has no brackets.
    """

    heading: str = ""
    show: Callable[[Any], str] = str
    cell: Callable[[CaseResult], Cell] | None = None
    table: TableName | None = None
    section: Section | None = None
    shown: Callable[[Comparison], bool] | None = None
    in_markdown: Callable[[Comparison], bool] = lambda comparison: True
    narrow: bool = False

    def cell_of(self, case: CaseResult) -> Cell:
        """What the case has in this column; a dash where there is nothing."""
        value = self.value(case) if case.seconds else None
        if value is None:
            return Cell()
        return self.cell(case) if self.cell else Cell(self.show(value), value)

    def is_shown(self, comparison: Comparison) -> bool:
        if self.shown:
            return self.shown(comparison)
        return self.always or any(self.cell_of(case).value is not None for case in comparison.results)


# Cells that are made of more than one value.


def kept_cell(case: CaseResult) -> Cell:
    """ "64/576"."""
    return Cell(_of(case.tokens.kept, case.tokens.total), case.tokens.kept)


def encoded_cell(case: CaseResult) -> Cell:
    """ "144/576"."""
    tokens = case.tokens
    encoded = tokens.total if tokens.encoded is None else tokens.encoded
    return Cell(_of(encoded, tokens.total), encoded)


def _of(part: float, whole: float) -> str:
    """ "64/576"; means of a hundred and more are rounded, as the columns are narrow."""
    return "/".join(number(round(value) if value >= 100 else value) for value in (part, whole))


def speedup_cell(speedup: Speedup | None) -> Cell:
    """ "1.87x (1.80–1.93)"; doubtful where the interval contains 1 or is missing."""
    if speedup is None:
        return Cell()
    bounded = speedup.low is not None and speedup.high is not None
    interval = f"{ratio(speedup.low or 0)}–{ratio(speedup.high or 0)}" if bounded else ""
    return Cell(f"{ratio(speedup.median)}x", speedup.median, interval, not speedup.conclusive)


def retention_cell(case: CaseResult | TaskResult | TurnResult) -> Cell:
    """ "97.5 % (95.1–99.4)"; without an interval where there is none."""
    bounded = case.retention_low is not None and case.retention_high is not None
    interval = f"{shares(case.retention_low or 0)}–{shares(case.retention_high or 0)}" if bounded else ""
    return Cell(share(case.retention), case.retention, interval)


def largest_batch_cell(case: CaseResult) -> Cell:
    """ "37", or "~ 37" if it was computed; "≥ 10000" where larger ones are not considered."""
    found = case.largest_batch
    if found is None:
        return Cell()
    mark = "≥ " if found.size >= LARGEST_BATCH else "" if found.measured else "~ "
    return Cell(f"{mark}{found.size}", found.size)


def draft_cell(case: CaseResult) -> Cell:
    """ "+0.6 (-1.2 to 2.4)": points won by a draft."""
    draft = case.draft
    if draft is None or draft.points is None:
        return Cell()
    bounded = draft.low is not None and draft.high is not None
    interval = f"{points(draft.low or 0)} to {points(draft.high or 0)}" if bounded else ""
    return Cell(points(draft.points), draft.points, interval)


def group_cell(right: int, samples: int) -> Cell:
    """ "83.3 % (10 of 12)": correct answers in a group of samples."""
    return Cell(share(right / samples), right / samples, f"{right} of {samples}") if samples else Cell()


def flips_cell(case: CaseResult) -> Cell:
    """ "4 / 1": lost and gained, sorted by the net loss."""
    flips = case.flips
    return (
        Cell(f"{flips.right_wrong} / {flips.wrong_right}", flips.right_wrong - flips.wrong_right) if flips else Cell()
    )


def missing(case: CaseResult) -> str | None:
    """Why a case has no values; None if it has."""
    return None if case.seconds else "not measured"


@dataclass(frozen=True)
class Row:
    """One case in a table: its title, why it has no values if that is so, and its cells."""

    case: CaseResult | FailedCase
    missing: str | None
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        return self.case.case.title


def rows(comparison: Comparison, columns: Sequence[Column]) -> list[Row]:
    """The cases that were measured, then those that failed."""
    measured = [Row(case, missing(case), tuple(map(_cell_of(case), columns))) for case in comparison.results]
    failed = [Row(case, case.reason, tuple(map(_cell_of(case), columns))) for case in comparison.failures]
    return [*measured, *failed]


def _cell_of(case: CaseResult | FailedCase) -> Callable[[Column], Cell]:
    """The cells of one case. Without measurements it has a budget and a batch size, and nothing else."""
    known = {
        "kept": Cell(case.case.budget or "–"),
        "batch": Cell(str(case.case.batch_size), case.case.batch_size),
    }
    if isinstance(case, FailedCase) or not case.seconds:
        return lambda column: known.get(column.heading, Cell())
    return lambda column: column.cell_of(case)
