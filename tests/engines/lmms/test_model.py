"""The model `mmtok` of lmms-eval: every method, kind of request and argument."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmtok_cli
from mmtok_cli.integrations.lmms_eval.demo import TASK
from mmtok_cli.results.costs import read_costs
from mmtok_cli.results.evaluations import read_evaluations
from mmtok_cli.results.schema import CaseResult, Comparison

Evaluate = Callable[..., dict[str, Any]]
BUDGET = 16
METHODS = (  # of each place where methods act some, with and without signals of the encoder
    *("full", "none", "mmtok", "mmtok:stack", "gots", "hiprune", "visionzip", "random", "fastv", "pace", "sparsevlm"),
    *("pyramiddrop", "resize", "resize:pool"),
)


def score(results: dict[str, Any], metric: str = "exact_match", task: str = TASK) -> float:
    return results["results"][task][f"{metric},none"]


def answers(results: dict[str, Any], task: str = TASK) -> list[Any]:
    return [sample["filtered_resps"][0] for sample in results["samples"][task]]


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python -m lmms_eval --model mmtok` with these arguments."""
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "mmtok", *arguments]
    package = str(Path(mmtok_cli.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="session")
def compared(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """`mmtok compare --tasks` of all methods."""
    methods = [name for name in METHODS if name != "full"]
    options: dict[str, Any] = {"tasks": [TASK], "include_path": tasks, "rounds": 1, "warmup": 0, "batch_size": [4]}
    return mmtok_cli.compare(
        "demo", run_dir=tmp_path_factory.mktemp("runs") / "run", methods=methods, budget=[BUDGET], **options
    )


@pytest.fixture(scope="session")
def compared_by_data(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """`mmtok compare --data` on the same questions, which knows nothing of lmms-eval. Of each place where methods act
    one or two, which draw nothing at random: those draw by the name of the image."""
    methods = ["mmtok", "visionzip", "fastv", "sparsevlm", "resize", "none"]
    return mmtok_cli.compare(
        "demo",
        run_dir=tmp_path_factory.mktemp("runs") / "run",
        methods=methods,
        budget=[BUDGET],
        data=str(tasks / "questions.jsonl"),
        rounds=1,
        warmup=0,
        batch_size=[4],
    )


def result_of(comparison: Comparison, name: str) -> CaseResult | None:
    return next((result for result in comparison.results if result.case.method == name), None)


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_compare(
    name: str, evaluate: Evaluate, compared: Comparison, compared_by_data: Comparison
) -> None:
    results = evaluate(f"method={name},budget={BUDGET}", batch_size=4)
    mine = result_of(compared, name)
    assert mine is not None
    assert score(results) == pytest.approx(mine.score)
    official = next(result for result in compared.tasks if result.case.method == name)
    assert official.metrics == {"exact_match": pytest.approx(score(results))}
    kept = results["throughput"]["avg_kept_tokens"]
    assert kept == mine.tokens.kept
    by_data = result_of(compared_by_data, name)
    assert by_data is None or score(results) == pytest.approx(by_data.score)


def test_the_paired_statistics_are_of_the_same_answers(compared: Comparison) -> None:
    base, *others = compared.tasks
    assert base.case.is_baseline and base.retention is None and base.metric == "exact_match"
    lost = [result for result in others if result.score is not None and result.score < (base.score or 0)]
    assert lost, "some method answers worse with 16 tokens, or the demo became too good for this test"
    for result in lost:
        assert result.flips is not None and result.retention == pytest.approx((result.score or 0) / (base.score or 1))
        assert result.flips.right_wrong > result.flips.wrong_right


def test_batches_and_kinds_of_requests_change_nothing(evaluate: Evaluate) -> None:
    whole = answers(evaluate("method=mmtok,budget=4"))
    assert answers(evaluate("method=mmtok,budget=4", batch_size=4)) == whole
    assert answers(evaluate("method=mmtok,budget=4", batch_size=5, force_simple=True)) == whole


def test_log_likelihoods_choose_the_right_answer(evaluate: Evaluate) -> None:
    results = evaluate("method=full", "demo_choice", force_simple=True)
    assert score(results, "acc", "demo_choice") >= 0.9
    (sample, *_) = results["samples"]["demo_choice"]
    losses = [loss for loss, _ in sample["filtered_resps"]]
    assert len(losses) == 3 and all(loss >= 0 for loss in losses)
    greedy = [is_greedy for _, is_greedy in sample["filtered_resps"]]
    assert greedy == [loss == min(losses) for loss in losses]
    none = evaluate("method=none", "demo_choice", force_simple=True)
    assert none["samples"]["demo_choice"][0]["filtered_resps"] != sample["filtered_resps"]


@pytest.mark.parametrize("force_simple", [False, True])
def test_rounds_are_answered_until_the_task_ends_them(evaluate: Evaluate, force_simple: bool) -> None:
    results = evaluate("method=mmtok,budget=64", "demo_rounds", force_simple=force_simple, limit=4)
    plain = evaluate("method=mmtok,budget=64", limit=4)
    assert [first for first, _ in answers(results, "demo_rounds")] == answers(plain)
    assert all(len(rounds) == 2 for rounds in answers(results, "demo_rounds"))
    assert score(results, "rounds", "demo_rounds") == score(plain)


def test_images_among_text_and_stop_strings(evaluate: Evaluate, tasks: Path) -> None:
    from PIL import Image

    from mmtok_cli.data.samples import Sample

    results = evaluate("method=mmtok,budget=16", "demo_two_images", limit=3)
    model = mmtok_cli.load_model("demo")
    for sample, text in zip(results["samples"]["demo_two_images"], answers(results, "demo_two_images"), strict=True):
        with Image.open(tasks / sample["doc"]["image"]) as image:
            picture = image.convert("RGB")
        question = f"First <image> then <image> {sample['doc']['question']}"
        asked = Sample((picture, picture), question, ("one", "two"))
        (expected,) = mmtok_cli.answer(model, "mmtok", asked, 16, max_new_tokens=8).texts
        assert text == expected.partition("e")[0].strip()
    assert results["throughput"]["avg_total_tokens"] == 2 * 576


@pytest.mark.parametrize(
    ("arguments", "task", "options", "said"),
    [
        ("metod=mmtok", TASK, {}, ("no argument 'metod'", "did you mean method?")),
        ("pretrained=llava", TASK, {}, ("no argument 'pretrained'", "did you mean model?")),
        ("method=mmtokk", TASK, {}, ("mmtokk", "did you mean")),
        ("method", TASK, {}, ("'method' in --model_args is not name=value",)),
        ("budget=4,budget=5", TASK, {}, ("budget twice",)),
        ("budget=577", TASK, {}, ("mmtok @ 577", "more than the 576 vision tokens")),
        ("budget=0", TASK, {}, ("a budget of 0 keeps no vision token",)),
        ("seed=x", TASK, {}, ("seed: ", "'x'")),
        ("set=fastv.layer=2", TASK, {}, ("fastv is not among the methods",)),
        ("method=cdpruner", TASK, {}, ("CLIP text tower",)),
        ("device=cpu", TASK, {"device": "cuda"}, ("--device is cuda", "device=cpu")),
        ("", TASK, {"batch_size": "auto"}, ("batch_size auto is not supported",)),
        ("", "demo_sampled", {}, ("demo_sampled: answers would be sampled", "--gen_kwargs do_sample=False")),
        ("", TASK, {"gen_kwargs": "num_beams=4"}, ("4 beams",)),
        ("", TASK, {"gen_kwargs": "repetition_penalty=1.5"}, ("repetition_penalty=1.5 is not supported",)),
        ("", "demo_without_image", {}, ("demo_without_image, document 0", "no image")),
    ],
)
def test_faults_are_one_clear_line(
    evaluate: Evaluate,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    task: str,
    options: dict[str, Any],
    said: tuple[str, ...],
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate(arguments, task, limit=2, **options)
    assert stop.value.code == 2
    line = capsys.readouterr().err.partition("error: ")[2]
    assert all(part in line for part in said), line
    assert "Traceback" not in line


def test_sampling_can_be_switched_off(evaluate: Evaluate) -> None:
    results = evaluate("", "demo_sampled", limit=2, gen_kwargs="do_sample=False,temperature=0")
    assert len(answers(results, "demo_sampled")) == 2


def test_two_processes_are_one(tasks: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    """Also the files: results, costs by process, and what `mmtok report` makes of them."""
    arguments = "model=demo,method=mmtok,budget=10%,set=mmtok.alpha=0.25"
    done = run(
        *("--model_args", arguments, "--tasks", TASK, "--include_path", str(tasks), "--limit", "7"),
        *("--batch_size", "2", "--output_path", str(tmp_path), "--log_samples"),
        launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    )
    assert done.returncode == 0, done.stderr
    found = read_evaluations([tmp_path])
    (evaluation,) = found.evaluations
    assert evaluation.label == "mmtok @ 10%" and evaluation.case and evaluation.case.parameters["alpha"] == 0.25
    one = evaluate(arguments, batch_size=2, limit=7)
    (mine,) = evaluation.scores
    assert (mine.task, mine.metric, mine.value, mine.samples) == (TASK, "exact_match", score(one), 7)
    files = sorted(tmp_path.glob("demo/*_costs.jsonl"))
    parts = [read_costs(file) for file in files]
    assert sorted((header.process, header.processes) for header, _ in parts) == [(0, 2), (1, 2)]
    costs = [cost for _, records in parts for cost in records]
    assert sorted(cost.doc_id for cost in costs) == list(range(7)), "each document once, without padding"
    assert all(cost.tokens.kept == 57 and cost.tokens.total == 576 for cost in costs)
    assert all(set(cost.seconds) >= {"prepare", "encode", "select", "prefill", "decode", "ttft"} for cost in costs)
    assert evaluation.cost is not None and evaluation.cost.samples == 7


def test_the_command_line_ends_with_one_line(tasks: Path) -> None:
    done = run("--model_args", "modle=demo", "--tasks", TASK, "--include_path", str(tasks))
    assert done.returncode == 2
    assert "error: the model mmtok has no argument 'modle'\nhint: did you mean model?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_costs_have_a_path_of_their_own(tasks: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    path = tmp_path / "costs.jsonl"
    evaluate(f"method=full,cost_path={path}", limit=3)
    header, costs = read_costs(path)
    assert header.case.method == "full" and header.case.budget is None
    assert [cost.tokens.kept for cost in costs] == [576] * 3
    assert all(cost.kv_cache > 2_000_000 and cost.batch_size == 1 for cost in costs)
    with pytest.raises(SystemExit):  # it exists
        evaluate(f"method=full,cost_path={path}", limit=3)
