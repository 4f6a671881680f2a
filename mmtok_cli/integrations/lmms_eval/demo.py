"""The demo's held-out questions as a task of lmms-eval, which needs no network.

    python -m mmtok_cli.integrations.lmms_eval.demo FOLDER [QUESTIONS]

writes the task `mmtok_demo`, which lmms-eval finds with `--include_path FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mmtok_cli.data.samples import demo_samples
from mmtok_cli.video import picture_of

TASK = "mmtok_demo"
QUESTIONS = 200
CONFIG = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
metadata:
  version: 1.0
"""
UTILS = '''\
"""Functions of the task."""

from pathlib import Path

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(Path(__file__).parent / doc["image"]).convert("RGB")]
'''


def write_demo_task(folder: Path, questions: int = QUESTIONS) -> None:
    """Write the task with the first `questions` held-out questions: its YAML, functions, data and images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in demo_samples(questions):
        (name,) = sample.image_ids
        if not (folder / f"{name}.png").exists():
            picture_of(sample.images[0]).save(folder / f"{name}.png")
        document = {"image": f"{name}.png", "question": sample.question, "answer": sample.answer, "kind": sample.kind}
        lines.append(json.dumps(document) + "\n")
    data = folder.resolve() / "questions.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(CONFIG.replace("DATA", json.dumps(str(data))), encoding="utf-8")


if __name__ == "__main__":
    write_demo_task(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
