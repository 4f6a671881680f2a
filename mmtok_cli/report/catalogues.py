"""The catalogues of models and methods, and a map of kept tokens, in characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from mmtok_cli.report.tables import plain_table
from mmtok_cli.report.text import printable, printable_data
from mmtok_cli.report.units import count

if TYPE_CHECKING:
    from mmtok_cli.profiles import Profile

PLACES = {  # where methods act, for a narrow column
    "before the encoder": "image",
    "between encoder and language model": "tokens",
    "inside the language model": "layers",
}
READS = {(True, True): "both", (True, False): "question", (False, True): "encoder", (False, False): "–"}
METHODS_LEGEND = (
    "on: where the method acts: the image before the encoder, the tokens between encoder and language model, or layers "
    "of the language model. reads: the question, signals of the encoder such as its attention, or both. free: needs no "
    "training. turns: safe for a second question, because the selection does not depend on the first. `mmtok methods "
    "NAME` shows the details and parameters."
)
PAPERS_LEGEND = (
    "paper: number on arXiv. licence: of the authors' release. checked: against outputs recorded from the authors' "
    "code, or against the paper's description only."
)
NOT_STATED = "not stated"
BAR = 40  # characters of a slice of which everything is kept


def models_table(profiles: Sequence[Profile], here: Sequence[bool]) -> Table:
    """Known models, one line each; `here` says whose weights need no download. `models_legend` explains the rest."""
    table = plain_table()
    table.add_column("name")
    for heading in ("size", "tokens", "frame"):
        table.add_column(heading, justify="right")
    table.add_column("here")
    table.add_column("loaded from", overflow="fold")
    for profile, is_here in zip(profiles, here, strict=True):
        where = "this package" if profile.location.startswith("package:") else profile.location
        size = count(profile.parameters).replace(" G", " B")
        frame = "–" if profile.frame_tokens is None else f"{profile.frame_tokens:g}"
        table.add_row(profile.name, size, str(profile.vision_tokens), frame, yes_or_no(is_here), where)
    return table


def models_legend(profiles: Sequence[Profile]) -> str:
    """The headings of `models_table`, and the published budgets, which models of one kind share."""
    kinds: dict[tuple[str, tuple[str, ...]], str] = {}
    for profile in profiles:
        kinds.setdefault((profile.family, profile.budgets), profile.name.rpartition("-")[0] or profile.name)
    budgets = [f"{kind} {' '.join(each)}" for (_, each), kind in kinds.items()]
    return (
        "size: number of parameters. tokens: of one image; if that depends on its size, of one of 640 x 480. frame: of "
        "one frame of a video of this size, in models that see videos. "
        f"here: the weights are on this machine. Published budgets: {'; '.join(budgets)}."
    )


def methods_table(methods: Sequence[dict[str, Any]]) -> Table:
    """Methods, one line each; `METHODS_LEGEND` explains the headings."""
    table = plain_table()
    table.add_column("name", no_wrap=True)
    table.add_column("keeps")
    for heading in ("on", "reads", "free", "turns"):
        table.add_column(heading, no_wrap=True)
    for method in map(printable_data, methods):
        if "fault" in method:
            table.add_row(method["name"], "cannot be used, see below", *["–"] * 4)
            continue
        table.add_row(
            method["name"],
            method["summary"],
            ", ".join(short for place, short in PLACES.items() if place in method["acts"]) or "–",
            READS[bool(method["reads_question"]), bool(method["signals"])],
            *(yes_or_no(method[fact]) for fact in ("training_free", "multi_turn")),
        )
    return table


def papers_table(methods: Sequence[dict[str, Any]]) -> Table:
    """Where methods were published, one line each for those that were; `PAPERS_LEGEND` explains the headings."""
    table = plain_table()
    for heading in ("name", "paper", "published", "licence", "checked"):
        table.add_column(heading, no_wrap=heading in ("name", "paper"))
    for method in map(printable_data, methods):
        if method.get("source"):
            facts = (method[fact] or NOT_STATED for fact in ("venue", "licence", "checked"))
            table.add_row(method["name"], method["source"].removeprefix("arXiv "), *facts)
    return table


def method_details(method: dict[str, Any]) -> Table:
    """One method with its parameters."""
    paragraphs = method["description"].split("\n\n")
    method = printable_data(method) | {"description": "\n\n".join(map(printable, paragraphs))}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(method["name"], method["description"])
    table.add_row("paper", method["source"] or "–")
    if method["source"]:
        table.add_row("published", method["venue"] or NOT_STATED)
        table.add_row("licence", f"of the authors' release: {method['licence'] or NOT_STATED}")
        table.add_row("checked against", method["checked"] or NOT_STATED)
    table.add_row("acts", method["acts"])
    table.add_row("reads question", yes_or_no(method["reads_question"]))
    table.add_row("training-free", yes_or_no(method["training_free"]))
    table.add_row("multi-turn safe", yes_or_no(method["multi_turn"]))
    positions = "kept" if method["positions"] == "keep" else "renumbered"
    table.add_row("positions", f"{positions} on the released track")
    padding = "can be selected on the released track" if method["keeps_padding"] else "never selected"
    table.add_row("padding", padding)
    signals = " or ".join(", ".join(names) for names in (method["signals"], *method["alternative_signals"]))
    table.add_row("signals", signals or "none of the encoder")
    if not method["parameters"]:
        table.add_row("parameters", "none")
    for name, setting in method["settings"].items():
        table.add_row(name, f"{method['expected'][name]}; default: --set {setting}")
    return table


def yes_or_no(fact: bool) -> str:
    return "yes" if fact else "no"


def slices_table(slices: Sequence[tuple[str, int, int]]) -> Table:
    """How many vision tokens are kept of each slice in time of a video. slices: time, kept and total of each."""
    table = plain_table()
    table.add_column("time", justify="right")
    table.add_column("kept", justify="right")
    table.add_column()
    for time, kept, total in slices:
        table.add_row(time, f"{kept}/{total}", Text("█" * -(-BAR * kept // total), style="yellow"))
    return table


def kept_map(
    grid: tuple[int, int],
    indices: Sequence[int],
    order: Sequence[int] | None,
    mark: int,
    eligible: Sequence[bool],
    merged: Sequence[int] = (),
) -> Text:
    """The token grid: the first picks numbered, kept tokens as blocks, merged ones as hollow blocks, dropped ones as
    dots, padding left blank."""
    kept = set(indices)
    ranks = {index: rank for rank, index in enumerate(order[: min(mark, 99)] if order else (), start=1)}
    lines = []
    for row in range(grid[0]):
        line = Text()
        for i in range(row * grid[1], (row + 1) * grid[1]):
            if i in ranks:
                line.append(f"{ranks[i]:>2} ", style="bold red")
            elif i in kept:
                line.append(" □ " if i in merged else " ■ ", style="yellow")
            else:
                line.append(" · " if eligible[i] else "   ", style="dim")
        lines.append(line)
    return Text("\n").join(lines)
