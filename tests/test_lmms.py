"""What belongs to lmms-eval and works without it: arguments, requests, cost records and reports of evaluations."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import refused, run, run_json
from PIL import Image

from mmtok_cli.budget import TokenCounts
from mmtok_cli.data.images import image_name
from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.lmms_eval.arguments import merged, parse_arguments, settings_of
from mmtok_cli.integrations.lmms_eval.requests import (
    Generation,
    Place,
    answer_rounds,
    choice_of,
    sample_of,
    sample_of_messages,
)
from mmtok_cli.results.costs import CostFile, CostHeader, SampleCost, read_costs
from mmtok_cli.results.evaluations import read_evaluations
from mmtok_cli.results.schema import CaseId, Environment
from mmtok_cli.rules import Rules
from mmtok_cli.settings import CompareSettings, LmmsSettings, PruneSettings

PLACE = Place("birds", 3, "test")
RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))


# Arguments.


def test_arguments_are_the_options_of_one_case() -> None:
    others = LmmsSettings.model_fields.keys() - {"batch_size", "cost_path"}
    assert others == PruneSettings.model_fields.keys() - {
        *("data", "image_root", "limit", "kept", "frames", "fps", "folder_fps"),
    }
    assert others - {"method"} < CompareSettings.model_fields.keys()
    for name in others:
        assert LmmsSettings.model_fields[name].default == PruneSettings.model_fields[name].default


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("model=llava-1.5-7b,method=mmtok,budget=64", {"model": "llava-1.5-7b", "budget": "64"}),
        (" budget = 10% , budget-means=layer-average", {"budget": "10%", "budget_means": "layer-average"}),
        ("budget_means=layer-average,device_map=auto", {"budget_means": "layer-average", "device_map": "auto"}),
        ("set=mmtok.alpha=0.5", {"parameters": ("mmtok.alpha=0.5",)}),
        ("set=a.b=1,seed=3,set=c.d=(1;2)", {"parameters": ("a.b=1", "c.d=(1;2)"), "seed": 3}),
        ('set=["a.b=1,2","c.d=2"],seed=3', {"parameters": ("a.b=1,2", "c.d=2"), "seed": 3}),
        ('draft="text:red, or blue",draft-tokens=4', {"draft": "text:red, or blue", "draft_tokens": 4}),
        ("draft=text:it's red", {"draft": "text:it's red"}),
        ("weights=random,layers=2", {"weights": "random", "layers": 2}),
        ("cost_path=a/b.jsonl", {"cost_path": Path("a/b.jsonl")}),
    ],
)
def test_arguments_are_read_as_options_are(text: str, fields: dict[str, Any]) -> None:
    assert settings_of(parse_arguments(text)) == LmmsSettings.of(**fields)


def test_options_of_lmms_eval_join_the_arguments() -> None:
    def join(text: str, **options: Any) -> LmmsSettings:
        return settings_of(merged(parse_arguments(text), {"max_batch_size": None, **options}))

    assert join("", batch_size="4", device="cpu") == LmmsSettings.of(batch_size=4, device="cpu")
    assert join("batch_size=4", batch_size=1, device=None).batch_size == 4
    assert join("batch_size=4", batch_size="4").batch_size == 4
    with pytest.raises(MMTokError, match="--batch_size is 2, and --model_args has batch_size=4"):
        join("batch_size=4", batch_size="2")
    with pytest.raises(MMTokError, match="--device is cuda, and --model_args has device=cpu"):
        join("device=cpu", device="cuda")


def test_arguments_from_python_have_types() -> None:
    found = settings_of({"budget": 64, "seed": 7.0, "batch_size": "4", "set": ["a.b=1"], "positions": None})
    assert found == LmmsSettings.of(budget="64", seed=7, batch_size=4, parameters=("a.b=1",))


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("bugdet=4", "no argument 'bugdet'", "did you mean budget?"),
        ("pretrained=x", "no argument 'pretrained'", "did you mean model?"),
        ("zzz=4", "no argument 'zzz'", "It has attention, "),
        ("budget", "'budget' in --model_args is not name=value", "method=mmtok,budget=64"),
        (
            "method=mmtok,random",
            "'random' in --model_args is not name=value",
            "`mmtok compare --tasks` compares several",
        ),
        ("max_new_tokens=4", "max-new-tokens is set by the task", "--gen_kwargs"),
        ("=4", "is not name=value", ""),
        ("budget=4,budget=4", "--model_args has budget twice", "once"),
        ("budget=-1", "'-1' is not a budget", "10%"),
        ("seed=1.5", "seed: ", "mmtok infer --help"),
        ("batch_size=0", "batch-size: ", ""),
        ("batch_size=auto", "batch_size auto is not supported", "--batch_size 4"),
        ("draft-tokens=4", "draft-tokens requires draft", "draft=self"),
        ("set=[1", "set=[1 is not a list", 'set=["fastv.layer=3"'),
        ("layers=many", "layers: ", ""),
    ],
)
def test_arguments_that_cannot_be_followed(text: str, said: str, hint: str) -> None:
    with pytest.raises(MMTokError) as error:
        settings_of(parse_arguments(text))
    assert said in error.value.message and hint in error.value.hint


# Generation arguments.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, Generation(1024)),
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": None}, Generation(16)),
        ({"until": "\n", "max_new_tokens": 8.0}, Generation(8, ("\n",))),
        ({"until": ["ASSISTANT:", ""], "image_aspect_ratio": "pad"}, Generation(1024, ("ASSISTANT:",))),
        ({"do_sample": False, "temperature": 0.7, "top_k": 3}, Generation(1024)),
        ({"do_sample": True, "temperature": 0}, Generation(1024)),
        ({"repetition_penalty": 1.0, "stop": "None"}, Generation(1024)),
    ],
)
def test_greedy_generation(arguments: dict[str, Any] | None, expected: Generation) -> None:
    assert Generation.of(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"do_sample": True}, "sampled"),
        ({"temperature": 0.2}, "sampled (temperature 0.2)"),
        ({"do_sample": True, "temperature": 1}, "sampled (temperature 1)"),
        ({"num_beams": 3}, "3 beams"),
        ({"temperature": "hot"}, "'hot' is not a number"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many'"),
        ({"until": [3]}, "until=[3]"),
    ],
)
def test_other_generation_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MMTokError) as error:
        Generation.of(arguments)
    assert said in error.value.message and error.value.hint


def test_an_answer_ends_at_the_first_stop_string() -> None:
    generation = Generation(8, ("STOP", "\n\n"))
    assert generation.cut("red\n\nblue STOP") == "red" and generation.cut("red STOP\n\n") == "red "
    assert generation.cut("red") == "red" and Generation(8).cut("a\n\n") == "a\n\n"


# Requests.


def request(*arguments: Any, **metadata: Any) -> SimpleNamespace:
    return SimpleNamespace(args=(*arguments, 3, "birds", "test"), metadata=metadata)


DOCUMENTS = {"birds": {"test": {3: {"images": [RED, BLUE]}}}}


def images_of(document: dict[str, Any]) -> list[Image.Image]:
    return document["images"]


def test_a_request_with_a_text() -> None:
    sample = sample_of(request("Which?", {}, images_of), DOCUMENTS)
    assert (sample.question, sample.id, sample.kind, sample.place) == ("Which?", "3", "birds", "birds, document 3")
    assert list(sample.images) == [RED, BLUE]
    assert sample.image_ids == (image_name(RED), image_name(BLUE)) and len(set(sample.image_ids)) == 2


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ([RED, BLUE, "Which?"], "Which?"),
        ([RED, BLUE, "Is <image> darker than <image>?"], "Is <image> darker than <image>?"),
        (["Is ", RED, " darker than ", BLUE, "?"], "Is <image> darker than <image>?"),
        ([RED, "before ", BLUE], "<image>before <image>"),
    ],
)
def test_a_request_with_messages(content: list[Any], question: str) -> None:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part} for part in content
    ]
    sample = sample_of(request("", lambda document: [{"role": "user", "content": parts}], {}), DOCUMENTS)
    assert sample.question == question and list(sample.images) == [RED, BLUE]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": "Which?"}], "birds, document 3: it has no image"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "not an image (video)"),
        ([{"role": "user", "content": [{"type": "image", "url": 3}]}], "not an image (int)"),
        ([{"role": "user", "content": [{"type": "image", "url": "none.png"}]}], "there is no file none.png"),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "messages of system, user"),
    ],
)
def test_messages_that_are_refused(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(MMTokError) as error:
        sample_of_messages(PLACE, messages)
    assert said in error.value.message and error.value.hint


def next_round(document: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> tuple[Any, ...]:
    return [BLUE], f"after {previous_output[-1]} {previous_round_info}", round_idx == 3, previous_output, round_idx


def test_rounds_follow_from_the_answers_before() -> None:
    asked: list[tuple[str, int]] = []

    def ask(sample: Any, number: int) -> str:
        asked.append((sample.question, number))
        return f"answer {number}"

    assert answer_rounds(request("first", {}, images_of, next_round), DOCUMENTS, ask) == [
        "answer 0",
        "answer 1",
        "answer 2",
    ]
    assert asked == [("first", 0), ("after answer 0 None", 1), ("after answer 1 1", 2)]


def test_a_continuation_is_a_text_or_made_of_the_document() -> None:
    assert choice_of(request("Which?", " red", images_of), DOCUMENTS)[1] == " red"
    assert choice_of(request("Which?", lambda document: len(document["images"]), images_of), DOCUMENTS)[1] == "2"
    with pytest.raises(MMTokError, match="without its document"):
        choice_of(SimpleNamespace(args=("", "red"), metadata={}), DOCUMENTS)


def test_padding_requests_are_recognised() -> None:
    assert Place.of(request("", {}, images_of, __padding_only__=True)).padding
    assert not Place.of(request("", {}, images_of)).padding


# Cost records and reports.

STAGES = {"prepare": 0.001, "encode": 0.01, "select": 0.002, "prefill": 0.02, "decode": 0.005, "ttft": 0.033}


def environment() -> Environment:
    return Environment(
        mmtok="1",
        git_commit=None,
        git_dirty=None,
        python="3",
        torch="2",
        transformers="5",
        platform="Linux",
        processor="CPU",
        device="cpu",
        weights="pretrained",
        dtype="float32",
        attention="sdpa",
        threads=1,
        command=[],
    )


def header(method: str, budget: str | None, arguments: str, started: str, **more: Any) -> CostHeader:
    return CostHeader(
        model="demo",
        case=CaseId(method=method, parameters=more.pop("parameters", {}), budget=budget),
        rules=Rules(),
        environment=environment(),
        lmms_eval="0.7.3",
        model_args=arguments,
        started=started,
        **more,
    )


def cost(task: str, number: int, kept: int, *, short: bool = False) -> SampleCost:
    return SampleCost(
        task=task,
        doc_id=number,
        request="generate_until",
        tokens=TokenCounts(576, kept, 10, float(kept), short),
        new_tokens=2,
        seconds={**STAGES, "total": 0.038},
        kv_cache=4096.0,
        batch_size=1,
    )


def results(arguments: str, date: str, scores: dict[str, dict[str, Any]], **more: Any) -> str:
    samples = {task: {"original": 9, "effective": 2} for task in scores}
    found = {"results": scores, "config": {"model": "mmtok", "model_args": arguments}, "date": date}
    return json.dumps({**found, "n-samples": samples, **more})


@pytest.fixture()
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write an evaluation as lmms-eval and the model do; returns the output path."""

    def one(method: str, budget: str | None, minute: int, scores: dict[str, dict[str, Any]], **more: Any) -> Path:
        folder, kept = tmp_path / "out" / "demo", int(budget or 576)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = f"model=demo,method={method}" + (f",budget={budget}" if budget else "")
        date, started = (f"20260101_1200{minute:02d}", f"20260101_1200{minute + 1:02d}")
        processes, short = more.pop("processes", 1), more.pop("short", False)
        (folder / f"{date}_results.json").write_text(results(arguments, date, scores, **more.pop("results", {})))
        for process in range(processes):
            head = header(method, budget, arguments, started, process=process, processes=processes, **more)
            file = CostFile(folder / f"{started}-{process}_costs.jsonl", head)
            file.add([cost(task, process, kept, short=short) for task in scores])
        return tmp_path / "out"

    return one


def test_cost_records_are_read_back(tmp_path: Path) -> None:
    head, costs = header("mmtok", "64", "a", "20260101_120000"), [cost("birds", n, 64) for n in range(3)]
    file = CostFile(tmp_path / "new" / "costs.jsonl", head)
    file.add(costs[:1])
    file.add(costs[1:])
    assert read_costs(file.path) == (head, costs)
    with file.path.open("a") as damaged:
        damaged.write('{"task": "birds"\n')
    with pytest.raises(MMTokError, match=r"costs\.jsonl, line 5 cannot be read"):
        read_costs(file.path)


def test_tasks_x_methods(write: Callable[..., Path]) -> None:
    write("mmtok", "64", 0, {"birds": {"acc,none": 0.6, "f1,none": 30.0, "alias": "birds"}, "fish": {"acc,none": 0.9}})
    scores = {"birds": {"acc,none": 0.8, "acc_stderr,none": 0.1, "f1,none": 40.0}, "fish": {"acc,none": 1.0}}
    folder = write("full", None, 10, scores, processes=2)
    found = read_evaluations([folder])
    full, mmtok = found.evaluations
    assert (full.label, mmtok.label) == ("full", "mmtok @ 64"), "the baseline comes first"
    assert full.cost is not None and full.cost.samples == 4, "of both processes"
    assert [(s.task, s.metric, s.value, s.retention) for s in mmtok.scores] == [
        ("birds", "acc", 0.6, pytest.approx(0.75)),
        ("birds", "f1", 30.0, pytest.approx(0.75)),
        ("fish", "acc", 0.9, pytest.approx(0.9)),
    ]
    assert mmtok.retention == pytest.approx((0.75 + 0.9) / 2), "of the first metric of each task"
    assert mmtok.costs["birds"].kept == 64 and mmtok.costs["birds"].seconds["ttft"] == pytest.approx(0.033)
    assert found.remarks == []


def test_what_cannot_be_compared_has_no_retention(write: Callable[..., Path]) -> None:
    write("mmtok", "64", 0, {"birds": {"acc,none": 0.6}})
    folder = write("full", None, 10, {"birds": {"acc,none": 0.8}}, results={"n-samples": {"birds": {"effective": 5}}})
    found = read_evaluations([folder])
    assert found.evaluations[1].scores[0].retention is None and "no retention for mmtok @ 64" in found.remarks[0]


def test_budgets_that_were_not_met_are_pointed_out(write: Callable[..., Path]) -> None:
    found = read_evaluations([write("mmtok", "64", 0, {"birds": {"acc,none": 0.6}}, short=True)])
    assert "mmtok @ 64: 1 of 1 samples do not meet the budget" in found.remarks


def test_less_is_better(write: Callable[..., Path]) -> None:
    worse = {"higher_is_better": {"birds": {"error": False}}}
    write("mmtok", "64", 0, {"birds": {"error,none": 0.6}}, results=worse)
    found = read_evaluations([write("full", None, 10, {"birds": {"error,none": 0.8}}, results=worse)])
    assert found.evaluations[1].scores[0].retention is None


def test_the_last_of_the_same_evaluations_counts(write: Callable[..., Path]) -> None:
    write("mmtok", "64", 0, {"birds": {"acc,none": 0.1}})
    write("mmtok", "64", 20, {"birds": {"acc,none": 0.2}})
    write("mmtok", "64", 10, {"birds": {"acc,none": 0.3}}, parameters={"alpha": 0.25})
    found = read_evaluations([write("mmtok", "64", 30, {"birds": {"acc,none": 0.4}}, parameters={"alpha": 0.5})])
    assert {one.label: one.scores[0].value for one in found.evaluations} == {
        "mmtok @ 64": 0.2,
        "mmtok @ 64 (alpha 0.25)": 0.3,
        "mmtok @ 64 (alpha 0.5)": 0.4,
    }
    assert "the last is shown, 1 older not" in found.remarks[0]


def test_the_report_shows_and_exports_evaluations(write: Callable[..., Path], tmp_path: Path) -> None:
    write("mmtok", "64", 0, {"birds": {"acc,none": 0.6, "acc,strict": 0.5}})
    folder = write("full", None, 10, {"birds": {"acc,none": 0.8, "acc,strict": 0.5}})
    table, markdown, data = (tmp_path / f"report.{suffix}" for suffix in ("csv", "md", "json"))
    shown = run("report", folder, *(word for path in (table, markdown, data) for word in ("--export", path)))
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["birds", "acc", "full", "2", "576/576", "0.8", "–"] in lines
    assert ["mmtok", "@", "64", "2", "64/576", "0.6", "75.0", "%"] in lines
    assert "mmtok @ 64 75.0 % 10 ms 2 ms 20 ms 33 ms 38 ms 4 KiB".split() in lines
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["filter"], row["method"], row["score"]) for row in rows] == [
        ("none", "full", "0.8"),
        ("none", "mmtok @ 64", "0.6"),
        ("strict", "full", "0.5"),
        ("strict", "mmtok @ 64", "0.5"),
    ]
    assert rows[1]["kept_tokens"] == "64.0" and rows[1]["ttft_mean_s"] == "0.033"
    assert "| birds | acc | mmtok @ 64 | 2 | 64/576 | 0.6 | 75.0 % | 33 ms | 4 KiB |" in markdown.read_text()
    assert json.loads(data.read_text()) == run_json("report", folder)
    assert json.loads(data.read_text())["schema"] == "mmtok.evaluations/1"


def test_results_of_another_model_have_no_costs(tmp_path: Path) -> None:
    (tmp_path / "20260101_120000_results.json").write_text(
        json.dumps({"results": {"birds": {"acc,none": 0.5}}, "config": {"model": "llava_hf", "model_args": "x=1"}})
    )
    shown = run("report", tmp_path)
    assert shown.exit_code == 0 and "llava_hf (x=1)" in " ".join(shown.stdout.split())
    assert "without cost records: llava_hf (x=1)" in " ".join(shown.stderr.split())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("demo/1_results.json", "", "1_results.json cannot be read"),
        ("demo/1_results.json", "[]", "1_results.json cannot be read"),
        ("1_results.json", '{"results": {}}', "config"),
        ("1_results.json", '{"results": {"birds": 3}, "config": {"model": "m"}}', "results.birds"),
        ("1_costs.jsonl", "", "has no results of lmms-eval"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    refused(run("report", tmp_path), said)


def test_damaged_costs_are_refused(write: Callable[..., Path]) -> None:
    folder = write("full", None, 10, {"birds": {"acc,none": 0.8}})
    (file,) = folder.rglob("*_costs.jsonl")
    file.write_text(file.read_text().replace('"kept":576', '"kept":577'))
    refused(run("report", folder), f"{file}, line 2 cannot be read")


def test_folders_without_evaluations_are_refused_as_before(tmp_path: Path, write: Callable[..., Path]) -> None:
    refused(run("report", tmp_path), "is not a run directory")
    folder = write("full", None, 10, {"birds": {"acc,none": 0.8}})
    (tmp_path / "empty").mkdir()
    refused(run("report", folder, tmp_path / "empty"), "empty has no results of lmms-eval")
    refused(run("report", folder, "--export", "page.html"), "does not end in")
    refused(run("report", folder, "--export", folder / "x.csv"), "which this command reads")


# Tasks in compare.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", ""), "--tasks names no task"),
        (("--include-path", "."), "--include-path requires --tasks"),
        (("--tasks", "pope", "--data", "demo:conversations"), "--tasks and --data contradict each other"),
        (("--tasks", "pope", "--data", "demo"), "--tasks and --data contradict each other"),
        (("--tasks", "pope", "--retain", "98%"), "--tasks and --retain contradict each other"),
        (("--tasks", "pope", "--metric", "exact"), "--tasks and --metric contradict each other"),
        (("--metric", "task"), "has no task that judges answers"),
    ],
)
def test_options_that_contradict_tasks(arguments: tuple[str, ...], said: str) -> None:
    refused(run("compare", *arguments), said)


def test_tasks_need_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lmms_eval", None)
    refused(run("compare", "--tasks", "pope"), "--tasks needs lmms-eval", "pip install 'mmtok[lmms]'")
