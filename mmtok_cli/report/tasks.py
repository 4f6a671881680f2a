"""Scores of a comparison by the tasks of lmms-eval: tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from mmtok_cli.report.cells import retention_cell
from mmtok_cli.report.tables import plain_table
from mmtok_cli.report.units import p_value, plural

if TYPE_CHECKING:
    from mmtok_cli.results.schema import Comparison, TaskResult

SIDE_BY_SIDE = 2  # metrics in one table with the statistics, in the terminal
STATISTICS: dict[str, Callable[[TaskResult], str]] = {
    "retention": lambda result: str(retention_cell(result)),
    "lost": lambda result: str(result.flips.right_wrong) if result.flips else "–",
    "gained": lambda result: str(result.flips.wrong_right) if result.flips else "–",
    "p": lambda result: p_value(result.flips.p_value) if result.flips else "–",
}


@dataclass(frozen=True)
class TaskTable:
    """The cases on one task: headings and cells of the task's own metrics, and of the paired statistics.

    of: the metric that the statistics are of, None where there are none.
    """

    task: str
    results: list[TaskResult]

    @property
    def title(self) -> str:
        samples = max(result.samples for result in self.results)
        said = [plural(samples, "sample")] if samples else []
        if self.of and len(self.metrics) > 1:
            said.append(f"retention and flips: {self._short(self.of)}")
        return self.task + (f" ({'; '.join(said)})" if said else "")

    @property
    def of(self) -> str | None:
        return self.results[0].metric if any(result.flips for result in self.results) else None

    @property
    def metrics(self) -> dict[str, Callable[[TaskResult], str]]:
        names = dict.fromkeys(name for result in self.results for name in result.metrics)
        return {self._short(name): _value_of(name) for name in names}

    @property
    def statistics(self) -> dict[str, Callable[[TaskResult], str]]:
        return STATISTICS if self.of else {}

    def _short(self, metric: str) -> str:
        """A metric without the name of the task, with which most begin."""
        return metric.removeprefix(f"{self.task}_")


def _value_of(metric: str) -> Callable[[TaskResult], str]:
    return lambda result: f"{result.metrics[metric]:.4g}" if metric in result.metrics else "–"


def tables_of(comparison: Comparison) -> list[TaskTable]:
    tasks = dict.fromkeys(result.task for result in comparison.tasks)
    return [TaskTable(task, [result for result in comparison.tasks if result.task == task]) for task in tasks]


def task_tables(comparison: Comparison) -> Iterator[Table]:
    """For each task its own scores of each case, and retention and flips; nothing without tasks."""
    for one in tables_of(comparison):
        if len(one.metrics) <= SIDE_BY_SIDE:
            yield _table(one, one.title, one.metrics | one.statistics)
        else:
            yield _table(one, one.title, one.metrics)
            if one.statistics:
                yield _table(one, "", one.statistics)


def _table(one: TaskTable, title: str, columns: dict[str, Callable[[TaskResult], str]]) -> Table:
    table = plain_table(title)
    table.add_column("method", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for result in one.results:
        cells = (cell(result) for cell in columns.values())
        table.add_row(str(result), *cells, style="bold" if result.case.is_baseline else "")
    return table
