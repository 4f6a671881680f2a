"""Comparisons made up for the tests of what is exported."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmtok_cli.report.page import Overlay, OverlayGroup
from mmtok_cli.results.schema import (
    CaseId,
    CaseResult,
    Comparison,
    Environment,
    Fidelity,
    Memory,
    Schedule,
    Score,
    Speedup,
    Times,
    Tokens,
)
from mmtok_cli.rules import Rules
from mmtok_cli.stages import STAGES
from mmtok_cli.timing.statistics import paired_speedup, summarise

HOSTILE = "<script>alert(1)</script>"

# What a terminal, a page, a sheet or Markdown would follow instead of showing it.
HOSTILE_TEXTS = {
    "escape sequence": "\x1b[2J\x1b]0;title\x07",
    "8-bit sequence": "\x9b2J",
    "newline": "a\nerror: forged",
    "carriage return": "a\rforged",
    "backspace": "abc\b\b\bxyz\x7f",
    "line separator": "a\u2028b\u2029c\x85d",
    "right-to-left override": "\u202egnp.exe\u202c\u2066\u2069\u200f",
    "invisible": "a\u200b\ufeff\u00ad\U000e0041",
    "markup": "[red]x[/red][/]",
    "script": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "attribute": "\"' onload=alert(3) onmouseover='alert(4)' x=\"",
    "address": "javascript:alert(5)//http://example.org/x.png",
    "template": "{{ 7 * 7 }}{% raw %}</style></title></svg><base href=//example.org>",
    "formula": '=HYPERLINK("http://x","y")',
    "table": "a|b`c`*d*$e$",
}


def is_harmless(text: str) -> bool:
    """Whether text holds no character that does anything but appear, except ends of lines."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text.replace("\n", ""))


ROUNDS = 8


def times(median: float) -> Times:
    """Times around a median, as they come out of a few rounds."""
    return summarise([median * (1 + (i - (ROUNDS - 1) / 2) / 50) for i in range(ROUNDS)])


def case(
    method: str,
    kept: int = 64,
    *,
    prefill: float = 0.005,
    right: int | None = 36,
    average: float | None = None,
    **changes: Any,
) -> CaseResult:
    """A case of 40 questions on an image of 576 tokens; `full` is the baseline. right: None for unlabelled samples."""
    baseline = method == "full"
    medians = {"prepare": 0.004, "encode": 0.02, "select": 0.002, "prefill": prefill, "decode": 0.003}
    medians |= {"ttft": sum(medians.values()) - medians["decode"], "total": sum(medians.values())}
    seconds = {stage: times(median) for stage, median in medians.items()}
    full = {"prefill": times(0.02), "ttft": times(0.046)}
    speedup = {stage: paired_speedup(full[stage].values, seconds[stage].values[::-1]) for stage in full}
    described = {
        "method": method,
        "parameters": {} if baseline else {"alpha": 0.5},
        "budget": None if baseline or not kept else str(kept),
    }
    of = {name: changes.pop(name) for name in ("parameters", "batch_size", "again", "run") if name in changes}
    fields: dict[str, Any] = {
        "case": CaseId(**(described | of)),
        "positions": "renumber",
        "tokens": Tokens(total=576, kept=kept, text=12.9, layer_average=average or kept, new=2),
        "seconds": seconds,
        "speedup": {} if baseline else speedup,
        "overhead": 0.08,
        "decode_tokens_per_second": 333.3,
        "memory": Memory(peak=None, kv_cache=4096 * (kept + 13), host=5 * 10**8),
        "flops": dict.fromkeys(STAGES, 1e9) | {"total": 5e9},
        "score": None if right is None else right / 40,
        "score_counts": None if right is None else Score(right=right, asked=40, by_kind={"count": (0, 8)}),
        "retention": None if right is None or baseline else right / 40,
        "fidelity": None if baseline else Fidelity(kl=0.0123, top1=0.9),
    }
    return CaseResult(**fields | changes)


def unmeasured(method: str, kept: int) -> CaseResult:
    """A case without figures."""
    return case(method, kept, seconds={}, speedup={}, score=None, score_counts=None, retention=None, fidelity=None)


def comparison(cases: Sequence[CaseResult], model: str = "demo") -> Comparison:
    environment = Environment(
        mmtok="0.1.0",
        git_commit="0123456789abcdef",
        git_dirty=False,
        python="3.11.7",
        torch="2.13.0",
        transformers="5.23.0",
        platform="Linux",
        processor="A Processor",
        device="cpu",
        weights="pretrained",
        dtype="float32",
        attention="sdpa",
        threads=2,
        command=["mmtok", "compare", "--budget", "64,16"],
    )
    schedule = Schedule(
        data="demo", seed=0, max_new_tokens=16, samples=40, batch_size=1, rounds=ROUNDS, warmup=1, order=[[0]]
    )
    return Comparison(
        model=model,
        rules=Rules(),
        environment=environment,
        schedule=schedule,
        interrupted=False,
        results=list(cases),
    )


def usual() -> Comparison:
    """Methods before and inside the language model, one with an inconclusive speedup, one that was not measured."""
    doubtful = Speedup(median=1.01, low=0.98, high=1.04, conclusive=False)
    return comparison(
        [
            case("full", 576, prefill=0.02, right=40),
            case("mmtok", 64, right=40),
            case("mmtok", 16, prefill=0.0041, right=39),
            case("fastv", 64, prefill=0.011, right=38, average=192),
            case("visionzip", 100, prefill=0.0062, right=9),
            case("slow", 8, prefill=0.1, right=35, speedup={"prefill": doubtful, "ttft": doubtful}),
            unmeasured("mmtok", 4),
        ]
    )


def overlays() -> list[OverlayGroup]:
    """Two pictures of one sample, with names that want to be markup."""
    pictures = [
        Overlay(f"{name} @ 16", Image.new("RGB", (720, 480), colour), HOSTILE)
        for name, colour in (("mmtok", (200, 30, 60)), ("random", (30, 60, 200)))
    ]
    return [OverlayGroup(f"What is this? {HOSTILE}", pictures)]
