"""Comparisons written to files and read back."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest
from comparisons import HOSTILE_TEXTS, case, comparison, is_harmless, unmeasured, usual
from rich.cells import cell_len

from mmtok_cli.errors import MMTokError
from mmtok_cli.report.cells import Column
from mmtok_cli.report.columns import COLUMNS
from mmtok_cli.report.csv_export import CSV_COLUMNS, csv_documentation, csv_text
from mmtok_cli.report.exports import EXPORTS, markdown_text, write_export, write_predictions
from mmtok_cli.report.page import page_text
from mmtok_cli.results.schema import CaseId, Comparison, FailedCase, Fidelity, Flips, Memory, SamplePrediction


def written(result: Comparison, path: Path) -> str:
    write_export(result, path)
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    return path.read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    """Cells of the first Markdown table, a backslash before a bar making it text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip().replace("\0", "|") for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines
    ]


def test_json_is_the_schema_and_comes_back_whole(tmp_path: Path) -> None:
    text = written(usual(), tmp_path / "results.json")
    assert json.loads(text)["schema"] == "mmtok.compare/2"
    assert Comparison.model_validate_json(text) == usual()


def test_csv_has_a_row_for_each_case_and_units_in_its_names(tmp_path: Path) -> None:
    result = usual()
    rows = list(csv.DictReader(written(result, tmp_path / "results.CSV").splitlines()))
    assert len(rows) == len(result.results)
    assert [row["method"] for row in rows] == [one.case.method for one in result.results]
    full, first = rows[0], rows[1]
    expected = result.results[1]
    assert float(first["prefill_median_s"]) == expected.seconds["prefill"].median
    assert float(first["ttft_p90_s"]) == expected.seconds["ttft"].p90
    assert float(first["speedup_prefill_low"]) == expected.speedup["prefill"].low
    assert first["decode_tokens_per_s"] == "333.3" and "decode tok/s" in page_text(result)
    assert int(first["kv_cache_bytes"]) == expected.memory.kv_cache
    assert float(first["total_flops"]) == 5e9
    assert (first["kept_tokens"], first["layer_average_tokens"], first["total_tokens"]) == ("64.0", "64.0", "576.0")
    assert (first["score_right"], first["score_asked"], first["kl_nats"]) == ("40", "40", "0.0123")
    assert json.loads(first["parameters"]) == {"alpha": 0.5}
    assert (first["model"], first["device"], first["batch_size"], first["track"]) == ("demo", "cpu", "1", "released")
    assert (full["budget"], full["retention"], full["speedup_prefill_median"], full["kl_nats"]) == ("", "", "", "")
    assert rows[-1]["prefill_median_s"] == "" and rows[-1]["budget"] == "4"
    assert not any("values" in name or name in ("fidelity", "score_counts") for name in first)


def test_csv_has_no_empty_columns(tmp_path: Path) -> None:
    """Columns are left out if no case has a value, but for those that every file has."""
    result = usual()
    rows = list(csv.DictReader(written(result, tmp_path / "results.csv").splitlines()))
    always = {column.name for column in CSV_COLUMNS if column.always}
    empty = {name for name in rows[0] if all(row[name] == "" for row in rows)}
    assert empty <= always <= set(rows[0])
    assert "peak_bytes" not in rows[0] and "gpu_joules" not in rows[0] and "failure_reason" not in rows[0]
    with_peak = comparison([case("full", 576), case("mmtok", memory=Memory(peak=7, kv_cache=1, host=1))])
    assert [row["peak_bytes"] for row in csv.DictReader(csv_text(with_peak).splitlines())] == ["", "7"]
    bare = next(csv.DictReader(csv_text(comparison([unmeasured("full", 576)])).splitlines()))
    assert set(bare) == always


def test_csv_columns_are_documented() -> None:
    names = [column.name for column in CSV_COLUMNS]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    assert all(column.meaning for column in CSV_COLUMNS)
    lines = csv_documentation().splitlines()
    assert lines[0] == "| column | meaning |" and len(lines) == 2 + len(names)
    assert "| `method` | name of the method |" in lines


def test_columns_have_one_heading_in_each_table() -> None:
    for place in ("table", "section"):
        shown = [column for column in COLUMNS if isinstance(column, Column) and getattr(column, place)]
        headings = [(getattr(column, place), column.heading) for column in shown]
        assert len(set(headings)) == len(headings) and all(heading for _, heading in headings)


def test_csv_quotes_what_would_break_it(tmp_path: Path) -> None:
    rows = list(csv.DictReader((written(comparison([case('a,"b"\nc')], "x,y"), tmp_path / "x.csv")).splitlines(True)))
    assert (rows[0]["method"], rows[0]["model"]) == ('a,"b"\\nc', "x,y")


def test_markdown_columns_line_up(tmp_path: Path) -> None:
    text = written(usual(), tmp_path / "results.md")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(usual().results)
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in table}) == 1
    heading, rule, full, first, *_ = rows_of(text)
    assert heading == (
        "method, kept, avg, select, prefill, speedup (prefill), TTFT, speedup (TTFT), decode tok/s, KV cache, score, "
        "retention"
    ).split(", ")
    assert rule[0].startswith(":") and all(cell.endswith(":") and set(cell[:-1]) == {"-"} for cell in rule[1:])
    assert full[:5] == ["full", "576/576", "576", "2 ms", "20 ms"] and full[5] == full[7] == full[-1] == "–"
    assert first[:5] == ["mmtok", "64/576", "64", "2 ms", "5 ms"] and first[-2:] == ["100.0 %", "100.0 %"]
    low, high = usual().results[1].speedup["prefill"].low, usual().results[1].speedup["prefill"].high
    assert first[5] == f"4.00x ({low:.2f}–{high:.2f})"
    assert rows_of(text)[7][5] == "1.01x (0.98–1.04)?"


def test_markdown_says_what_it_was_measured_on_and_how_to_read_it() -> None:
    after = markdown_text(usual()).split("\n\n")
    assert len(after) == 3
    assert "A Processor" in after[1] and "torch 2.13.0" in after[1] and "40 samples, 8 rounds" in after[1]
    assert "95 % interval" in after[2] and "\n" not in after[1] + after[2].strip()


def test_markdown_of_a_case_without_figures() -> None:
    row = rows_of(markdown_text(usual()))[-1]
    assert row[:2] == ["mmtok (not measured)", "4"] and set(row[2:]) == {"–"}


def test_markdown_without_answers_shows_fidelity() -> None:
    cases = [case("full", 576, right=None), case("mmtok", right=None, fidelity=Fidelity(kl=0.25, top1=0.75))]
    heading, _, _, row = rows_of(markdown_text(comparison(cases)))
    assert heading[-2:] == ["top-1", "KL"] and row[-2:] == ["75.0 %", "0.250"]
    assert "score" not in heading and "avg" not in heading


def test_markdown_names_stay_text() -> None:
    text = markdown_text(comparison([case("full", 576), case("a|b<script>*x*\n日本")], model="<b>&amp;"))
    row = rows_of(text)[3]
    assert row[0] == r"a|b\<script\>\*x\*\\n日本"
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({cell_len(line) for line in table}) == 1
    assert "\\<b\\>\\&amp;" in text


def test_predictions_hold_any_text_as_strict_json(tmp_path: Path) -> None:
    """On one line each, without characters that a terminal would follow, and unchanged when it is read."""
    texts = [*HOSTILE_TEXTS.values(), "naïve 模型 😀", ""]
    rows = [
        SamplePrediction(
            run=None,
            sample=number,
            id=None,
            images=(text,),
            kind=text,
            question=text,
            references=(text, text),
            method=text or "mmtok",
            parameters={"name": text},
            budget="10%",
            batch_size=1,
            again=False,
            draft=text,
            draft_tokens=1,
            prediction=text,
            baseline_prediction=text,
            kept=1,
            total=2,
            score=None,
            baseline_score=None,
            flip="",
            kl=math.inf,
            top1=1.0,
            same=False,
        )
        for number, text in enumerate(texts)
    ]
    write_predictions(rows, tmp_path / "p.jsonl")
    written = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert is_harmless(written) and written.count("\n") == len(rows)
    read = [json.loads(line) for line in written.splitlines()]
    assert [each["prediction"] for each in read] == [each["references"][1] for each in read] == texts
    assert {(each["kl"], each["schema"]) for each in read} == {("Infinity", "mmtok.predictions/1")}
    write_predictions([], tmp_path / "none.jsonl")
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_unknown_suffix_names_the_four(tmp_path: Path) -> None:
    for name in ("results.xlsx", "results"):
        with pytest.raises(MMTokError) as error:
            write_export(usual(), tmp_path / name)
        assert all(suffix in error.value.message for suffix in EXPORTS) and name in error.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", EXPORTS)
def test_a_file_stays_whole_when_it_cannot_be_replaced(suffix: str, tmp_path: Path) -> None:
    place = tmp_path / f"results{suffix}"
    place.mkdir()
    with pytest.raises(MMTokError, match="could not be written"):
        write_export(usual(), place)
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("suffix", EXPORTS)
def test_names_that_are_no_text_are_escaped(suffix: str, tmp_path: Path) -> None:
    text = written(comparison([case("full", 576), case("mmtok")], model="a\udcffb"), tmp_path / f"results{suffix}")
    assert "udcffb" in text
    assert suffix != ".json" or json.loads(text)["model"] == r"a\udcffb"


def test_what_failed_has_a_row_in_every_table(tmp_path: Path) -> None:
    failed = FailedCase(
        case=CaseId(method="fastv", parameters={}, budget="64", batch_size=8),
        round=2,
        reason="out of memory",
        message="2 GiB short",
    )
    sizes = usual().schedule.model_copy(update={"batch_size": [1, 8]})
    result = usual().model_copy(update={"failures": [failed], "schedule": sizes})
    row = rows_of(markdown_text(result))[-1]
    assert row[:3] == ["fastv (out of memory)", "8", "64"] and set(row[3:]) == {"–"}
    assert "2 GiB short" in markdown_text(result)
    last = list(csv.DictReader(written(result, tmp_path / "t.csv").splitlines()))[-1]
    assert (last["method"], last["batch_size"], last["failure_reason"]) == ("fastv", "8", "out of memory")
    page = page_text(result)
    assert page.count('class="trouble"') == 4 and "2 GiB short" in page and "mmtok, batch size 1" in page
    assert rows_of(markdown_text(result))[0][1] == "batch" and rows_of(markdown_text(usual()))[0][1] == "kept"


def test_quality_is_told_with_its_doubt() -> None:
    flips = Flips(right_right=35, right_wrong=4, wrong_right=1, wrong_wrong=0, p_value=0.375)
    one = case("mmtok", retention_low=0.85, retention_high=0.95, flips=flips, again=True)
    result = comparison([case("full", 576, right=40), one])
    row = rows_of(markdown_text(result))[3]
    assert row[0] == "mmtok (again)" and row[-1] == "90.0 % (85.0–95.0)"
    assert "4 / 1" in page_text(result) and "0.375" in page_text(result) and "mmtok (again)" in page_text(result)
    written_row = list(csv.DictReader(csv_text(result).splitlines()))[1]
    assert (written_row["flips_right_wrong"], written_row["retention_low"]) == ("4", "0.85")
