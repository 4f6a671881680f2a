"""The result of a search for budgets: the answer in a line, the table behind it, its curve, and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from mmtok_cli.errors import MMTokError
from mmtok_cli.report.cells import Value
from mmtok_cli.report.csv_export import without_formula
from mmtok_cli.report.tables import environment_line, plain_table, rules_text
from mmtok_cli.report.text import printable_record
from mmtok_cli.report.units import duration, number, plural, ratio, share, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mmtok_cli.results.retention import Decision, Retention, Tried
    from mmtok_cli.results.schema import Speedup

EXPORTS = (".json", ".csv", ".md")
VERDICTS = {"kept": "kept", "lost": "not kept", "open": "undecided"}


def answer_lines(found: Retention) -> list[str]:
    """One sentence for each method, and for each group that has a budget of its own."""
    if found.metric and not found.baseline_score:
        return [
            f"the unreduced model has a score of 0 on {plural(found.samples, 'sample')}: it cannot do this task, so "
            "there is nothing to keep"
        ]
    lines = []
    for method in dict.fromkeys(one.method for one in found.decisions):
        mine = [one for one in found.decisions if one.method == method]
        lines += _grouped(found, mine) if mine[0].group else [_sentence(found, mine[0])]
    return lines


def _sentence(found: Retention, decision: Decision) -> str:
    """What is known of one method, in words to paste."""
    of = f" in {decision.group}" if decision.group else ""
    if decision.failure:
        return f"{decision.method} cannot be run: {decision.failure}"
    one = decision.found
    if one is None:
        best = decision.tried[0] if decision.tried else None
        tried = f"; at {_kept(best)} it {_interval(best, found)}" if best and best.retention is not None else ""
        return f"{decision.method}: no budget is shown to keep {share(found.target)}{of}{tried}{_more(best)}"
    return f"{decision.method} at {_kept(one)} {_interval(one, found)}{of}{_faster(_speedup(found, decision))}"


def _faster(speedup: Speedup | None) -> str:
    """What the budget found does to the time to the first token, as far as that is sure."""
    if speedup is None:
        return ""
    factor = f"{ratio(speedup.median)}x"
    if speedup.low is None or speedup.high is None:
        return f"; speedup to the first token {factor}, from too few rounds for an interval"
    interval = f"({ratio(speedup.low)}–{ratio(speedup.high)})"
    if speedup.low > 1:
        return f" and makes the first token {factor} faster {interval}"
    sure = "slower" if speedup.high < 1 else "inconclusive"
    return f"; speedup to the first token {factor} {interval}, {sure}"


def _grouped(found: Retention, decisions: list[Decision]) -> list[str]:
    """The budget for all groups and which of them needs it, then those of each group."""
    method, budget = decisions[0].method, found.budget_of(decisions[0].method)
    needs = ", ".join(f"{one.group} {one.budget}" if one.budget else f"none for {one.group}" for one in decisions)
    if budget is None:
        open_groups = [one.group for one in decisions if one.budget is None]
        head = f"{method}: no budget is shown to keep {share(found.target)} in {', '.join(map(str, open_groups))}"
    else:
        head = f"{method} at {budget} keeps {share(found.target)} in every kind"
        limiting = found.limiting(method)
        if len(limiting) < len(decisions):  # otherwise all need the same budget
            head += f"; {' and '.join(limiting)} limit{'s' * (len(limiting) == 1)} it"
        one = next(one for one in decisions if one.budget == budget)
        head += _faster(_speedup(found, one))
    return [f"{head} (budgets by kind: {needs})"]


def note_lines(found: Retention) -> list[str]:
    """What the numbers mean, what is not decided, what it took, and how to repeat it."""
    notes = [
        f"retention: {found.measure}, as a share of the unreduced model's, on the same samples. Each bound holds with "
        "97.5 % at any number of samples. kept: the lower bound reaches the target, not kept: the upper bound is below "
        "it; an answer is wrong with a probability of 5 % at most, if larger budgets keep more"
    ]
    for decision in found.decisions:
        where = f" in {decision.group}" if decision.group else ""
        if decision.found and (next_one := decision.undecided):
            notes.append(
                f"{decision.method}{where}: {next_one.case.budget} is not decided with "
                f"{plural(next_one.samples, 'sample')} ({_bounds(next_one)}){_more(next_one)}"
            )
    used = f"{found.samples:,} of {found.available:,} samples"
    notes.append(
        f"the search took {found.runs:,} answers of the model on {used}, {duration(found.seconds)}; every budget on as "
        f"many samples would take {found.grid_runs:,}"
    )
    if any(map(_layers_differ, found.decisions)):
        notes.append(
            "avg: vision tokens per decoder layer; methods inside the language model process all tokens in its first "
            "layers"
        )
    notes.append(f"repeat it with: {found.command}")
    if found.interrupted:
        notes.append("interrupted: not all budgets were tried, and the times may be missing")
    return [*notes, *found.left_out[:3]]


def _layers_differ(decision: Decision) -> bool:
    return any(abs(one.layer_average - one.kept) > 0.5 for one in decision.tried)


def _kept(one: Tried) -> str:
    tokens = number(round(one.kept, 1))
    budget = one.case.budget or ""
    at = f"{budget} ({tokens} of {number(round(one.total, 1))} tokens)" if budget.endswith("%") else ""
    return at or f"{tokens} of {number(round(one.total, 1))} tokens"


def _interval(one: Tried, found: Retention) -> str:
    what = "the agreement" if found.metric is None else "the accuracy" if found.measure == "accuracy" else "the score"
    return f"keeps {share(one.retention)} ({_bounds(one)}) of {what}"


def _bounds(one: Tried) -> str:
    return f"{shares(one.low)}–{shares(one.high)}" if one.high is not None else f"at least {shares(one.low)}"


def _more(one: Tried | None) -> str:
    more = one.samples_needed if one else None
    return f"; about {more:,} more {'is' if more == 1 else 'are'} needed" if more else ""


def _speedup(found: Retention, decision: Decision) -> Speedup | None:
    """The speedup (TTFT) of the budget that is timed."""
    if found.timing is None:
        return None
    for result in found.timing.results:
        if result.case.method == decision.method and result.case.budget == decision.budget:
            return result.speedup.get("ttft")
    return None


@dataclass(frozen=True)
class RetentionColumn:
    """A column of the table and of the CSV. name, meaning: of the CSV. show: None where the table leaves it out."""

    name: str
    meaning: str
    value: Callable[[Retention, Decision, Tried], Value]
    heading: str = ""
    show: Callable[[Tried], str] | None = None


COLUMNS = (
    RetentionColumn("method", "name of the method", lambda f, d, t: d.method),
    RetentionColumn("parameters", "of the method, as JSON", lambda f, d, t: json.dumps(t.case.parameters)),
    RetentionColumn("group", "kind of question, with --by kind", lambda f, d, t: d.group),
    RetentionColumn("budget", "vision tokens to keep, as tried", lambda f, d, t: t.case.budget),
    RetentionColumn(
        "kept", "vision tokens kept, mean", lambda f, d, t: t.kept, "kept", lambda t: number(round(t.kept, 1))
    ),
    RetentionColumn("total", "vision tokens of the image, mean", lambda f, d, t: t.total),
    RetentionColumn(
        "layer_average",
        "vision tokens per decoder layer, mean",
        lambda f, d, t: t.layer_average,
        "avg",
        lambda t: number(round(t.layer_average, 1)),
    ),
    RetentionColumn(
        "samples", "samples that it was tried on", lambda f, d, t: t.samples, "samples", lambda t: f"{t.samples:,}"
    ),
    RetentionColumn(
        "retention",
        "score / score of the unreduced model",
        lambda f, d, t: t.retention,
        "retention",
        lambda t: f"{share(t.retention)} ({_bounds(t)})",
    ),
    RetentionColumn("retention_low", "its lower bound", lambda f, d, t: t.low),
    RetentionColumn("retention_high", "its upper bound", lambda f, d, t: t.high),
    RetentionColumn(
        "verdict",
        "kept, lost or open",
        lambda f, d, t: t.verdict,
        "verdict",
        lambda t: VERDICTS[t.verdict],
    ),
    RetentionColumn(
        "samples_needed",
        "about how many more samples a verdict takes",
        lambda f, d, t: t.samples_needed,
    ),
    RetentionColumn("is_answer", "1 for the smallest budget found", lambda f, d, t: int(t is d.found)),
    RetentionColumn(
        "speedup_ttft",
        "of the time to the first token, of the budget found",
        lambda f, d, t: speedup.median if t is d.found and (speedup := _speedup(f, d)) else None,
    ),
    RetentionColumn("target", "share to be kept", lambda f, d, t: f.target),
    RetentionColumn("metric", "how answers are scored; empty: agreement", lambda f, d, t: f.metric),
    RetentionColumn("model", "name of the model", lambda f, d, t: f.model),
    RetentionColumn("data", "dataset", lambda f, d, t: f.data),
    RetentionColumn("seed", "random seed", lambda f, d, t: f.seed),
)


def _rows(found: Retention) -> Iterator[tuple[Decision, Tried]]:
    return ((decision, one) for decision in found.decisions for one in decision.tried)


def _shown_columns(found: Retention) -> list[RetentionColumn]:
    layers = any(map(_layers_differ, found.decisions))
    return [column for column in COLUMNS if column.show and (layers or column.name != "layer_average")]


def retention_table(found: Retention) -> Table:
    """A row for each budget that was tried; the answers are bold."""
    table = plain_table(f"Budgets tried (target: {share(found.target)} of {found.measure})")
    grouped = any(decision.group for decision in found.decisions)
    table.add_column("method", no_wrap=True)
    if grouped:
        table.add_column("kind")
    table.add_column("budget", justify="right", no_wrap=True)
    columns = _shown_columns(found)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    before = None
    for decision, one in _rows(found):
        names = [decision.method, *([decision.group or ""] if grouped else [])]
        head = names if before is not decision else [""] * len(names)
        before = decision
        cells = [column.show(one) for column in columns if column.show]
        table.add_row(*head, one.case.budget or "", *cells, style="bold" if one is decision.found else "")
    return table


def write_retention(found: Retention, path: Path) -> None:
    """Write the result in the format of the file's suffix. Raises MMTokError for one that is none of EXPORTS."""
    from mmtok_cli.report.exports import write_text

    write_text(found, path, {".csv": lambda: csv_text(found), ".md": lambda: markdown_text(found)})


def csv_text(found: Retention) -> str:
    """One row for each budget that was tried."""
    found = printable_record(found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in COLUMNS])
    for decision, one in _rows(found):
        writer.writerow([without_formula(column.value(found, decision, one)) for column in COLUMNS])
    return out.getvalue()


def markdown_text(found: Retention) -> str:
    """The answers, the table and what they rest on."""
    from mmtok_cli.report.exports import escaped

    found = printable_record(found)
    columns = _shown_columns(found)
    lines = [f"- {escaped(line)}" for line in answer_lines(found)]
    lines += ["", "| method | budget | " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("| :--- |" + " ---: |" * (len(columns) + 1))
    for decision, one in _rows(found):
        name = f"{decision.method} ({decision.group})" if decision.group else decision.method
        cells = [name, one.case.budget or "", *(column.show(one) for column in columns if column.show)]
        lines.append("| " + " | ".join(map(escaped, cells)) + " |")
    notes = [conditions(found), *note_lines(found)]
    return "\n".join([*lines, "", "\n\n".join(map(escaped, notes)), ""])


def conditions(found: Retention) -> str:
    """What the search was run on."""
    rules = rules_text(found.rules)
    return (
        f"{environment_line(found.model, found.environment).plain}; {found.data}: "
        f"{plural(found.samples, 'sample')}, seed {found.seed}" + (f"; {rules}" if rules else "")
    )


def save_curve(found: Retention, path: Path) -> None:
    """Plot the retention of each budget that was tried, with its interval, and the target."""
    from mmtok_cli.report.plots import drawing

    groups: dict[str, list[Tried]] = {}
    for decision, one in _rows(found):
        if one.retention is not None:
            name = f"{decision.method}, {decision.group}" if decision.group else decision.method
            groups.setdefault(name, []).append(one)
    if not groups:
        raise MMTokError("there is nothing to plot: no budget was tried", "omit --plot")
    with drawing(path, WIDTH, HEIGHT) as figure:
        _draw_curve(figure.add_subplot(), found, groups)


def _draw_curve(axes: Axes, found: Retention, groups: dict[str, list[Tried]]) -> None:
    from mmtok_cli.report.plots import plain

    for place, (name, tried) in enumerate(groups.items()):
        tried.sort(key=lambda one: one.kept)
        kept, middle = [one.kept for one in tried], [100 * (one.retention or 0) for one in tried]
        low = [100 * one.low for one in tried]
        high = [100 * (one.high if one.high is not None else 1.5) for one in tried]
        shape = f"{MARKERS[place % len(MARKERS)]}{LINES[place % len(LINES)]}"
        axes.plot(kept, middle, shape, color=f"C{place}", label=plain(name), markersize=5)
        axes.fill_between(kept, low, high, color=f"C{place}", alpha=0.15, linewidth=0)
    axes.axhline(100 * found.target, color="black", linewidth=1, linestyle=":", label=f"target {share(found.target)}")
    for decision in found.decisions:
        if answer := decision.found:
            axes.plot(
                answer.kept, 100 * (answer.retention or 0), "o", markersize=11, markerfacecolor="none", color="black"
            )
    kept = sorted({round(one.kept) for tried in groups.values() for one in tried})
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(16) if kept[0] <= 2**power <= kept[-1]] or kept[:1]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    lowest = min(one.low for tried in groups.values() for one in tried)
    axes.set_ylim(max(0.0, 100 * min(lowest, found.target) - 3), 106)
    axes.set(xlabel="vision tokens kept", ylabel=f"retention of {plain(found.measure)} [%]")
    axes.set_title(f"{plain(found.model)}, {plain(found.data)}; circles: smallest budget found", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


WIDTH, HEIGHT = 5.0, 3.2  # inches
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
