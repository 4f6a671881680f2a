"""Tasks of lmms-eval in `mmtok compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmtok_cli
from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.lmms_eval.demo import TASK
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import Comparison
from mmtok_cli.summary import summarise_run


@pytest.fixture(scope="session")
def run(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    directory = tmp_path_factory.mktemp("runs") / "run"
    options: dict[str, Any] = {"tasks": ["demo_pope", "demo_f1_only", TASK], "include_path": tasks, "limit": 6}
    return directory, mmtok_cli.compare(
        "demo", run_dir=directory, methods=["none"], rounds=1, warmup=0, batch_size=[4], **options
    )


def test_each_task_has_its_own_scores(run: tuple[Path, Comparison], evaluate: Any) -> None:
    _, comparison = run
    assert comparison.schedule.samples == 18 and comparison.schedule.metric == "task"
    for task in ("demo_pope", "demo_f1_only", TASK):
        for method in ("full", "none"):
            (mine,) = (r for r in comparison.tasks if r.task == task and r.case.method == method)
            theirs = evaluate(f"method={method}", task, limit=6, batch_size=4)["results"][task]
            expected = {name.removesuffix(",none"): value for name, value in theirs.items() if name.endswith(",none")}
            for name, value in mine.metrics.items():
                assert value == pytest.approx(expected[name])
            assert set(mine.metrics) == {name for name in expected if "_stderr" not in name}


def test_a_metric_of_all_answers_together_is_not_paired(run: tuple[Path, Comparison]) -> None:
    _, comparison = run
    by_task = {result.task: result for result in comparison.tasks if result.case.method == "none"}
    assert by_task["demo_pope"].metric == "pope_accuracy" and by_task["demo_pope"].flips is not None
    alone = by_task["demo_f1_only"]
    assert alone.metric is None and alone.score is None and alone.flips is None and alone.retention is None
    assert alone.metrics.keys() == {"pope_f1_score"}
    assert any("demo_f1_only: no metric is a mean over answers" in remark for remark in comparison.remarks)


def test_a_finished_run_is_read_without_the_tasks(run: tuple[Path, Comparison]) -> None:
    directory, comparison = run
    assert summarise_run(RunDirectory.open(directory)).tasks == comparison.tasks


def test_missing_scores_are_computed_when_a_run_is_resumed(run: tuple[Path, Comparison]) -> None:
    from mmtok_cli.comparison import ComparisonRun
    from mmtok_cli.evaluation.processes import Processes
    from mmtok_cli.progress import Progress
    from mmtok_cli.results.run_directory import read_plan

    directory, comparison = run
    (directory / "tasks.json").unlink()
    again, stopped = ComparisonRun.resumed(read_plan(directory).options, [], directory, Progress()).measure(Processes())
    assert stopped is None and again.tasks == comparison.tasks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ["mmtok_dmeo"]}, "no task 'mmtok_dmeo'"),
        ({"tasks": ["demo_choice"]}, "asks for multiple_choice"),
        ({"tasks": ["demo_sampled"]}, "answers would be sampled"),
        ({"tasks": ["demo_without_image"]}, "no image"),
        ({"tasks": [TASK], "include_path": Path("nowhere")}, "nowhere is not a folder"),
        ({"tasks": [TASK], "metric": "exact"}, "--tasks and --metric contradict each other"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused(tasks: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MMTokError, match=said):
        mmtok_cli.compare("demo", **{"include_path": tasks, **options})
