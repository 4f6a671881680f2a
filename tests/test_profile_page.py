"""The page of a profile: what it says and draws, and that it opens in a browser without the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from comparisons import HOSTILE, HOSTILE_TEXTS, case, comparison, is_harmless
from test_page_in_browser import CHROMIUM, FLAGS, TEXT_COLOURS, contrast

from mmtok_cli.report.exports import write_profile
from mmtok_cli.report.page.profile import profile_page_text
from mmtok_cli.report.page.profile_charts import binary, memory_charts, scaling_plots, shares_of_ceilings
from mmtok_cli.report.profiles import launch_notes, profile_tables
from mmtok_cli.results.profile import (
    Achieved,
    Ceilings,
    Growth,
    KernelTime,
    MemoryTimeline,
    Operator,
    ProfileResult,
    ScalingPoint,
    StageSpan,
    launch_bound,
)
from mmtok_cli.stages import STAGES
from mmtok_cli.timing.traces import MOST_MOMENTS, timeline

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MIB = 2**20


def profile(method: str = "mmtok", **changes: Any) -> ProfileResult:
    """A profile of two cases with traces, ceilings and scaling, made up."""
    measured = comparison([case("full", 576, prefill=0.02), case(method, 64)], changes.pop("model", "demo"))
    cases = measured.results
    names = [str(each) for each in cases]
    spans = [StageSpan(stage=stage, start=i / 100, end=(i + 1) / 100) for i, stage in enumerate(STAGES)]
    ceilings = Ceilings(
        flops_per_second=1e12,
        bytes_per_second=2e10,
        dtype="float32",
        tf32=False,
        rows=1024,
        copied=256 * MIB,
        matmul_seconds=[0.002],
        copy_seconds=[0.02],
    )
    scaling = [
        ScalingPoint(
            case=each.case,
            tokens=tokens,
            kept=tokens if each.case.is_baseline else 64,
            select_seconds=tokens * 1e-6,
            prefill_seconds=tokens * 4e-5 if each.case.is_baseline else 0.004,
            select_values=[tokens * 1e-6] * 3,
            prefill_values=[0.004] * 3,
        )
        for tokens in (576, 1024, 2304)
        for each in cases
    ]
    fields: dict[str, Any] = {
        **measured.model_dump(include={"model", "rules", "environment", "schedule", "interrupted"}),
        "parameters": 2_000_000,
        "cases": cases,
        "stage_peaks": {names[0]: {"encode": 5 * MIB}},
        "memory": [
            MemoryTimeline(case=name, seconds=[0.01, 0.02, 0.04], bytes=[MIB, 5 * MIB, 0], stages=spans)
            for name in names
        ],
        "operators": [
            Operator(case=name, stage="encode", name="aten::mm", calls=3, cpu_seconds=0.01, device_seconds=0.0)
            for name in names
        ],
        "trace": "traces",
        "ceilings": ceilings,
        "weights_read": 3 * MIB,
        "achieved": [
            Achieved(case=each.case, flops_per_second={"encode": 5e11, "prefill": 2.5e11}, decode_bytes_per_second=1e9)
            for each in cases
        ],
        "scaling": scaling,
        "growth": [
            Growth(
                case=each.case,
                stage=stage,
                exponent=1.2,
                low=1.1,
                high=1.3,
                fixed_seconds=0.004,
                tokens=[576, 1024, 2304],
            )
            for each in cases
            for stage in ("select", "prefill")
        ],
    }
    return ProfileResult(**fields | changes)


def test_the_page_holds_every_part_of_a_profile() -> None:
    text = profile_page_text(profile(), ["times are medians"])
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert titles == [
        "Time per stage",
        "Memory over time",
        "Share of the device’s peak rates",
        "Top operators",
        "Against the number of vision tokens",
        "How to read this",
        "Measured on",
    ]
    assert "full: peak 5 MiB" in text and "aten::mm" in text and "1.20 (1.10–1.30)" in text and "A Processor" in text
    assert ">50.0 %<" in text and ">25.0 %<" in text and "500 G, 50%" in text  # as the terminal has it
    assert "Times are medians" in text and not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", text)


def test_stages_that_launches_hold_up_are_named_beside_their_speedup() -> None:
    """Medians of prefill: 20 ms unreduced and 5 ms reduced; of encode 20 ms."""
    plain = profile()
    full, ours = (each.case.label for each in plain.cases)

    def kernels(case: str, stage: str, seconds: float) -> KernelTime:
        return KernelTime(case=case, stage=stage, seconds=seconds, launches=1270)

    times = [kernels(full, "prefill", 0.0139), kernels(ours, "prefill", 0.0036), kernels(full, "encode", 0.019)]
    held = launch_bound(times, plain.cases)
    assert [(each.case, each.stage) for each in held] == [(full, "prefill")]  # 0.0036 is 72 %
    assert held[0].share == pytest.approx(0.0139 / 0.02) and held[0].launches == 1270
    marked = plain.model_copy(update={"kernels": times, "launch_bound": held})
    (note,) = launch_notes(marked)
    assert note.startswith("† prefill is bound by launches") and f"{full} 69.5 % (1270 launches)" in note
    cells = [str(cell) for column in profile_tables(marked)[0].columns for cell in column.cells]
    assert sum(cell.endswith("†") for cell in cells) == 1
    many = marked.model_copy(update={"cases": [*marked.cases, *profile("fastv").cases[1:]]})
    cells = [str(cell) for column in profile_tables(many)[1].columns for cell in column.cells]
    assert sum(cell.endswith("†") for cell in cells) == 2  # the baseline's stage counts for both
    assert launch_notes(plain) == [] and "†" not in profile_page_text(plain, [])
    # Of a part of the model, what was measured counts, not the estimate of the whole.
    part = [
        each.model_copy(update={"seconds": {**each.seconds, "measured_prefill": each.seconds["select"]}})
        for each in plain.cases
    ]
    assert launch_bound(times, part) == []


def test_a_page_of_a_profile_that_was_cut_short() -> None:
    """Without traces, ceilings and scaling, there are their times."""
    bare: dict[str, Any] = {"memory": [], "operators": [], "achieved": [], "scaling": [], "growth": []}
    text = profile_page_text(profile(**bare, stage_peaks={}, ceilings=None, interrupted=True))
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == ["Time per stage", "How to read this", "Measured on"]
    assert "· interrupted" in text and not re.search(r"\b(nan|inf|None)\b", text)


def test_memory_is_drawn_where_and_when_it_was_allocated() -> None:
    charts = memory_charts(profile().memory)
    assert [chart.case for chart in charts] == ["full", "mmtok @ 64"] and charts[0].x == charts[1].x
    first = charts[0]
    assert [band.stage for band in first.bands] == list(STAGES)
    assert all(one.right == pytest.approx(two.left) for one, two in pairwise(first.bands))
    x, y = first.x.place, first.y.place
    zero = f"{y(0):.1f}"
    assert first.line == (
        f"M{x(0.01):.1f} {zero}V{y(MIB):.1f}H{x(0.02):.1f}V{y(5 * MIB):.1f}H{x(0.04):.1f}V{zero}H{x(0.05):.1f}"
    )
    assert first.area == f"{first.line}V{zero}Z"
    assert [label for _, label in binary(0, 7.35 * MIB, 0, 1).ticks] == ["0", "2 MiB", "4 MiB", "6 MiB"]
    assert [label for _, label in binary(0, 900, 0, 1).ticks][:2] == ["0", "250 B"]


def test_shares_are_of_the_rate_that_limits_the_stage() -> None:
    (name, bars), _ = shares_of_ceilings(profile())
    assert name == "full" and [(bar.stage, bar.length, bar.text) for bar in bars] == [
        ("encode", 50, "50.0 %"),
        ("prefill", 25, "25.0 %"),
        ("decode", 5, "5.0 %"),
    ]


def test_scaling_curves_leave_out_a_selection_that_selects_nothing() -> None:
    select, prefill = scaling_plots(profile())
    assert [series.name for series in select.series] == ["mmtok @ 64"]
    assert [series.name for series in prefill.series] == ["full", "mmtok @ 64"]
    full = prefill.series[0].points
    assert full[0].x < full[1].x < full[2].x and full[0].y > full[1].y > full[2].y
    slopes = [(one.y - two.y) / (two.x - one.x) for one, two in pairwise(full)]
    assert slopes[0] == pytest.approx(slopes[1])  # a power law is a straight line


def test_a_timeline_keeps_its_peaks_however_many_moments_there_are() -> None:
    levels = [(float(i), 1000 + (i % 7) * 10) for i in range(20_000)]
    levels[12_345] = (12_345.0, 9_999)
    levels[17_000] = (17_000.0, -5)
    spans = [("prefill", 10.0, 15_000.0), ("select", 100.0, 200.0), ("decode", 15_000.0, 20_000.0)]
    thin = timeline("full", levels, spans)
    assert thin is not None and len(thin.seconds) == len(thin.bytes) <= MOST_MOMENTS
    assert max(thin.bytes) == 9_999 and min(thin.bytes) == -5
    assert thin.seconds == sorted(thin.seconds) and thin.seconds[thin.bytes.index(9_999)] == pytest.approx(12_335e-6)
    assert [span.stage for span in thin.stages] == ["prefill", "select", "decode"] and thin.stages[0].start == 0
    assert thin.bytes[-1] == levels[-1][1]  # what is left at the end
    few = timeline("full", levels[:50], spans)
    assert few is not None and few.bytes == [level for _, level in levels[:50]]
    assert timeline("full", [], spans) is None and timeline("full", levels, []) is None


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_without_the_network_and_is_legible(browser: Browser, tmp_path: Path, scheme: Any) -> None:
    path = tmp_path / "profile.html"
    write_profile(profile(), path, ["a note"])
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    happened: list[str] = []
    page.on("console", lambda message: happened.append(message.text))
    page.on("pageerror", lambda error: happened.append(str(error)))
    context.on("request", lambda request: happened.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    assert [what for what in happened if not what.startswith("data:")] == [path.as_uri()]
    texts = page.evaluate(TEXT_COLOURS)
    assert len(texts) > 100 and [text for text, colour, behind in texts if contrast(colour, behind) < 4.5] == []
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.get_by_role("button", name="mmtok @ 64").click()
    page.mouse.move(0, 0)
    assert page.locator(".plots .series.faded").count() == 1  # the other case, in the plot of prefill
    context.close()


@pytest.mark.parametrize("kind", ["script", "attribute", "template", "escape sequence", "right-to-left override"])
def test_hostile_text_stays_text(kind: str, browser: Browser, tmp_path: Path) -> None:
    text = HOSTILE_TEXTS[kind]
    found = profile(method=text, model=text)
    operators = [each.model_copy(update={"name": text, "case": text}) for each in found.operators]
    memory = [each.model_copy(update={"case": text}) for each in found.memory]
    refused = [found.scaling[0].model_copy(update={"refused": text})]
    hostile = found.model_copy(
        update={"operators": operators, "memory": memory, "scaling": found.scaling + refused, "trace": text}
    )
    path = tmp_path / "hostile.html"
    write_profile(hostile, path, [text])
    page = browser.new_page()
    happened: list[str] = []
    page.on("dialog", lambda dialog: (happened.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: happened.append(message.text))
    page.goto(path.as_uri())
    assert not happened and page.locator("script").count() == 1 and page.locator("img, a, base").count() == 0
    named = page.evaluate("[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())")
    assert not [name for name in named if name.startswith("on")]
    assert is_harmless(page.evaluate("document.documentElement.outerHTML"))
    page.close()


def test_escaped_without_a_browser() -> None:
    text = profile_page_text(profile(method=HOSTILE, model=HOSTILE), [HOSTILE])
    assert HOSTILE not in text and text.count("<script>") == 1
