"""`compare --retain`: the sequential rule by simulation, the search, its directory, and the command."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import simulate_retain as simulation
from cli_helpers import run as invoke

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.comparison import prepare_comparison
from mmtok_cli.data.samples import demo_samples
from mmtok_cli.evaluation.predictions import reference_of
from mmtok_cli.evaluation.sequential import LEVEL, BudgetSearch, PairedTest
from mmtok_cli.evaluation.shared import SharedBatch
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.methods.catalogue import method_class
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer
from mmtok_cli.progress import Progress
from mmtok_cli.report.retention import answer_lines
from mmtok_cli.results.schema import Speedup
from mmtok_cli.retention import make_search_plan, read_retention
from mmtok_cli.settings import CompareSettings

SEARCHES = 120


# --- The sequential rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", simulation.DATA)
@pytest.mark.parametrize("name", simulation.SCENARIOS)
def test_a_budget_that_loses_too_much_is_found_at_most_once_in_twenty(name: str, data: str) -> None:
    target = 0.95
    retentions = simulation.SCENARIOS[name](target)
    rng = np.random.default_rng(1)
    settings = simulation.DATA[data]
    found = [simulation.simulate(retentions, target, rng, images=200, **settings) for _ in range(SEARCHES)]
    wrong = sum(simulation.wrong(outcome, retentions, target) for outcome in found)
    assert wrong <= 0.05 * SEARCHES + 3 * np.sqrt(0.05 * 0.95 * SEARCHES)


@pytest.mark.parametrize(("target", "edge"), [(0.9, 8), (0.9, 10), (0.95, 12)])
def test_a_clear_edge_is_found_exactly_and_with_far_fewer_runs_than_a_grid(target: float, edge: int) -> None:
    retentions = simulation.curve(edge, 1.0, target - 0.1)
    rng = np.random.default_rng(2)
    found = [simulation.simulate(retentions, target, rng, gains=0.0) for _ in range(20)]
    assert fmean(outcome.answer == edge - 1 for outcome in found) >= 0.9
    grid = len(simulation.COARSE) * fmean(outcome.samples for outcome in found)
    assert fmean(outcome.runs for outcome in found) < grid / 2


@pytest.mark.parametrize("questions", [1, 4])
def test_a_verdict_is_rarely_wrong_however_often_it_is_looked_at(questions: int) -> None:
    """The retention is exactly the target, so whatever the test decides at any time is wrong for one side."""
    rng, wrong = np.random.default_rng(3), {"kept": 0, "lost": 0}
    for _ in range(300):
        test = PairedTest(0.9)
        base = rng.binomial(questions, 0.8, 150)
        mine = base * (rng.random(150) < 0.9)
        for image in zip([questions] * 150, mine.tolist(), base.tolist(), strict=True):
            test.add([image])
        if test.verdict != "open":
            wrong[test.verdict] += 1
    assert max(wrong.values()) <= LEVEL * 300 + 3 * np.sqrt(LEVEL * 300)


def test_the_interval_agrees_with_the_verdict_and_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(4), 0
    for _ in range(200):
        test = PairedTest(0.9)
        base = (rng.random(120) < 0.8).astype(float)
        mine = base * (rng.random(120) < 0.93)
        test.add(list(zip([1] * 120, mine.tolist(), base.tolist(), strict=True)))
        low, high = test.interval()
        assert high is not None and low <= (test.retention() or 0.0) <= high
        assert (test.verdict == "kept") == (low >= 0.9)
        assert (test.verdict == "lost") == (high <= 0.9)
        covered += low <= 0.93 <= high
    assert covered >= 190


def test_the_order_of_images_does_not_matter() -> None:
    images = [(1, 1.0, 1.0), (2, 0.0, 1.0), (1, 1.0, 0.0), (1, 0.5, 0.5)] * 10
    one, other = PairedTest(0.8), PairedTest(0.8)
    one.add(images)
    other.add(images[::-1])
    assert one.interval() == pytest.approx(other.interval())


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_scores_that_are_all_alike(right: float) -> None:
    test = PairedTest(0.95)
    test.add([(1, right, right)] * 500)
    assert test.verdict == ("kept" if right else "open")
    assert test.retention() == (1.0 if right else None)
    assert (test.images_needed() is None) == (right == 0)


@pytest.mark.parametrize("questions", [1, 6])
def test_no_loss_on_few_images_shows_nothing(questions: int) -> None:
    """3 / 0.05 images without a loss exclude losses of 5 % with 95 % confidence; fewer must not."""
    test = PairedTest(0.95)
    test.add([(questions, float(questions), float(questions))] * 59)
    assert test.verdict == "open"


@pytest.mark.parametrize(("mine", "verdict"), [(1.0, "kept"), (0.5, "lost")])
def test_images_needed_foretells_the_decision(mine: float, verdict: str) -> None:
    test = PairedTest(0.9)
    test.add([(1, mine, 1.0), (1, 1.0, 1.0)] * 4)
    more = test.images_needed()
    assert more is not None
    test.add([(1, mine, 1.0), (1, 1.0, 1.0)] * (more // 2 + 1))
    assert test.verdict == verdict


def test_budgets_below_one_that_is_lost_are_not_tried_any_more() -> None:
    search = BudgetSearch([True, True, False, True], 10, 0.9)
    while step := search.wanted():
        for place in step[1]:
            search.add(place, [(1, 0.0 if place else 1.0, 1.0)] * 40)
    assert search.answer == 0 and search.tests[1].verdict == "lost"
    assert search.done[3] <= search.done[1] and search.done[2] == 0


def test_the_gap_is_refined_from_above() -> None:
    search = BudgetSearch([True, False, False, True], 10, 0.9)
    while step := search.wanted():
        for place in step[1]:
            search.add(place, [(1, 1.0 if place < 2 else 0.0, 1.0)] * 40)
    assert search.answer == 1 and search.done[1] > 0


# --- Shared encoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in method_names() if not method_class(name).needs_video])
def test_shared_batches_answer_as_single_runs_do(
    vlm: VisionLanguageModel, name: str, images: Any, request: pytest.FixtureRequest
) -> None:
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.rules import Rules

    method = make_method(name)
    samples = images
    shared = SharedBatch(vlm, samples)
    for tokens in (12, 5):
        case = Case(name, method, Budget(count=tokens) if method.takes_budget else None, Rules())
        try:
            expected = answer(vlm, method, samples, case.budget, max_new_tokens=3)
        except MMTokError as error:
            pytest.skip(error.message)
        found = shared.answer(case, 3)
        assert found.token_ids.equal(expected.token_ids)
        for one, other in zip(found.selections, expected.selections, strict=True):
            assert one.indices.equal(other.indices)


def test_agreement_of_the_unreduced_model_with_itself_is_complete(vlm: VisionLanguageModel, images: Any) -> None:
    full = Case("full", make_method("full"), None)
    reference = reference_of(vlm, images, max_new_tokens=4)
    shares, _ = SharedBatch(vlm, images).agreement(full, reference.answers.token_ids)
    assert shares == [1.0] * len(images)


@pytest.fixture(scope="module")
def images() -> Any:
    from mmtok_cli.methods.testing import samples

    return samples()


def test_agreement_is_the_top1_of_fidelity() -> None:
    from mmtok_cli.evaluation.predictions import closeness_of, forced_logits
    from mmtok_cli.models import load_model

    model, samples = load_model(), demo_samples(6)
    case = Case("random", make_method("random"), Budget(count=6))
    reference = reference_of(model, samples, max_new_tokens=4)
    logits, _ = forced_logits(model, case.method, samples, case.budget, reference.answers.token_ids)
    expected = [close.top1 for close in closeness_of(reference.logits, logits, reference.mask)]
    shares, _ = SharedBatch(model, samples).agreement(case, reference.answers.token_ids)
    assert shares == pytest.approx(expected)
    assert min(shares) < 1  # or nothing was compared


# --- The plan ------------------------------------------------------------------------------------------------------


def plan_of(**settings: Any) -> Any:
    chosen = CompareSettings.of(retain="90%", **settings)
    prepared = prepare_comparison(chosen, Progress())
    return make_search_plan(chosen, prepared.model, prepared.dataset, Progress())


def test_a_plan_has_powers_of_two_at_once_and_three_steps_between_them() -> None:
    plan = plan_of(methods="mmtok", limit=8)
    budgets = [one.case.budget for one in plan.cases[1:]]
    assert [one.case.budget for one in plan.cases[1:] if one.coarse] == [str(2**power) for power in range(8, -1, -1)]
    assert budgets == sorted(budgets, key=int, reverse=True) and {"96", "112", "80"} <= set(budgets)


def test_questions_about_one_image_stay_together() -> None:
    plan = plan_of(methods="mmtok", limit=40)
    (group,) = plan.groups.values()
    images = [{demo.image_ids for demo in (demo_samples(40)[number] for number in image)} for image in group]
    assert all(len(names) == 1 for names in images) and len(images) < 40
    assert sorted(number for image in group for number in image) == list(range(40))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"methods": "mmtok@16"}, "has one"),
        ({"methods": "none"}, "takes a budget"),
        ({"budget": "64,10%"}, "some are counts"),
        ({"budget": "600"}, "more than the 576"),
    ],
)
def test_searches_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    from mmtok_cli.errors import MMTokError

    with pytest.raises(MMTokError, match=words):
        plan_of(limit=4, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"retain": "98%"}, "mmtok compare --retain 98%"),
        ({"retain": 0.95, "methods": ["mmtok", "divprune"]}, "mmtok compare --methods mmtok,divprune --retain 95%"),
        ({"parameters": ["fastv.layer=3"], "no_quality": True}, "mmtok compare --set fastv.layer=3 --no-quality"),
        ({"question": "What is it?"}, "mmtok compare --question 'What is it?'"),
    ],
)
def test_the_command_line_of_settings(settings: dict[str, Any], expected: str) -> None:
    assert CompareSettings.of(**settings).command_line() == expected


# --- The command ---------------------------------------------------------------------------------------------------

SMALL = ("compare", "--retain", "60%", "--methods", "mmtok", "--budget", "64,1", "--limit", "80", "--rounds", "1")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished search in a directory `run`, with all files that it can write."""
    place = tmp_path_factory.mktemp("searched")
    files = [word for suffix in ("json", "csv", "md") for word in ("--export", str(place / f"out.{suffix}"))]
    done = invoke(*SMALL, "--run-dir", place / "run", *files, "--plot", place / "curve.png", "--batch-size", 8)
    assert done.exit_code == 0, done.output
    (place / "out.txt").write_text(done.stdout)
    yield place


def test_the_answer_comes_first(searched: Path) -> None:
    first = (searched / "out.txt").read_text().splitlines()[0]
    assert first.startswith("mmtok at 64 of 576 tokens keeps ")
    assert first.endswith("from too few rounds for an interval")  # of one round


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.3, 1.5, "makes the first token 1.40x faster (1.30–1.50)"),
        (0.9, 1.5, "speedup to the first token 1.40x (0.90–1.50), inconclusive"),
        (0.8, 0.9, "slower"),
        (None, None, "too few rounds"),
    ],
)
def test_only_a_sure_speedup_is_called_faster(
    searched: Path, low: float | None, high: float | None, words: str
) -> None:
    found = read_retention(searched / "run")
    assert found.timing
    found.timing.results[1].speedup["ttft"] = Speedup(median=1.4, low=low, high=high, conclusive=low in (1.3, 0.8))
    (line,) = answer_lines(found)
    assert words in line and ("faster" in line) == (low == 1.3)


def test_the_result_as_json(searched: Path) -> None:
    found = json.loads((searched / "out.json").read_text())
    assert found["schema"] == "mmtok.retain/1" and found["target"] == 0.6 and not found["interrupted"]
    (decision,) = found["decisions"]
    assert decision["budget"] == "64"
    kept, lost = decision["tried"]
    assert kept["verdict"] == "kept" and kept["low"] >= 0.6 and lost["verdict"] in ("lost", "open")
    assert found["runs"] <= found["grid_runs"]
    assert [case["case"]["budget"] for case in found["timing"]["results"]] == [None, "64"]


def test_the_result_as_csv_and_markdown(searched: Path) -> None:
    rows = list(csv.DictReader((searched / "out.csv").open()))
    assert [row["budget"] for row in rows] == ["64", "1"] and [row["is_answer"] for row in rows] == ["1", "0"]
    assert rows[0]["speedup_ttft"] and not rows[1]["speedup_ttft"]
    text = (searched / "out.md").read_text()
    assert text.startswith("- mmtok at 64") and "| mmtok | 64 |" in text


def test_report_shows_a_saved_search(searched: Path, tmp_path: Path) -> None:
    shown = invoke("report", searched / "run", "--export", tmp_path / "again.csv")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == (searched / "out.txt").read_text()
    assert (tmp_path / "again.csv").read_text() == (searched / "out.csv").read_text()


def test_an_interrupted_search_resumes_to_the_same_result(searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "timing")
    for step in sorted((tmp_path / "run" / "search").iterdir())[1:]:
        step.unlink()
    done = invoke("compare", "--resume", "--run-dir", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    found, before = json.loads(done.stdout), json.loads((searched / "out.json").read_text())
    assert found["decisions"] == before["decisions"] and found["runs"] == before["runs"]


def test_a_search_that_is_resumed_has_no_dry_run_either(searched: Path) -> None:
    done = invoke("compare", "--resume", "--run-dir", searched / "run", "--dry-run")
    assert done.exit_code == 2 and "--dry-run" in done.stderr


@pytest.mark.parametrize("damage", ["missing", "other", "garbage", "no baseline", "no target"])
def test_a_damaged_step_is_refused(searched: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(searched / "run", tmp_path / "run")
    first, second = sorted((tmp_path / "run" / "search").iterdir())[:2]
    if damage == "missing":
        first.unlink()
    elif damage == "other":
        second.write_text(first.read_text())
    elif damage == "no baseline":
        step = json.loads(first.read_text())
        first.write_text(json.dumps(step | {"scores": [score for score in step["scores"] if score["case"]]}))
    elif damage == "no target":
        plan = json.loads((tmp_path / "run" / "search.json").read_text())
        plan["options"]["retain"] = None
        (tmp_path / "run" / "search.json").write_text(json.dumps(plan))
    else:
        first.write_text("{")
    for command in (("report", tmp_path / "run"), ("compare", "--resume", "--run-dir", tmp_path / "run")):
        done = invoke(*command)
        assert done.exit_code == 2 and "Traceback" not in done.output and done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--retain", "100%"), "not a share"),
        (("--retain", "98"), "not a share"),
        (("--retain", "nan%"), "not a share"),
        (("--by", "kind"), "--by requires --retain"),
        (("--retain", "90%", "--by", "colour"), "--by"),
        (("--retain", "90%", "--no-quality"), "--no-quality"),
        (("--retain", "90%", "--layers", "1"), "--layers"),
        (("--retain", "90%", "--batch-size", "1,8"), "one batch size"),
        (("--retain", "90%", "--dry-run"), "--dry-run"),
        (("--retain", "90%", "--export", "page.html"), "--export"),
        (("--methods", "none@4"), "takes no budget"),
        (("--methods", "mmtok@x"), "not a budget"),
        (("--methods", "nosuch@4"), "nosuch"),
    ],
)
def test_options_that_exclude_each_other(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = invoke("compare", *options, "--run-dir", tmp_path / "run")
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) <= 2, done.output
    assert not (tmp_path / "run").exists()


def test_methods_with_budgets_of_their_own() -> None:
    done = invoke(
        "compare", "--methods", "mmtok@16,random @ 4", "--limit", "2", "--rounds", "1", "--no-quality", "--json"
    )
    assert done.exit_code == 0, done.output
    cases = [result["case"] for result in json.loads(done.stdout)["results"]]
    assert [(case["method"], case["budget"]) for case in cases] == [("full", None), ("mmtok", "16"), ("random", "4")]


def test_without_reference_answers_agreement_is_kept(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, sample in enumerate(demo_samples(200)[::5]):
        sample.images[0].save(tmp_path / "images" / f"{number:02d}.png")
    done = invoke(
        *("compare", "--retain", "50%", "--methods", "mmtok", "--budget", "256", "--rounds", "1"),
        *("--data", tmp_path / "images", "--batch-size", "8"),
        *("--question", "What color is the circle?", "--json", "--run-dir", tmp_path / "run"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["measure"] == "agreement with the unreduced model" and found["metric"] is None
    assert found["decisions"][0]["budget"] == "256"


def test_budgets_by_kind_name_the_kinds_that_limit() -> None:
    done = invoke(
        *("compare", "--retain", "60%", "--by", "kind", "--methods", "mmtok", "--budget", "64,16,4", "--limit", "320"),
        *("--batch-size", "8", "--rounds", "1"),
    )
    assert done.exit_code == 0, done.output
    assert "count and digit limit it" in done.stdout.splitlines()[0] and "budgets by kind: " in done.stdout


def test_a_model_that_cannot_do_the_task_is_told(tmp_path: Path) -> None:
    rows = []
    for number, sample in enumerate(demo_samples(120)):
        sample.images[0].save(tmp_path / f"{number:03d}.png")
        rows.append({"image": f"{number:03d}.png", "question": sample.question, "answer": "nothing like it"})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    done = invoke(
        *("compare", "--retain", "90%", "--methods", "random", "--budget", "8", "--data", tmp_path / "data.json"),
        *("--batch-size", "8", "--run-dir", tmp_path / "run"),
    )
    assert done.exit_code == 1 and "cannot do this task" in done.stdout, done.output


def test_parameters_of_methods_are_followed() -> None:
    """Also where one method has none, and no budget is found for another, whose times are not measured."""
    done = invoke(
        *("compare", "--retain", "50%", "--methods", "mmtok,visionzip,random", "--budget", "16", "--limit", "80"),
        *("--batch-size", "8", "--rounds", "1", "--json", "--set", "mmtok.alpha=0.25", "--set", "random.seed=3"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    parameters = {one["method"]: one["tried"][0]["case"]["parameters"] for one in found["decisions"]}
    assert parameters["mmtok"]["alpha"] == 0.25 and parameters["random"]["seed"] == 3
    timed = {one["case"]["method"]: one["case"]["parameters"] for one in found["timing"]["results"]}
    assert timed["mmtok"]["alpha"] == 0.25 and "random" not in timed


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    rows = []
    for number, sample in enumerate(demo_samples(100)[::5]):
        path = tmp_path / f"{number:02d}.png"
        sample.images[0].save(path)
        if number % 4 == 0:
            path.write_bytes(path.read_bytes()[:200])
        rows.append({"image": path.name, "question": sample.question, "answer": sample.references[0]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = ("compare", "--retain", "50%", "--methods", "mmtok", "--rounds", "1", "--json")
    done = invoke(*options, "--budget", "256", "--data", tmp_path / "data.json", "--run-dir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["decisions"][0]["budget"] == "256"
    assert found["left_out"] and all("damaged" in line for line in found["left_out"])
    (tmp_path / "none.json").write_text(json.dumps(rows[:1]))
    for budget in ((), ("--budget", "256")):
        done = invoke(*options, *budget, "--data", tmp_path / "none.json", "--run-dir", tmp_path / "other")
        assert done.exit_code == 2 and "damaged" in done.stderr and not (tmp_path / "other").exists()


def test_fail_below_fails_where_no_budget_is_found() -> None:
    done = invoke(*SMALL, "--limit", "2", "--fail-below", "1")
    assert done.exit_code == 1 and "failed: mmtok: no budget was found" in done.stderr, done.output


def test_the_python_interface(tmp_path: Path) -> None:
    import mmtok_cli as mmtok

    options: dict[str, Any] = {"methods": "random", "budget": [256], "limit": 80, "batch_size": 8, "rounds": 1}
    found = mmtok.find_budgets("demo", 0.5, run_dir=tmp_path / "run", **options)
    assert found.decisions[0].budget == "256" and found.timing is not None
    with pytest.raises(mmtok.MMTokError, match="given budgets"):
        mmtok.compare("demo", retain="90%")
    with pytest.raises(mmtok.MMTokError, match="not a share"):
        mmtok.find_budgets("demo", None)  # type: ignore[arg-type]
    with pytest.raises(mmtok.MMTokError, match="contradict"):
        mmtok.find_budgets("demo", 0.5, new_tokens=3, max_new_tokens=4)
