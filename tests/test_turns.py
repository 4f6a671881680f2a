"""Conversations on the command line and from Python: measured turn by turn, saved, resumed, shown."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from cli_helpers import refused, run, run_json, run_process
from comparisons import HOSTILE_TEXTS, case, comparison, is_harmless
from conftest import picture

import mmtok_cli as mmtok
from mmtok_cli.conversation import Conversation
from mmtok_cli.data.samples import Sample, demo_conversations
from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.report.exports import write_export
from mmtok_cli.results.progress import is_finished
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import CaseId, Comparison, TurnResult, from_json, json_text
from mmtok_cli.rules import TurnPolicy
from mmtok_cli.summary import summarise_run

FIRST, SECOND, THIRD = "Is there a red circle?", "How many stars are there?", "What color is the heart?"
CASES = [("full", None), *((m, p) for m in ("mmtok", "uniform") for p in ("reuse", "union"))]


@pytest.fixture()
def talks(tmp_path: Path) -> Path:
    """Three conversations of three, two and three turns; answers are known of the first two."""
    rows = []
    for number, questions in enumerate([[FIRST, SECOND, THIRD], [SECOND, FIRST], [THIRD, FIRST, SECOND]]):
        picture(84, 84, number).save(tmp_path / f"{number}.png")
        row: dict[str, Any] = {"image": f"{number}.png", "questions": questions}
        rows.append(row if number == 2 else row | {"answers": ["red", "2", "blue"][: len(questions)]})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture()
def command(tiny_directory: Path, talks: Path) -> tuple[Any, ...]:
    common = ("-m", tiny_directory, "--data", talks, "-b", "4", "--max-new-tokens", 3, "--warmup", 0, "--rounds", 1)
    return ("compare", *common, "--methods", "mmtok,uniform", "--turns", "reuse,union")


def answers_of(directory: Path) -> dict[tuple[int, int, str | None], list[str]]:
    store = RunDirectory.open(directory)
    return {
        (number, run.case, run.policy): [turn.answer for turn in run.turns]
        for number, record in store.conversations.items()
        for run in record.runs
    }


def test_each_turn_and_all_together_are_measured(command: tuple[Any, ...], tmp_path: Path) -> None:
    found = run_json(*command, "--run-dir", tmp_path / "run")
    turns = found["turns"]
    assert [(t["case"]["method"], t["policy"], t["turn"]) for t in turns] == [
        (*case, turn) for case in CASES for turn in (1, 2, 3, None)
    ]
    assert [t["conversations"] for t in turns[:4]] == [3, 3, 2, 3]
    assert found["schedule"]["conversations"] == 3 and not found["interrupted"]
    for turn in turns:
        assert set(turn["seconds"]) == {"prepare", "encode", "select", "prefill", "decode", "ttft", "total"}
        assert len(turn["seconds"]["total"]["values"]) == turn["conversations"]
        assert (turn["encoder_outputs"] > 0) is (turn["policy"] == "union")
        assert turn["speedup"] == {} if turn["policy"] is None else turn["speedup"].keys() >= {"ttft", "total"}
    by_case = {(t["case"]["method"], t["policy"], t["turn"]): t for t in turns}
    for method in ("mmtok", "uniform"):
        later = by_case[method, "reuse", 2]
        assert later["seconds"]["encode"]["median"] == later["seconds"]["select"]["median"] == 0
        assert later["tokens"]["kept"] == 4
    assert by_case["uniform", "union", 3]["tokens"]["kept"] == 4  # it does not read the question
    assert 4 < by_case["mmtok", "union", 3]["tokens"]["kept"] <= 12
    assert from_json(Comparison, json_text(found)).turns


def test_answers_are_those_of_a_conversation(
    command: tuple[Any, ...], tmp_path: Path, tiny_sdpa: Llava, talks: Path
) -> None:
    run_json(*command, "--run-dir", tmp_path / "run")
    said = answers_of(tmp_path / "run")
    sample = mmtok.load_sample(talks.parent / "0.png", FIRST)
    with Conversation(tiny_sdpa, mmtok.make_method("full"), sample, None, max_new_tokens=3) as conversation:
        expected = [conversation.ask(question).text for question in (FIRST, SECOND, THIRD)]
    assert said[0, 0, None] == expected
    from_python = mmtok.converse(tiny_sdpa, "mmtok", sample, [SECOND, THIRD], 4, policy="union", max_new_tokens=3)
    assert said[0, 1, "union"] == [turn.text for turn in from_python]
    assert from_python[1].seconds["prefill"] > 0 and from_python[1].tokens.kept > 4
    with pytest.raises(MMTokError, match="is not a policy"):
        mmtok.converse(tiny_sdpa, "mmtok", sample, [SECOND], 4, policy="keep")  # type: ignore[arg-type]


KILL = """
import os, signal
from collections import Counter
from itertools import product
from pathlib import Path
usual, written = Path.replace, []
def replace(self, target):
    if Path(target).parent.name == "conversations":
        written.append(target)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return usual(self, target)
Path.replace = replace
"""


def test_killed_and_resumed(command: tuple[Any, ...], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = run_process(*command, "--run-dir", directory, before=KILL)
    assert process.returncode == -9
    store = RunDirectory.open(directory)
    assert sorted(store.conversations) == [0, 1] and not is_finished(store)
    partial = summarise_run(store)
    assert partial.interrupted and {turn.conversations for turn in partial.turns if turn.turn is None} == {2}
    assert "2 of 3 conversations" in run("report", directory).stderr
    before = {path.name: path.read_bytes() for path in (directory / "conversations").glob("*.json")}
    resumed = run_json("compare", "--run-dir", directory, "--resume")
    assert not resumed["interrupted"] and resumed["schedule"]["conversations"] == 3
    after = {path.name: path.read_bytes() for path in (directory / "conversations").glob("*.json")}
    assert before.items() <= after.items() and len(after) == 3
    run_json(*command, "--run-dir", tmp_path / "whole")
    assert answers_of(directory) == answers_of(tmp_path / "whole")
    refused(run("compare", "--run-dir", directory, "--resume", "--turns", "reuse"), "--turns")


def test_damaged_conversations_are_named(command: tuple[Any, ...], tmp_path: Path) -> None:
    run_json(*command, "--run-dir", tmp_path / "run")
    path = tmp_path / "run" / "conversations" / "000001.json"
    whole = json.loads(path.read_text())
    damaged: list[dict[str, Any]] = [
        whole | {"key": "0" * 16},
        whole | {"conversation": 2},
        whole | {"runs": [*whole["runs"], whole["runs"][0]]},
        whole | {"runs": [whole["runs"][0] | {"policy": "reselect"}]},
        whole | {"runs": [run | {"turns": run["turns"][: 1 + place % 2]} for place, run in enumerate(whole["runs"])]},
        whole | {"problem": "too long"},
    ]
    for content in damaged:
        path.write_text(json.dumps(content))
        refused(run("report", tmp_path / "run"), "000001.json cannot be read")
    path.unlink()
    assert summarise_run(RunDirectory.open(tmp_path / "run")).interrupted


def test_a_case_that_fails_is_left_out_of_later_conversations(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Conversation.__init__

    def failing(
        self: Conversation, model: Any, method: Any, sample: Sample, budget: Any, policy: TurnPolicy, **options: Any
    ) -> None:
        if policy == "union" and sample.question == SECOND:
            raise RuntimeError("out of luck")
        usual(self, model, method, sample, budget, policy, **options)

    monkeypatch.setattr(Conversation, "__init__", failing)
    found = run_json(*command, "--run-dir", tmp_path / "run")
    assert {(t["case"]["method"], t["policy"]) for t in found["turns"]} == {c for c in CASES if c[1] != "union"}
    assert found["unevaluated"] == [] and len(found["remarks"]) == 2
    for name, remark in zip(("mmtok @ 4", "uniform @ 4"), found["remarks"], strict=True):
        assert remark.startswith(f"{name} with --turns union failed in a conversation and has no turns: error: Runtime")
        assert remark.endswith("run/conversations")
    assert found["turns"][0]["conversations"] == 3
    shown = run("report", tmp_path / "run")
    assert shown.exit_code == 0 and "out of luck" in shown.stderr


def test_a_conversation_that_is_refused_is_left_out_of_all_cases(
    command: tuple[Any, ...], tmp_path: Path, talks: Path
) -> None:
    long = {"image": "0.png", "questions": [FIRST, "star " * 2040], "answers": ["yes", "no"]}
    marked = {"image": "0.png", "questions": [FIRST, "Is <image> red?"], "answers": ["yes", "no"]}
    talks.write_text(talks.read_text() + json.dumps(long) + "\n" + json.dumps(marked) + "\n")
    found = run_json(*command, "--run-dir", tmp_path / "run")
    assert found["turns"][0]["conversations"] == 3 and not found["interrupted"]
    problems = [line for line in found["left_out"] if "conversation" in line]
    assert len(problems) == 2 and "do not fit" in problems[0] and "marker" in problems[1]


def test_exports_have_the_turns(command: tuple[Any, ...], tmp_path: Path) -> None:
    files = [tmp_path / f"out.{kind}" for kind in ("csv", "md", "html", "json")]
    exports = [part for file in files for part in ("--export", file)]
    shown = run(*command, "--run-dir", tmp_path / "run", *exports)
    assert shown.exit_code == 0, shown.output
    for title in (
        "Score per turn (3 conversations)",
        "Retention per turn",
        "Time to first token per turn",
        "Whole conv",
    ):
        assert title in shown.stdout
    assert "union: newly selected tokens" in " ".join(shown.stderr.split())
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    cases, turns = [r for r in rows if not r["turn"]], [r for r in rows if r["turn"]]
    assert len(cases) == 3 and len(turns) == 4 * len(CASES)
    found = json.loads(files[3].read_text())["turns"]
    for row, turn in zip(turns, found, strict=True):
        assert row["method"] == turn["case"]["method"] and row["turn_policy"] == (turn["policy"] or "")
        assert row["turn"] == ("all" if turn["turn"] is None else str(turn["turn"]))
        assert float(row["ttft_median_s"]) == turn["seconds"]["ttft"]["median"]
        assert float(row["encoder_output_bytes"]) == turn["encoder_outputs"]
    markdown = files[1].read_text()
    assert "Turns of conversations:" in markdown and markdown.count("| mmtok @ 4") == 8
    page = files[2].read_text()
    assert "Conversations, turn by turn" in page and page.count('<th scope="row" data-value="mmtok @ 4">') == 8
    again = run("report", tmp_path / "run", "--export", tmp_path / "again.csv")
    assert again.exit_code == 0 and (tmp_path / "again.csv").read_text() == files[0].read_text()


def test_runs_are_merged_with_their_turns(command: tuple[Any, ...], tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_json(*command, "--run-dir", tmp_path / name)
    merged = run_json("report", tmp_path / "a", tmp_path / "b")
    assert [t["case"]["run"] for t in merged["turns"]] == ["A"] * 20 + ["B"] * 20
    assert "B: mmtok @ 4" in run("report", tmp_path / "a", tmp_path / "b").stdout


def test_without_answers_agreement_is_shown(tiny_directory: Path, talks: Path, tmp_path: Path) -> None:
    talks.write_text(talks.read_text().splitlines()[2] + "\n")
    common = ("-m", tiny_directory, "--data", talks, "-b", "4", "--max-new-tokens", 2, "--rounds", 1)
    shown = run("compare", *common, "--methods", "random:inside", "--turns", "reselect", "--encode-again")
    assert shown.exit_code == 0, shown.output
    assert "Answers identical to the unreduced model's, per turn (1 conversation)" in " ".join(shown.stdout.split())
    assert "Retention per turn" not in shown.stdout and "encoder outputs:" not in shown.stderr


def test_several_batch_sizes_converse_once(command: tuple[Any, ...], tmp_path: Path) -> None:
    found = run_json(*command, "--batch-size", "2,1", "--run-dir", tmp_path / "run")
    assert len(found["results"]) == 6 and len(found["turns"]) == 4 * len(CASES)
    assert {t["case"]["batch_size"] for t in found["turns"]} == {1}


def test_the_plan_counts_conversations(command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = [run_json(*command, "--dry-run"), run_json(*command[:-2], "--dry-run")]
    assert all(plan["samples"] == 3 for plan in estimated)
    parts = [plan["quality_seconds"] / max(case["seconds"] for case in plan["cases"]) for plan in estimated]
    assert parts[0] > parts[1]


def test_what_cannot_be_measured_is_refused(command: tuple[Any, ...], tiny_directory: Path, talks: Path) -> None:
    refused(run(*command, "--methods", "random:inside"), "union does not suit", "inside the language model")
    refused(run(*command, "--no-quality"), "--turns needs the answers, which --no-quality")
    refused(run(*command, "--layers", 3), "--turns needs the answers, which --layers")
    refused(run(*command, "--prompt-tokens", 30), "--prompt-tokens sets the length of single")
    retained = ("compare", "--data", talks, "--turns", "reuse", "--retain", "98%")
    refused(run(*retained), "--retain searches with single questions")
    refused(run(*command[:-2], "--encode-again"), "--encode-again requires --turns")
    refused(run("compare", "--turns", "reuse", "--limit", 2), "demo:conversations")
    single = talks.with_name("single.jsonl")
    single.write_text(json.dumps({"image": "0.png", "question": FIRST}) + "\n")
    refused(run("compare", "-m", tiny_directory, "--data", single, "--turns", "reuse"), "several questions per image")
    for text in ("", "reuse,keep", "Reuse"):
        refused(run(*command[:-1], text), "is not a policy", "reuse, reselect, union")
    assert not Path("runs").exists()


def test_a_template_without_room_for_turns_is_refused_before_measuring(
    command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(self: VisionLanguageModel, *arguments: Any) -> None:
        raise MMTokError("the chat template of tiny changes earlier turns", "use another")

    monkeypatch.setattr(VisionLanguageModel, "next_turn", unusable)
    refused(run(*command), "changes earlier turns")
    assert not Path("runs").exists()


def test_infer_holds_a_conversation(photo: Path, tiny_directory: Path) -> None:
    common = ("infer", photo, FIRST, "-m", tiny_directory, "-b", "4", "--max-new-tokens", 3, "--turn", SECOND)
    found = run_json(*common, "--turn", THIRD, "--turns", "union", "--baseline")
    assert found["policy"] == "union" and [turn["question"] for turn in found["turns"]] == [FIRST, SECOND, THIRD]
    kept = [turn["tokens"]["kept"] for turn in found["turns"]]
    assert kept[0] == 4 < kept[1] <= kept[2] and found["turns"][0]["memory"]["encoder_outputs"] > 0
    assert [turn["tokens"]["kept"] for turn in found["baseline"]["turns"]] == [36] * 3
    assert found["baseline"]["turns"][1]["memory"]["encoder_outputs"] == 0
    shown = run(*common, "--baseline")
    assert shown.exit_code == 0, shown.output
    lines = [line.strip() for line in shown.stdout.splitlines()]
    asked = lines.index(SECOND)
    assert lines[0] == FIRST and lines[asked + 1].startswith("mmtok @ 4: ") and lines[asked + 2].startswith("full: ")
    assert "encoder" not in shown.stdout  # nothing is kept for --turns reuse
    single = run_json("infer", photo, FIRST, "-m", tiny_directory, "-b", "4", "--max-new-tokens", 3)
    assert single["answer"] == found["turns"][0]["answer"]


def test_conversations_that_infer_refuses(photo: Path, tiny_directory: Path) -> None:
    common = ("infer", photo, FIRST, "-m", tiny_directory, "-b", "4")
    refused(run(*common, "--turns", "union"), "--turns requires --turn")
    refused(run(*common, "--encode-again"), "--encode-again requires --turn")
    refused(run(*common, "--turn", " "), "the question is empty")
    refused(run(*common, "--turn", "Is <image> red?"), "marker")
    refused(run(*common, "--turn", "star " * 3000), "do not fit")
    refused(run(*common, "--turn", SECOND, "--turns", "union", "--method", "random:inside"), "does not suit")
    refused(run(*common, "--turn", SECOND, "--turns", "nosuch"), "is not a policy")


def test_the_first_question_alone_counts_without_turns(command: tuple[Any, ...], tmp_path: Path) -> None:
    found = run_json(*command[:-2], "--run-dir", tmp_path / "run")
    assert found["turns"] == [] and found["schedule"]["conversations"] is None
    assert not (tmp_path / "run" / "conversations").exists()


def test_two_processes_share_the_conversations(command: tuple[Any, ...], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmtok_cli"]
    for more in ((), ("--resume",)):
        options = [*map(str, command), "--device", "cpu", "--run-dir", str(tmp_path / "two"), *more]
        done = subprocess.run([*launch, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    run_json(*command, "--device", "cpu", "--run-dir", tmp_path / "one")
    assert answers_of(tmp_path / "two") == answers_of(tmp_path / "one")
    assert len(answers_of(tmp_path / "one")) == 3 * len(CASES)


def test_scores_and_retention_are_those_of_each_turn(command: tuple[Any, ...], tmp_path: Path) -> None:
    run_json(*command, "--run-dir", tmp_path / "run")
    scores = {("full", None): [[1, 0.5, 1], [1, 0]], ("mmtok", "reuse"): [[1, 0, 1], [0.5, 1]]}
    store = RunDirectory.open(tmp_path / "run")
    for number, record in store.conversations.items():
        runs = []
        for each in record.runs:
            name = store.plan.cases[each.case].case.method, each.policy
            given = scores.get(name, scores["full", None])
            turns = [
                turn.model_copy(update={"score": given[number][place] if number < 2 else None, "answer": name[0]})
                for place, turn in enumerate(each.turns)
            ]
            runs.append(each.model_copy(update={"turns": turns}))
        store.conversations[number] = record.model_copy(update={"runs": runs})
    found = {(t.case.method, t.policy, t.turn): t for t in summarise_run(store).turns}
    assert [found["full", None, turn].score for turn in (1, 2, 3, None)] == [1, 0.25, 1, 0.7]
    assert [found["mmtok", "reuse", turn].score for turn in (1, 2, 3, None)] == [0.75, 0.5, 1, 0.7]
    assert [found["mmtok", "reuse", turn].retention for turn in (1, 2, 3, None)] == [0.75, 2, 1, 1]
    whole = found["mmtok", "reuse", None]
    assert whole.same == 0 and whole.retention_low is not None and whole.retention_high is not None
    assert 0.5 < whole.retention_low < 1 < whole.retention_high < 2  # between those of the two conversations
    assert found["full", None, None].retention is None and found["full", None, None].same is None
    seconds = [
        sum(turn.seconds["total"] for turn in store.conversations[n].by_case[1, "reuse"].turns) for n in range(3)
    ]
    assert whole.seconds["total"].values == pytest.approx(seconds)
    base = [sum(turn.seconds["total"] for turn in store.conversations[n].by_case[0, None].turns) for n in range(3)]
    ratios = sorted(a / b for a, b in zip(base, seconds, strict=True))
    assert whole.speedup["total"].median == pytest.approx(ratios[1])


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_names_in_turns_are_harmless_everywhere(text: str, tmp_path: Path) -> None:
    usual = case("full", 576)
    turns = [
        TurnResult(
            case=CaseId(method=text, parameters={}, budget="4", run=text),
            policy="reuse",
            turn=turn,
            conversations=3,
            tokens=usual.tokens,
            seconds=usual.seconds | {"encode": usual.seconds["prefill"]},
            speedup={},
            kv_cache=10,
            encoder_outputs=0,
        )
        for turn in (1, None)
    ]
    found = comparison([usual]).model_copy(update={"turns": turns})
    for kind in ("csv", "md", "html"):
        path = tmp_path / f"out.{kind}"
        write_export(found, path)
        written = path.read_text()
        assert is_harmless(written) and (kind != "html" or "<img src=x" not in written)
    with (tmp_path / "out.csv").open() as file:
        assert not any(value.startswith("=") for row in csv.DictReader(file) for value in row.values())


def test_the_demo_shows_where_reuse_breaks() -> None:
    """Tokens that were chosen for the first question do not show what later ones are about."""
    model = mmtok.load_model("demo", device="cpu")
    right: Counter[tuple[str, str]] = Counter()
    for sample in demo_conversations(10):
        for method, policy in product(("mmtok", "divprune"), get_args(TurnPolicy)):
            questions = [turn.question for turn in sample.later]
            turns = mmtok.converse(model, method, sample, questions, 4, policy=policy, max_new_tokens=2)
            answers = [turn.answer for turn in sample.later]
            right[method, policy] += sum(turn.text == answer for turn, answer in zip(turns[1:], answers, strict=True))
    assert right["mmtok", "reuse"] + 3 <= right["mmtok", "reselect"]
    assert right["divprune", "reuse"] == right["divprune", "reselect"] == right["divprune", "union"]
