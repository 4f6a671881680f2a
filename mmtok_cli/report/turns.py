"""The turns of conversations: their registry of columns, tables for the terminal, and notes on how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mmtok_cli.report.cells import Cell, CsvColumn, Value, retention_cell, speedup_cell
from mmtok_cli.report.tables import add_names, encoded_text, narrow_text, plain_table
from mmtok_cli.report.units import number, plural, seconds, share, size

if TYPE_CHECKING:
    from mmtok_cli.results.records import TurnRun
    from mmtok_cli.results.schema import Comparison, Speedup, TurnResult

SHOWN_TURNS = 4  # in the terminal, which is narrow
INTERVAL = len("1.44–1.48")
TURN_STAGES = {"select": "select", "prefill": "prefill", "ttft": "TTFT", "total": "total"}
POLICIES = {
    "reuse": "reuse: tokens selected for the first question stay in the KV cache, and later questions are appended",
    "reselect": "reselect: tokens are selected again for each question, and the conversation is prefilled again",
    "union": "union: newly selected tokens join those kept before, and the conversation is prefilled again",
}


@dataclass(frozen=True)
class TurnColumn(CsvColumn["TurnResult"]):
    """A column of the CSV; one with a heading is in the tables as well. show, cell: as in `cells.Column`."""

    heading: str = ""
    show: Callable[[Any], str] = str
    cell: Callable[[TurnResult], Cell] | None = None

    def cell_of(self, result: TurnResult) -> Cell:
        """What a turn has in this column; a dash where there is nothing."""
        value = self.value(result)
        if value is None:
            return Cell()
        return self.cell(result) if self.cell else Cell(self.show(value), value)


def turn_title(result: TurnResult) -> str:
    """ "1", or "all" for all turns together."""
    return "all" if result.turn is None else str(result.turn)


def _stage(stage: str, heading: str = "") -> Iterator[TurnColumn]:
    times = f"seconds of {stage}"
    yield TurnColumn(f"{stage}_median_s", times, lambda r: r.seconds[stage].median, heading=heading, show=seconds)
    yield TurnColumn(f"{stage}_p10_s", f"{times}, 10th percentile", lambda r: r.seconds[stage].p10)
    yield TurnColumn(f"{stage}_p90_s", f"{times}, 90th percentile", lambda r: r.seconds[stage].p90)


def _speedup(stage: str, words: str) -> Iterator[TurnColumn]:
    def of(value: Callable[[Speedup], float | None]) -> Callable[[TurnResult], Value]:
        return lambda result: value(result.speedup[stage]) if stage in result.speedup else None

    name, meaning = f"speedup_{stage}", f"speedup of {stage}, paired within conversations"
    yield TurnColumn(
        f"{name}_median",
        meaning,
        of(lambda speedup: speedup.median),
        heading=f"speedup ({words})",
        cell=lambda result: speedup_cell(result.speedup.get(stage)),
    )
    yield TurnColumn(f"{name}_low", f"{meaning}, lower end of the 95 % interval", of(lambda speedup: speedup.low))
    yield TurnColumn(f"{name}_high", f"{meaning}, upper end of the 95 % interval", of(lambda speedup: speedup.high))


POLICY = TurnColumn(
    "turn_policy", "vision tokens at later turns: reuse, reselect or union", lambda r: r.policy, heading="turns"
)
TURN = TurnColumn(
    "turn", "turn of the conversations, from 1, or all; empty in rows of cases", turn_title, heading="turn"
)
KEPT = TurnColumn(
    "kept_tokens",
    "vision tokens after the last reduction, of those of the image",
    lambda result: result.tokens.kept,
    heading="kept",
    cell=lambda r: Cell(f"{number(round(r.tokens.kept, 1))}/{number(round(r.tokens.total, 1))}", r.tokens.kept),
)
SCORE = TurnColumn("score", "mean score over the questions", lambda r: r.score, heading="score", show=share)
RETENTION = TurnColumn(
    "retention",
    "score / score of the unreduced model in the same turn, 95 % interval over images",
    lambda result: result.retention,
    heading="retention",
    cell=retention_cell,
)
SAME = TurnColumn(
    "same", "share of answers identical to the unreduced model's", lambda r: r.same, heading="same", show=share
)
TTFT, TTFT_P10, TTFT_P90 = _stage("ttft", "TTFT")
TTFT_SPEEDUP, *TTFT_BOUNDS = _speedup("ttft", "TTFT")
TOTAL, TOTAL_P10, TOTAL_P90 = _stage("total", "total")
TOTAL_SPEEDUP, *TOTAL_BOUNDS = _speedup("total", "total")
CACHE = TurnColumn("kv_cache_bytes", "KV cache after the answer", lambda r: r.kv_cache, heading="KV cache", show=size)
ENCODED = TurnColumn(
    "encoder_output_bytes",
    "outputs of the vision encoder kept in memory for later turns",
    lambda result: result.encoder_outputs,
    heading="encoder outputs",
    show=size,
)

TURN_COLUMNS: tuple[TurnColumn, ...] = (
    POLICY,
    TURN,
    TurnColumn("conversations", "conversations that have the turn", lambda result: result.conversations),
    KEPT,
    SCORE,
    RETENTION,
    TurnColumn("retention_low", "retention, lower end of the 95 % interval", lambda result: result.retention_low),
    TurnColumn("retention_high", "retention, upper end of the 95 % interval", lambda result: result.retention_high),
    SAME,
    TurnColumn("total_tokens", "vision tokens of the image", lambda result: result.tokens.total),
    TurnColumn("layer_average_tokens", "vision tokens per decoder layer", lambda result: result.tokens.layer_average),
    TurnColumn("text_tokens", "text tokens of the conversation", lambda r: r.tokens.text, heading="text", show=number),
    TurnColumn("new_tokens", "tokens decoded", lambda result: result.tokens.new),
    *_stage("prepare"),
    *_stage("encode"),
    *_stage("select", "select"),
    *_stage("prefill", "prefill"),
    *_speedup("prefill", "prefill"),
    *(TTFT, TTFT_P10, TTFT_P90, TTFT_SPEEDUP, *TTFT_BOUNDS),
    *_stage("decode"),
    *(TOTAL, TOTAL_P10, TOTAL_P90, TOTAL_SPEEDUP, *TOTAL_BOUNDS),
    CACHE,
    ENCODED,
)


def shown_columns(comparison: Comparison) -> list[TurnColumn]:
    """The columns of the tables, one row for each turn; those that have a value anywhere."""
    return [
        column
        for column in TURN_COLUMNS
        if column.heading and any(column.value(result) is not None for result in comparison.turns)
    ]


def turn_tables(comparison: Comparison) -> list[Table]:
    """Scores, retention and time turn by turn, then all turns together; nothing without conversations."""
    if not comparison.turns:
        return []
    held = plural(max(result.conversations for result in comparison.turns), "conversation")
    if any(result.score is not None for result in comparison.turns):
        tables = [
            _by_turn(f"Score per turn ({held})", comparison, SCORE),
            _by_turn("Retention per turn", comparison, replace(RETENTION, cell=_short_retention)),
        ]
    else:
        tables = [_by_turn(f"Answers identical to the unreduced model's, per turn ({held})", comparison, SAME)]
    tables.append(_by_turn("Time to first token per turn", comparison, TTFT, beside=(TTFT_SPEEDUP,)))
    whole = (TOTAL, TOTAL_SPEEDUP, SAME, CACHE, ENCODED)
    return [*tables, _by_turn("Whole conversations", comparison, None, beside=whole)]


def _short_retention(result: TurnResult) -> Cell:
    """Retention with an interval in whole percent, for narrow columns."""
    cell, low, high = retention_cell(result), result.retention_low, result.retention_high
    return cell if low is None or high is None else replace(cell, interval=f"{100 * low:.0f}–{100 * high:.0f}")


def _by_turn(title: str, comparison: Comparison, column: TurnColumn | None, beside: Sequence[TurnColumn] = ()) -> Table:
    """A row for each case and policy: a column of each turn and of all together, then others of all together."""
    turns = [number for number in dict.fromkeys(result.turn for result in comparison.turns) if number is not None]
    shown: list[int | None] = [*turns[: SHOWN_TURNS - len(beside)], None] if column else []
    table = plain_table(title)
    table.padding = (0, 0 if beside else 1, 0, 0)
    add_names(table, [str(result) for result in comparison.turns])
    for heading in (KEPT.heading, POLICY.heading):
        table.add_column(heading, justify="right", no_wrap=True)
    for turn in shown:
        table.add_column("all" if turn is None else f"turn {turn}", justify="right")
    for each in beside:
        table.add_column(
            each.heading, justify="right", min_width=INTERVAL if each.heading.startswith("speedup") else None
        )
    rows: dict[tuple[str, str | None], dict[int | None, TurnResult]] = {}
    for result in comparison.turns:
        rows.setdefault((str(result), result.policy), {})[result.turn] = result
    for by_turn in rows.values():
        whole = by_turn[None]
        cells = [column.cell_of(by_turn[turn]) if turn in by_turn else Cell() for turn in shown] if column else []
        cells += [each.cell_of(whole) for each in beside]
        style = "bold" if whole.case.is_baseline else ""
        names = str(whole), str(KEPT.cell_of(whole)), whole.policy or "–"  # kept does not show the budget of a union
        table.add_row(*names, *map(narrow_text, cells), style=style)
    return table


def conversation_table(name: str, turns: Sequence[TurnRun]) -> Table:
    """Tokens, seconds and memory of each turn of one conversation. name: of its case."""
    table = plain_table(name)
    for heading in ("turn", "kept", "text", "new", *TURN_STAGES.values(), CACHE.heading):
        table.add_column(heading, justify="right", no_wrap=True)
    keeping = any(turn.encoder_outputs for turn in turns)
    if keeping:
        table.add_column(ENCODED.heading, justify="right")
    smaller = any(turn.tokens.encoded for turn in turns)
    if smaller:
        table.add_column("tokens encoded", justify="right")
    for place, turn in enumerate(turns, 1):
        table.add_row(
            *(str(place), f"{turn.tokens.kept}/{turn.tokens.total}", str(turn.tokens.text), str(turn.steps)),
            *(seconds(turn.seconds[stage]) for stage in TURN_STAGES),
            size(turn.kv_cache),
            *([size(turn.encoder_outputs)] if keeping else []),
            *([encoded_text(turn.tokens)] if smaller else []),
        )
    return table


def turn_notes(comparison: Comparison) -> list[str]:
    """How to read the tables of conversations."""
    if not comparison.turns:
        return []
    used = dict.fromkeys(result.policy for result in comparison.turns if result.policy)
    notes = [
        "conversations are held one at a time, each with its own earlier answers; "
        + "; ".join(POLICIES[policy] for policy in used),
        "per turn: score: mean over the questions; retention: against the unreduced model's conversation, with a 95 % "
        "interval over images; kept tokens and KV cache: after the last turn; speedups are paired within conversations",
    ]
    if any(result.encoder_outputs for result in comparison.turns):
        notes.append(
            "encoder outputs: what is kept in memory between turns, so that images are encoded once; --encode-again "
            "keeps nothing and encodes them again"
        )
    return notes
