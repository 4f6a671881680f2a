"""Drafts: a first answer whose words a method covers beside those of the question."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import QUESTION, refused, run, run_json

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.configuration import cases_of, with_writer
from mmtok_cli.data.samples import Sample
from mmtok_cli.drafts import Draft
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.summary import mean_difference
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import reduce
from mmtok_cli.progress import Progress
from mmtok_cli.results.records import digest, planned_case
from mmtok_cli.results.schema import CaseId, Environment, cases_without_draft
from mmtok_cli.settings import CompareSettings
from mmtok_cli.stages import unwatched
from mmtok_cli.timing.runner import run_case

COMPARE = ("compare", "--limit", 2, "--rounds", 1, "--warmup", 0, "--max-new-tokens", 2, "-b", 8)


def drafted(source: str, method: str = "mmtok", budget: int = 8) -> Case:
    return Case(method, make_method(method), Budget(count=budget), draft=Draft(source, 4))


@pytest.mark.parametrize("method", ["mmtok", "mmtok:text"])
def test_an_empty_draft_changes_nothing(vlm: VisionLanguageModel, samples: list[Sample], method: str) -> None:
    plain, empty = (
        reduce(vlm, make_method(method), samples, Budget(percent=25), drafts=drafts) for drafts in ((), ("", "", ""))
    )
    for one, other in zip(plain.selections, empty.selections, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert one.gains is other.gains is None or torch.equal(one.gains, other.gains)


def test_words_of_the_draft_follow_those_of_the_question(vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    seen: list[Any] = []

    class Watching(type(make_method("mmtok"))):  # type: ignore[misc]
        def select(self, vision: Any, text: Any, budget: int) -> Any:
            seen.append(text)
            return super().select(vision, text, budget)

        def select_batch(self, vision: Any, text: Any, budgets: Any) -> Any:
            seen.extend(text)
            return super().select_batch(vision, text, budgets)

    drafts = ("purple hearts", "", "two")
    reduced = reduce(vlm, Watching(), samples, Budget(percent=25), drafts=drafts)
    read = {text.question for text in seen}
    assert read == {f"{sample.question} {draft}".strip() for sample, draft in zip(samples, drafts, strict=True)}
    plain = reduce(vlm, Watching(), samples, Budget(percent=25))
    assert torch.equal(reduced.prompt.input_ids, plain.prompt.input_ids)  # the language model does not read it
    words = next(text.words for text in seen if text.question.endswith("hearts"))
    assert words is None or words[-2:] == ("purple", "hearts")


def test_a_draft_is_a_stage_of_its_own(tiny_sdpa: VisionLanguageModel, samples: list[Sample], ticking: None) -> None:
    case = drafted("self")
    found = run_case(tiny_sdpa, case, samples[:1], 2)
    plain = run_case(tiny_sdpa, replace(case, draft=None), samples[:1], 2)
    assert found.seconds["draft"] > 0 and "draft" not in plain.seconds
    assert found.seconds["ttft"] == pytest.approx(plain.seconds["ttft"] + found.seconds["draft"])
    assert found.drafts == replace(case, draft=None).answer(tiny_sdpa, samples[:1], 4, unwatched).texts
    assert plain.drafts == [] and len(found.drafts) == 1


def test_drafts_of_another_model_and_given_ones(tiny_directory: Path, samples: list[Sample]) -> None:
    settings = CompareSettings.of(
        model=str(tiny_directory), draft=str(tiny_directory), budget="8", methods="mmtok,divprune"
    )
    cases = with_writer(cases_of(settings), settings, Progress())
    assert [str(case) for case in cases] == ["full", "mmtok @ 8", "mmtok + draft @ 8", "divprune @ 8"]
    model = load_model(str(tiny_directory))
    whole = cases[0].answer(model, samples, settings.draft_tokens, unwatched).texts
    assert cases[2].drafts(model, samples) == whole
    assert drafted("text: a red star ").drafts(model, samples) == ["a red star"] * 3


def test_cases_side_by_side() -> None:
    settings = CompareSettings.of(methods="mmtok,fastv,cdpruner", budget="16,4", draft="self", batch_size="1,2")
    ids = [case.id for case in cases_of(settings)]
    assert [str(case) for case in ids[:4]] == ["full", "mmtok @ 16", "mmtok + draft @ 16", "mmtok @ 4"]
    pairs = cases_without_draft(ids)
    assert len(pairs) == 8 and all(ids[plain] == ids[place].without_draft for place, plain in pairs.items())
    assert (ids[2].draft, ids[2].draft_tokens) == ("self", 16) and ids[1].draft is None


def test_what_cannot_be_done_is_refused(photo: Path) -> None:
    for methods in ("divprune", "fastv", "resize,none"):
        refused(run(*COMPARE, "--methods", methods, "--draft", "self"), "cannot use a draft", "mmtok:text")
    refused(run("infer", photo, QUESTION, "--method", "divprune", "--draft", "self"), "cannot use a draft")
    refused(run(*COMPARE, "--draft", "self", "--layers", 2), "a part of a model cannot write a draft")
    refused(run("profile", "--draft", "self", "--scaling"), "--scaling does not measure drafts")
    refused(run(*COMPARE, "--draft", "nosuch"), "there is no model 'nosuch'")
    refused(
        run("compare", "--retain", "98%", "--draft", "self"),
        "--draft is measured with single questions, not with --retain",
    )
    for empty in ("", "text:", " "):
        refused(run(*COMPARE, f"--draft={empty}"), "--draft names no draft")


def test_a_comparison_with_and_without_a_draft(tmp_path: Path) -> None:
    files = [tmp_path / f"result.{kind}" for kind in ("csv", "md", "html", "jsonl")]
    exports = [part for file in files for part in ("--export", file)]
    found = run_json(*COMPARE, "--methods", "mmtok", "--draft", "text:red", *exports)
    full, plain, with_draft = found["results"]
    assert full["draft"] is plain["draft"] is None and "draft" not in plain["seconds"]
    assert with_draft["case"]["draft"] == "text:red" and "draft" in with_draft["seconds"]
    effect = with_draft["draft"]
    assert effect["points"] == pytest.approx(100 * (with_draft["score"] - plain["score"]))
    assert effect["slowdown"]["median"] > 0 and "draft" not in with_draft["speedup"]
    row = list(csv.DictReader(files[0].open()))[2]
    assert row["draft"] == "text:red" and row["draft_median_s"] and row["draft_ttft_ratio"]
    lines = list(map(json.loads, files[3].read_text().splitlines()))
    assert [line["draft"] for line in lines] == [None, None, "text:red"] * (len(lines) // 3)
    said = "mmtok + draft @ 8: with the draft (text:red), compared with mmtok @ 8"
    assert said in files[1].read_text().replace("\\", "") and "stage-draft" in files[2].read_text()
    resumed = run("compare", "--resume", "--run-dir", found["run_directory"])
    assert resumed.exit_code == 0 and said in " ".join(resumed.stderr.split())


def test_pictures_of_a_draft_have_its_answers(tmp_path: Path) -> None:
    files = [tmp_path / "page.html", tmp_path / "answers.jsonl"]
    options = ("--methods", "mmtok", "-b", 1, "--draft", "text:circle square triangle", "--run-dir", tmp_path / "run")
    shown = run(*COMPARE, *options, *(part for file in files for part in ("--export", file)))
    assert shown.exit_code == 0, shown.output
    lines = list(map(json.loads, files[1].read_text().splitlines()))
    answers = {(line["question"], line["draft"]): line["prediction"] for line in lines if line["method"] == "mmtok"}
    index = json.loads((tmp_path / "run" / "overlays" / "index.json").read_text())
    differ = False
    for group in index["groups"]:
        plain, draft = (answers[group["title"], source] for source in (None, "text:circle square triangle"))
        assert [picture["note"] for picture in group["pictures"][1:]] == [f"“{plain}”", f"“{draft}”"]
        differ |= plain != draft
    assert differ  # or nothing was compared


def test_every_command_shows_the_draft(photo: Path, tmp_path: Path) -> None:
    shown = run("infer", photo, QUESTION, "-b", 8, "--draft", "text:a red star", "--baseline")
    assert shown.exit_code == 0 and "draft: a red star" in shown.stdout
    found = run_json("infer", photo, QUESTION, "-b", 8, "--draft", "self", "--draft-tokens", 2)
    assert isinstance(found["draft"], str) and found["seconds"]["draft"] > 0
    assert run_json("prune", photo, QUESTION, "-b", 8, "--draft", "self")["seconds"]["draft"] > 0
    command = ("profile", "-b", "8", "--rounds", 1, "--warmup", 0, "--draft", "self", "--trace-dir", tmp_path / "t")
    result = run_json(*command)
    assert [case["case"]["draft"] for case in result["cases"]] == [None, None, "self"]
    assert result["cases"][2]["flops"]["draft"] > 0
    assert {operator["stage"] for operator in result["operators"]} >= {"draft", "encode"}
    shown = run(*command)
    assert "+ draft @ 8: with the draft (self)" in " ".join(shown.stderr.split())
    tables = shown.stdout.split("Top operators")[0]
    headings = [line.split() for line in tables.splitlines() if "encode" in line and "decode" in line]
    assert sum(words.count("draft") for words in headings if "peaks" not in words) == 3  # seconds, memory, operations
    assert "…" not in tables  # no figure and no heading is cut off


def test_the_difference_of_paired_scores() -> None:
    before, after = [1.0, 0.0, 0.5, 0.0] * 10, [1.0, 0.5, 0.5, 0.0] * 10
    found = mean_difference(before, after, [str(i) for i in range(40)], seed=0)
    assert found.value == pytest.approx(0.125)
    assert found.low is not None and found.high is not None and 0.03 < found.low < 0.125 < found.high < 0.25
    assert mean_difference(before, before, ["a", "b"] * 20, seed=0).value == 0


def test_keys_of_cases_without_a_draft_are_those_of_older_runs() -> None:
    case = CaseId(method="mmtok", parameters={}, budget="8")
    older = {"method": "mmtok", "parameters": {}, "budget": "8", "batch_size": 1, "again": False, "run": None}
    assert CaseId(**older) == case
    environment = Environment.model_construct(device="cpu", layers=None, fallback=None)
    key = planned_case(case, environment, {}).key
    newer = {"command", "fallback", "pixels", "encoder_attention", "linear_layers", "linear_reference"}
    assert key == digest([older, environment.model_dump(exclude=newer), {}])
    assert planned_case(case.model_copy(update={"draft": "self"}), environment, {}).key != key


def test_a_writer_must_be_loaded(tiny_sdpa: VisionLanguageModel, samples: list[Sample]) -> None:
    with pytest.raises(MMTokError, match="there is no model"):
        with_writer([drafted("nosuch")], CompareSettings.of(draft="nosuch"), Progress())
