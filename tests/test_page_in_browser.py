"""The page of a comparison, opened in a headless browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from comparisons import HOSTILE, HOSTILE_TEXTS, case, comparison, is_harmless, overlays, unmeasured, usual
from PIL import Image

from mmtok_cli.report.exports import write_export
from mmtok_cli.report.page import LONGEST_SIDE, Overlay, OverlayGroup
from mmtok_cli.results.schema import CaseId, Comparison, FailedCase

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Every element that shows text of its own, with the colours it is seen in.
TEXT_COLOURS = """() => [...document.body.querySelectorAll("*")]
  .filter((e) => e.getClientRects().length && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .filter((e) => !["SCRIPT", "title"].includes(e.tagName))
  .map((e) => {
    const style = getComputedStyle(e);
    let behind = e;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const colour = e.closest("svg") ? style.fill : style.color;
    return [e.textContent.trim(), colour, getComputedStyle(behind).backgroundColor];
  })"""
DRAWN_COLOURS = """() => [...document.querySelectorAll(".marker, .stack rect")]
  .map((e) => [e.getAttribute("class"), getComputedStyle(e).fill, getComputedStyle(document.body).backgroundColor])"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "results.html"
    write_export(usual(), path, overlays=overlays())
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear_ones = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear_ones, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def column(page: Page, number: int, table: int = 0) -> list[str]:
    cells = page.locator("table").nth(table).locator(f"tbody tr > :nth-child({number + 1})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_opens_without_errors_and_without_network(browser: Browser, address: str) -> None:
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(address, wait_until="load")
    page.locator("thead button").first.click()
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [address]
    context.close()


def test_no_script_but_its_own_may_run(page: Page) -> None:
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'taken over'";
        document.body.append(script);
    }""")
    assert page.title() == "demo: vision-token reduction compared"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_legible_in_both_themes(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    texts = page.evaluate(TEXT_COLOURS)
    assert len(texts) > 100
    assert [text for text, colour, behind in texts if contrast(colour, behind) < 4.5] == []
    drawn = page.evaluate(DRAWN_COLOURS)
    assert len(drawn) > 20
    assert [name for name, colour, behind in drawn if contrast(colour, behind) < 3] == []
    assert (luminance(texts[0][2]) < 0.1) == (scheme == "dark")


def test_all_colours_of_methods_are_legible(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    cases = [case("full", 576), *(case(f"method-{i}", 16 + i) for i in range(9))]
    write_export(comparison(cases), path)
    page = browser.new_page()
    page.goto(path.as_uri())
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        drawn = page.evaluate(DRAWN_COLOURS)
        assert len({colour for _, colour, _ in drawn}) >= 9 + 5
        assert [name for name, colour, behind in drawn if contrast(colour, behind) < 3] == []
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.locator(".scroll").first
    wide = box.evaluate("box => box.scrollWidth > box.clientWidth")
    assert wide == (width == 390)  # the table scrolls by itself where it does not fit
    assert box.evaluate("box => box.getBoundingClientRect().right") <= width


def test_long_names_leave_room_for_figures(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "long.html"
    name = "a-package-of-methods:with-a-variant-of-a-long-name"
    write_export(comparison([case("full", 576), case(name), unmeasured(name, 8)], model="/a/path" * 20), path)
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("tbody th").nth(1).evaluate("cell => cell.offsetWidth") < 390 / 2
    assert page.locator("tbody th").nth(2).inner_text().split() == [name, "not", "measured"]
    page.close()


def test_print_shows_the_whole_table(page: Page) -> None:
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 without its margins
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_sorts_numbers_both_ways_with_gaps_last(page: Page) -> None:
    names = [
        name.split("\u00a0")[0].strip() for name in page.locator("table").first.locator("thead th").all_inner_texts()
    ]
    prefill, kept = names.index("prefill"), names.index("kept")
    headings = page.locator("table").first.locator("thead th")
    expected = ["4.1 ms", "5 ms", "6.2 ms", "11 ms", "20 ms", "100 ms"]
    assert column(page, prefill)[:-1] != expected
    assert page.locator("[aria-sort]").count() == 0
    headings.nth(prefill).get_by_role("button").click()
    assert column(page, prefill) == [*expected, "–"]
    assert headings.nth(prefill).get_attribute("aria-sort") == "ascending"
    headings.nth(prefill).get_by_role("button").click()
    assert column(page, prefill) == [*reversed(expected), "–"]
    assert headings.nth(prefill).get_attribute("aria-sort") == "descending"
    headings.nth(kept).get_by_role("button").click()
    assert column(page, kept) == ["8/576", "16/576", "64/576", "64/576", "100/576", "576/576", "4"]
    assert headings.nth(kept).get_attribute("aria-sort") == "ascending"
    assert page.locator("[aria-sort]").count() == 1


def test_sorts_from_the_keyboard_and_rows_stay_whole(page: Page) -> None:
    rows = page.locator("table").first.locator("tbody tr")
    before = set(rows.all_inner_texts())
    button = page.locator("table").first.locator("thead button").first
    button.focus()
    page.keyboard.press("Enter")
    names = column(page, 0)
    assert [name.split()[0] for name in names] == sorted(name.split()[0] for name in names)
    page.keyboard.press("Space")
    assert [name.split()[0] for name in column(page, 0)] == sorted((n.split()[0] for n in names), reverse=True)
    assert set(rows.all_inner_texts()) == before


def test_a_method_is_brought_forward_from_the_legend(page: Page) -> None:
    button = page.get_by_role("button", name="fastv")
    faded = page.locator(".plots .series.faded")
    shown = page.locator(".plots .series").count()
    assert faded.count() == 0
    button.click()
    page.mouse.move(0, 0)
    assert button.get_attribute("aria-pressed") == "true"
    assert faded.count() == shown - 3  # one in each of three plots stays
    button.click()
    page.mouse.move(0, 0)
    button.blur()
    assert faded.count() == 0


def test_pictures_are_embedded_and_small(page: Page) -> None:
    sources = [image.get_attribute("src") or "" for image in page.locator("img").all()]
    assert len(sources) == 2 and all(source.startswith("data:image/webp;base64,") for source in sources)
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]
    assert [max(picture.size) for picture in pictures] == [LONGEST_SIDE] * 2
    red, green, blue = pictures[0].convert("RGB").getpixel((5, 5))  # type: ignore[misc]
    assert red > 180 and green < 60 and blue < 90
    assert page.locator("img").first.evaluate("image => image.naturalWidth") == LONGEST_SIDE
    assert page.locator("img").first.get_attribute("alt")


def test_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    cases = [case("full", 576), case(HOSTILE, 64), case('" onload="alert(2)', 16)]
    write_export(comparison(cases, model=HOSTILE), path, overlays=overlays())
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("h3").inner_text() == f"What is this? {HOSTILE}"
    assert page.locator("script").count() == 1 and not dialogs
    assert page.locator("[onload]").count() == 0
    page.close()


def hostile_everywhere(text: str) -> tuple[Comparison, list[OverlayGroup]]:
    """A comparison and its pictures with `text` wherever text of users, files and models can be."""
    kinds = {text: (3, 4), "plain": (1, 4)}
    counts = usual().results[0].score_counts
    assert counts is not None
    counts = counts.model_copy(update={"by_kind": kinds})
    cases = [case("full", 576, score_counts=counts), case(text, 64, score_counts=counts, parameters={text: text})]
    failed = FailedCase(case=CaseId(method=text, parameters={}, budget=text), round=0, reason="refused", message=text)
    result = comparison(cases, model=text)
    schedule = result.schedule.model_copy(update={"data": text})
    fields = {"processor", "platform", "torch", "git_commit", "device"}
    environment = result.environment.model_copy(update=dict.fromkeys(fields, text) | {"command": ["mmtok", text]})
    update = {"schedule": schedule, "environment": environment, "failures": [failed], "unevaluated": [failed]}
    pictures = [OverlayGroup(text, [Overlay(text, Image.new("RGB", (72, 48)), text, text)], text)]
    return result.model_copy(update=update | {"left_out": [text], "remarks": [text]}), pictures


@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_hostile_text_runs_nothing_and_loads_nothing(kind: str, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    result, pictures = hostile_everywhere(HOSTILE_TEXTS[kind])
    write_export(result, path, overlays=pictures)
    context = browser.new_context()
    page = context.new_page()
    happened: list[str] = []
    page.on("dialog", lambda dialog: (happened.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: happened.append(str(error)))
    page.on("console", lambda message: happened.append(message.text))
    context.on("request", lambda request: happened.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    for element in page.locator("th, td, figure, .series, button").all():
        element.dispatch_event("mouseover")
    page.locator("thead button").first.click()
    assert [what for what in happened if not what.startswith("data:") and what != path.as_uri()] == []
    assert page.url == path.as_uri() and page.locator("script").count() == 1 and page.locator("img").count() == 1
    named = page.evaluate("[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())")
    assert not [name for name in named if name.startswith("on")]
    assert page.locator("a, iframe, object, embed, form, base").count() == 0
    shown = page.evaluate("document.documentElement.outerHTML")
    assert is_harmless(shown) and is_harmless(page.title())
    context.close()
