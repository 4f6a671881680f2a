"""Protocols of published benchmarks, and VTC-Bench's groups of samples."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from cli_helpers import run, run_json
from comparisons import case as case_result
from PIL import Image
from typer.testing import CliRunner

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.cli.options import with_options
from mmtok_cli.configuration import cases_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.summary import resize_groups
from mmtok_cli.methods import make_method
from mmtok_cli.overlays import _saved
from mmtok_cli.protocols import PROTOCOLS
from mmtok_cli.report.checks import repeat_notes
from mmtok_cli.results.schema import CaseId, CaseResult, SamplePrediction, cases_with_resize
from mmtok_cli.settings import CompareSettings


def test_groups_hold_the_samples_that_the_unreduced_model_answers_correctly() -> None:
    full = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    resized = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    scores = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    found = resize_groups(full, resized, scores)
    assert (found.a_right, found.a_samples, found.b_right, found.b_samples) == (1, 2, 1, 2)
    assert resize_groups(full, resized, full).a_right == 2  # the unreduced model answers all of group A


def test_groups_are_made_by_resize_at_the_same_budget() -> None:
    def case(method: str, budget: str | None, batch_size: int = 1) -> CaseId:
        return CaseId(method=method, parameters={}, budget=budget, batch_size=batch_size)

    cases = [case("full", None), case("mmtok", "64"), case("mmtok", "16"), case("resize", "64"), case("mmtok", "64", 8)]
    assert cases_with_resize(cases) == {1: 3}


@pytest.mark.parametrize(("budget", "tokens"), [("33.34%", 192), ("22.23%", 128), ("11.12%", 64), ("6.25%", 36)])
def test_shares_of_the_protocols_give_the_published_numbers_of_tokens(budget: str, tokens: int) -> None:
    assert budget in {share for protocol in PROTOCOLS.values() for share in protocol.budgets}
    assert Budget.parse(budget).resolve(576) == tokens
    for name in ("mmtok", "fastv", "divprune", "visionzip"):
        assert make_method(name).count(float(budget.rstrip("%")) / 100, 576) == tokens


def test_a_protocol_sets_budgets_and_adds_its_controls() -> None:
    vtc = CompareSettings.of(protocol="vtc", methods="mmtok,divprune")
    assert vtc.budget == PROTOCOLS["vtc"].budgets and vtc.methods == ("mmtok", "divprune", "resize")
    assert CompareSettings.of(protocol="vtc").methods == ("mmtok", "visionzip", "fastv", "dart", "resize")
    assert CompareSettings.of(**json.loads(vtc.model_dump_json())) == vtc  # as a plan keeps it
    usual = CompareSettings.of().methods
    assert CompareSettings.of(protocol="vtc", methods=usual).methods == usual  # as they were asked for
    seeds = [
        case.id.parameters["seed"]
        for case in cases_of(CompareSettings.of(protocol="unipruneb", methods="mmtok", seed=5))
        if case.name == "random" and str(case.budget) == "11.12%"
    ]
    assert seeds == [5, 6, 7]


def test_the_usual_methods_may_be_named_beside_a_protocol() -> None:
    seen: list[CompareSettings] = []
    app = typer.Typer()

    @app.command()
    @with_options(CompareSettings)
    def command(context: typer.Context, settings: CompareSettings) -> None:
        seen.append(settings)

    usual = CompareSettings.of().methods
    for methods in ([], ["--methods", ",".join(usual)]):
        assert CliRunner().invoke(app, ["--protocol", "vtc", *methods]).exit_code == 0
    assert [settings.methods for settings in seen] == [CompareSettings.of(protocol="vtc").methods, usual]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "vtk"}, "not a protocol"),
        ({"protocol": "vtc", "budget": "64"}, "budgets of its own"),
        ({"protocol": "vtc", "retain": "98%"}, "--retain"),
        ({"protocol": "vtc", "no_quality": True}, "--no-quality"),
        ({"protocol": "vtc", "engine": "vllm"}, "--engine vllm"),
    ],
)
def test_what_contradicts_a_protocol_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MMTokError, match=message):
        CompareSettings.of(**settings)


def test_a_comparison_by_protocol(tmp_path: Path) -> None:
    files = [tmp_path / "out.csv", tmp_path / "out.md", tmp_path / "out.html"]
    exports = [part for file in files for part in ("--export", file)]
    options = ("--limit", 16, "--batch-size", 8, "--rounds", 1, "--warmup", 0, "--run-dir", tmp_path / "run")
    found = run_json("compare", "--protocol", "vtc", "--methods", "divprune", *options, *exports)
    cases = {(r["case"]["method"], r["case"]["budget"]): r for r in found["results"]}
    assert len(cases) == 11  # the baseline, and two methods at five shares
    full = cases["full", None]["score_counts"]["right"]
    for share in PROTOCOLS["vtc"].budgets:
        groups, flips = cases["divprune", share]["groups"], cases["resize", share]["flips"]
        assert groups["a_samples"] == flips["right_wrong"] and groups["b_samples"] == flips["right_right"]
        assert groups["a_samples"] + groups["b_samples"] == full
        assert cases["resize", share]["groups"] is None
    assert any(cases["divprune", share]["groups"]["a_right"] for share in PROTOCOLS["vtc"].budgets)
    rows = {(row["method"], row["budget"]): row for row in csv.DictReader(files[0].open())}
    groups = cases["divprune", "4%"]["groups"]
    assert rows["divprune", "4%"]["group_a_samples"] == str(groups["a_samples"])
    assert float(rows["divprune", "4%"]["group_a"]) == pytest.approx(groups["a_right"] / groups["a_samples"])
    assert "group A" in files[1].read_text() and "group A" in files[2].read_text()
    shown = run("report", tmp_path / "run")
    assert "Correct answers where resize fails (A)" in shown.stdout and "VTC-Bench" in shown.stderr


def test_the_mean_of_several_draws_is_told(tmp_path: Path) -> None:
    options = ("--limit", 8, "--batch-size", 8, "--rounds", 1, "--warmup", 0, "--run-dir", tmp_path / "run")
    page = tmp_path / "out.html"
    shown = run("compare", "--protocol", "unipruneb", "--methods", "random", *options, "--export", page)
    assert shown.exit_code == 0, shown.output
    assert "2 methods at budgets of 33.34%, 22.23%, 11.12%" in page.read_text()  # however often they are drawn
    assert "random (seed 2)" in shown.stdout
    assert "random @ 11.12%: mean score" in shown.stderr and "of 3 draws" in " ".join(shown.stderr.split())


def test_draws_are_averaged_by_scale_and_once_for_all_batch_sizes() -> None:
    def drawn(seed: int, score: float, **more: Any) -> CaseResult:
        found = case_result("random", 64, score=score)
        described = {"parameters": {"seed": seed}, "repeat": seed + 1, **more}
        return found.model_copy(update={"case": found.case.model_copy(update=described)})

    results = [drawn(0, 0.5), drawn(1, 0.7), drawn(0, 0.1, image_scale=0.5), drawn(1, 0.3, image_scale=0.5)]
    results += [drawn(0, 0.5, batch_size=8), drawn(1, 0.7, batch_size=8)]
    assert repeat_notes(results) == [
        "random @ 64: mean score 60.0 % of 2 draws (50.0 % to 70.0 %)",
        "random @ 64, scale 0.5: mean score 20.0 % of 2 draws (10.0 % to 30.0 %)",
    ]


def test_pictures_of_several_draws_have_the_answers_of_their_draw() -> None:
    cases = [CaseId(method="random", parameters={"seed": seed}, budget="8", repeat=seed + 1) for seed in range(2)]
    fields = dict.fromkeys(SamplePrediction.model_fields) | {"sample": 0, "flip": "", "again": False}
    said = [
        SamplePrediction.model_construct(**fields | case.model_dump() | {"prediction": f"draw {case.repeat}"})
        for case in cases
    ]
    store = SimpleNamespace(
        plan=SimpleNamespace(cases=[SimpleNamespace(case=case) for case in cases]), write_file=lambda *_: None
    )
    picture = Image.new("RGB", (8, 8))
    notes = [_saved(store, picture, 0, place, str(case), said).note for place, case in enumerate(cases)]  # type: ignore[arg-type]
    assert notes == ["“draw 1”", "“draw 2”"]
    method = make_method("random", seed=1)
    assert str(Case("random", method, Budget(count=8), repeat=2)) == "random (seed 1) @ 8"


def test_keys_of_cases_that_are_drawn_once_are_those_of_older_runs() -> None:
    assert "repeat" not in CaseId(method="random", parameters={"seed": 0}, budget="8").model_dump(exclude_none=True)
