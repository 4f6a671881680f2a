"""Pictures looked at by a program, and figures for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from comparisons import case
from comparisons import comparison as usual_comparison
from PIL import Image
from rich.console import Console

from mmtok_cli.report.catalogues import kept_map, method_details
from mmtok_cli.report.checks import comparison_notes
from mmtok_cli.report.overlay import FIRST_FRAME, FRAME, overlay
from mmtok_cli.report.profiles import wrapped_table
from mmtok_cli.report.tables import comparison_tables, cost_and_fidelity_table, layer_notes, rules_text
from mmtok_cli.report.units import count, number, seconds, size, spread
from mmtok_cli.results.schema import (
    CaseId,
    CaseResult,
    Comparison,
    Environment,
    Fidelity,
    Memory,
    Record,
    Schedule,
    Times,
    Tokens,
)
from mmtok_cli.rules import Rules

USUAL = Rules()


def grid_boxes(cells: int, width: int) -> list[tuple[float, float, float, float]]:
    return [(c * width, r * width, (c + 1) * width, (r + 1) * width) for r in range(cells) for c in range(cells)]


def test_overlay_dims_what_was_dropped_and_frames_what_was_kept() -> None:
    image = Image.new("RGB", (720, 720), (80, 160, 240))
    drawn = overlay(image, grid_boxes(6, 120), kept=[0, 14], order=[14, 0], mark=1)
    assert drawn.size == (720, 720)
    assert drawn.getpixel((60, 60)) == (80, 160, 240)  # kept
    assert drawn.getpixel((0, 60)) == FRAME
    assert drawn.getpixel((240, 300)) == FIRST_FRAME  # the first pick
    assert max(drawn.getpixel((660, 660))) < 100  # dropped
    assert drawn.getpixel((300, 250)) == (80, 160, 240)  # kept, beside its number


def test_overlay_leaves_padding_out() -> None:
    image = Image.new("RGB", (720, 360), (80, 160, 240))
    boxes = [(left, top - 180, right, bottom - 180) for left, top, right, bottom in grid_boxes(6, 120)]
    drawn = overlay(image, boxes, kept=[0, 12], order=None)
    assert drawn.size == (720, 360)
    assert drawn.getpixel((0, 100)) == FRAME and max(drawn.getpixel((300, 10))) < 100


def test_long_names_wrap_in_a_narrow_terminal_and_cut_off_no_figure() -> None:
    named = {"method": "random:inside", "parameters": {"seed": 2}, "repeat": 3, "image_scale": 0.75}
    drawn, replayed = case("random:inside", 64), case("kept", 64)
    file = {"budget": None, "parameters": {"file": "/data/selections-of-a-paper.safetensors", "digest": "0"}}
    cases = [case("full", 576)] + [
        one.model_copy(update={"case": one.case.model_copy(update=described)})
        for one, described in ((drawn, named), (replayed, file))
    ]
    for table in comparison_tables(usual_comparison(cases)):
        text = shown(table, 80)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        assert "64/576" in text


def test_kept_map() -> None:
    lines = kept_map((2, 3), [0, 5], [5, 0], 1, [True] * 3 + [False, True, True]).plain.split("\n")
    assert lines == [" ■  ·  · ", "    ·  1 "]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-6, "2 µs"), (0.0123, "12.3 ms"), (0.4567, "457 ms"), (1.234, "1.23 s"), (456.7, "457 s"), (0.99996, "1 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_units() -> None:
    assert spread(0.0154, 0.0106, 0.0177) == "15.4 ms (10.6–17.7)"
    assert (size(None), size(512), size(2.5 * 2**20), size(3 * 2**40)) == ("–", "512 B", "2.5 MiB", "3072 GiB")
    assert (count(950), count(2.05e6), count(8.45e12)) == ("950", "2.05 M", "8.45 T")
    assert (count(999.7e6), size(999.7 * 1024)) == ("1 G", "0.976 MiB")
    assert (number(64.0), number(57.25)) == ("64", "57.2")


def shown(table: Any, width: int = 84) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def result(method: str, kept: float, average: float, overhead: float = 0.02) -> CaseResult:
    stages = ("prepare", "encode", "select", "prefill", "decode", "ttft", "total")
    return CaseResult(
        case=CaseId(method=method, parameters={}, budget=None if method == "full" else f"{kept:.0f}"),
        positions="renumber",
        tokens=Tokens(total=576, kept=kept, text=20, layer_average=average, new=2),
        seconds={stage: Times(median=1, p10=1, p90=1, values=[1]) for stage in stages},
        speedup={},
        overhead=overhead,
        memory=Memory(peak=8 * 2**30, kv_cache=int(1.21 * 2**30), host=1),
        flops={"total": 8.45e12},
        score=1.0,
        retention=1.0,
        fidelity=Fidelity(kl=0.012, top1=1.0),
    )


def required(kind: type[Record]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if field.is_required()]


def comparison(results: Sequence[CaseResult] = (), rules: Rules = USUAL) -> Comparison:
    environment = dict.fromkeys(required(Environment), "x") | {
        "git_dirty": False,
        "threads": 1,
        "command": [],
        "layers": None,
    }
    schedule = dict.fromkeys(required(Schedule), 1) | {"data": "demo", "data_digest": "x", "order": []}
    schedule |= {"metric": None, "metric_title": None}
    return Comparison(
        model="x",
        rules=rules,
        environment=Environment(**environment),
        schedule=Schedule(**schedule),
        interrupted=False,
        results=list(results),
    )


def test_layer_average_is_shown_where_it_differs() -> None:
    before = comparison([result("full", 576, 576), result("mmtok", 64, 64)])
    assert "avg" not in shown(cost_and_fidelity_table(before)) and not layer_notes(before.results)
    inside = comparison([*before.results, result("random:inside", 64, 295.68), result("sparsevlm:v2", 20, 81.75)])
    lines = shown(cost_and_fidelity_table(inside), width=80).splitlines()
    assert "avg" in lines[2] and "295.7" in lines[6] and "81.8" in lines[7]
    assert not any("…" in line for line in lines)
    assert any(note.startswith("layer average (avg)") for note in comparison_notes(inside))


def test_overhead_is_that_of_the_costliest_budget() -> None:
    results = [result("full", 576, 576, 0.5), result("mmtok", 64, 64, 0.04), result("mmtok", 128, 128, 0.181)]
    notes = comparison_notes(comparison([*results, result("fastv", 64, 64, 0.02)]))
    assert "selection overhead, as a share of encode and prefill: mmtok 18.1 %, fastv 2.0 %" in notes


def test_rules_in_words() -> None:
    assert rules_text(Rules()) == ""
    assert rules_text(Rules("harmonised", "keep")) == "harmonised track, positions kept"
    said = rules_text(Rules(positions="renumber", budget_means="layer-average"), ["fastv.layer=1"])
    assert said == "positions renumbered, budgets are layer averages, fastv.layer=1"


def test_details_of_a_method() -> None:
    method = {
        "name": "random:inside",
        "summary": "tokens drawn at random after a few layers",
        "source": "arXiv 2403.06764",
        "venue": "ECCV 2024",
        "licence": "",
        "checked": "recorded outputs",
        "acts": "inside the language model",
        "reads_question": True,
        "training_free": True,
        "multi_turn": False,
        "positions": "keep",
        "keeps_padding": True,
        "signals": ["class_attention"],
        "alternative_signals": [["received_attention", "mean_keys"]],
        "parameters": {"layer": 2},
        "expected": {"layer": "a whole number"},
        "settings": {"layer": "random:inside.layer=2"},
        "description": "Draws.",
    }
    details = " ".join(shown(method_details(method)).split())
    assert (
        "positions kept on the released track" in details and "padding can be selected on the released track" in details
    )
    assert "signals class_attention or received_attention, mean_keys" in details
    assert "published ECCV 2024 licence of the authors' release: not stated checked against recorded outputs" in details
    assert "layer a whole number; default: --set random:inside.layer=2" in details


def test_tables_of_a_narrow_terminal_cut_nothing_off() -> None:
    stages = ["draft", "prepare", "encode", "select", "prefill", "first token", "decode", "total"]
    rows = [("mmtok + draft @ 8", *(f"{33.3 + i} ms" for i in range(len(stages))))]
    for width in (80, 100):
        lines = shown(wrapped_table("Seconds", stages, rows), width)
        assert "…" not in lines and all(str(cell) in lines for cell in rows[0][1:])
        assert {word for stage in stages for word in stage.split()} <= set(lines.split())
