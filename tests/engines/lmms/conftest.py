"""Local tasks of lmms-eval, made of the demo's held-out questions."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from mmtok_cli.integrations.lmms_eval.demo import TASK, write_demo_task

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

QUESTIONS = 10
COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
doc_to_visual: !function utils.doc_to_visual
"""
METRIC = """\
metric_list:
  - metric: {0}
    aggregation: mean
    higher_is_better: true
"""
# Further tasks about the same images, by name.
TASKS = {
    # POPE's own scoring: one metric is a mean over answers, the others are of all answers together.
    "demo_pope": """\
output_type: generate_until
doc_to_text: !function utils.yes_no_question
doc_to_target: !function utils.yes_or_no
process_results: !function utils.pope_results
generation_kwargs: {max_new_tokens: 4, do_sample: false}
metric_list:
  - {metric: pope_accuracy, aggregation: !function pope.pope_aggregate_accuracy, higher_is_better: true}
  - {metric: pope_f1_score, aggregation: !function pope.pope_aggregate_f1_score, higher_is_better: true}
""",
    "demo_f1_only": """\
output_type: generate_until
doc_to_text: !function utils.yes_no_question
doc_to_target: !function utils.yes_or_no
process_results: !function utils.f1_results
generation_kwargs: {max_new_tokens: 4, do_sample: false}
metric_list:
  - {metric: pope_f1_score, aggregation: !function pope.pope_aggregate_f1_score, higher_is_better: true}
""",
    "demo_choice": "output_type: multiple_choice\ndoc_to_text: question\n"
    "doc_to_target: !function utils.right_choice\ndoc_to_choice: !function utils.choices\n" + METRIC.format("acc"),
    "demo_rounds": "output_type: generate_until_multi_round\ndoc_to_text: !function utils.rounds\n"
    "doc_to_target: answer\nprocess_results: !function utils.rounds_results\n"
    "generation_kwargs: {max_new_tokens: 8, do_sample: false}\n" + METRIC.format("rounds"),
    "demo_two_images": "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    "doc_to_messages: !function utils.two_images\n"
    "generation_kwargs: {max_new_tokens: 8, do_sample: false, until: ['e']}\n" + METRIC.format("exact_match"),
    "demo_sampled": "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    "generation_kwargs: {max_new_tokens: 8, do_sample: true, temperature: 0.7}\n" + METRIC.format("exact_match"),
    "demo_without_image": "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    "doc_to_messages: !function utils.no_image\n"
    "generation_kwargs: {max_new_tokens: 8, do_sample: false}\n" + METRIC.format("exact_match"),
}
UTILS = """

from pope import pope_process_results


def yes_no_question(doc):
    return doc["question"]


def yes_or_no(doc):
    return "yes" if len(doc["answer"]) > 3 else "no"


def pope_results(doc, results):
    document = {"answer": yes_or_no(doc), "question_id": doc["image"]}
    found = pope_process_results(document, ["yes" if results[0] == "yes" or len(results[0]) > 3 else "no"])
    return {name: found[name] for name in ("pope_accuracy", "pope_f1_score")}


def f1_results(doc, results):
    return {"pope_f1_score": pope_results(doc, results)["pope_f1_score"]}


def choices(doc):
    return [doc["answer"], "zebra", "piano"]


def right_choice(doc):
    return 0


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    return doc_to_visual(doc), "How many objects are there?", round_idx == 2, previous_output, round_idx


def rounds_results(doc, results):
    answers = results[0]
    return {"rounds": float(len(answers) == 2 and answers[0] == doc["answer"])}


def two_images(doc):
    image = {"type": "image", "url": doc_to_visual(doc)[0]}
    text = [{"type": "text", "text": text} for text in ("First ", " then ", " " + doc["question"])]
    return [{"role": "user", "content": [text[0], image, text[1], image, text[2]]}]


def no_image(doc):
    return [{"role": "user", "content": [{"type": "text", "text": doc["question"]}]}]
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task `mmtok_demo` and those of TASKS."""
    folder = tmp_path_factory.mktemp("tasks")
    write_demo_task(folder, QUESTIONS)
    for name, text in TASKS.items():
        common = COMMON.replace("DATA", f'"{folder.resolve() / "questions.jsonl"}"')
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    with (folder / "utils.py").open("a") as file:
        file.write(UTILS.replace("from pope", "from lmms_eval.tasks.pope.utils"))
    (folder / "pope.py").write_text("from lmms_eval.tasks.pope.utils import *\n")
    return folder


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def evaluate(tasks: Path) -> Evaluate:
    """lmms-eval in this process: `evaluate("method=mmtok,budget=16")` returns its results of one task."""
    manager = TaskManager("ERROR", include_path=str(tasks), model_name="mmtok")

    def run(arguments: str, task: str = TASK, **options: Any) -> dict[str, Any]:
        found = simple_evaluate(
            "mmtok",
            arguments,
            tasks=[task],
            task_manager=manager,
            bootstrap_iters=0,
            process_docs_parallel=1,
            **options,
        )
        return found

    return run
