"""Asks a saved model held-out questions, all vision tokens kept: `python -m mmtok_cli.demo.evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mmtok_cli.demo.dense_drawing import draw_dense
from mmtok_cli.demo.dense_questions import DENSE_KINDS, DenseQuestion, dense_held_out
from mmtok_cli.demo.drawing import draw
from mmtok_cli.demo.questions import KINDS, NEGATIVES, Question, held_out

WEIGHTS = Path(__file__).with_name("weights")
GROUPS = (
    *KINDS,
    *(f"existence {variant}" for variant in ("present", *NEGATIVES)),
    *(f"count {variant}" for variant in ("shape", "colour")),
    "all",
)


def load(directory: Path = WEIGHTS) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in float32, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(directory, local_files_only=True)


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: Sequence[Question | DenseQuestion]
) -> list[str]:
    """Greedy answers to one batch of questions, each a conversation of a single turn."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for question in questions
    ]
    prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [draw(q.scene) if isinstance(q, Question) else draw_dense(q.picture) for q in questions]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    replies = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    batch_size: int = 8,
) -> dict[str, dict[str, dict[str, int]]]:
    """Right answers and questions asked, by group (see `GROUPS`) and by density ("sparse", "dense", "all")."""
    tally = {group: {part: {"right": 0, "asked": 0} for part in ("sparse", "dense", "all")} for group in GROUPS}
    for question, reply in _replies(model, processor, questions, batch_size):
        for group in (question.kind, f"{question.kind} {question.variant}", "all"):
            for part in (question.density, "all"):
                if group in tally:
                    tally[group][part]["asked"] += 1
                    tally[group][part]["right"] += reply == question.answer
    return tally


def evaluate_dense(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[DenseQuestion],
    batch_size: int = 8,
) -> dict[str, dict[str, int]]:
    """Right answers and questions asked about dense pictures, by kind and for "all"."""
    tally = {kind: {"right": 0, "asked": 0} for kind in (*DENSE_KINDS, "all")}
    for question, reply in _replies(model, processor, questions, batch_size):
        for kind in (question.kind, "all"):
            tally[kind]["asked"] += 1
            tally[kind]["right"] += reply == question.answer
    return tally


AnyQuestion = TypeVar("AnyQuestion", Question, DenseQuestion)


def _replies(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[AnyQuestion],
    batch_size: int,
) -> Iterator[tuple[AnyQuestion, str]]:
    starts = range(0, len(questions), batch_size)
    for start in track(starts, "asking", console=Console(stderr=True), transient=True):
        batch = questions[start : start + batch_size]
        yield from zip(batch, answer(model, processor, batch), strict=True)


def table(tally: dict[str, dict[str, dict[str, int]]]) -> Table:
    """Accuracy in percent with the number of questions behind it."""
    grid = Table(title="accuracy % (questions), all vision tokens kept")
    grid.add_column("questions")
    for part in ("all", "sparse", "dense"):
        grid.add_column(part, justify="right")
    for group in GROUPS:
        shown = [_percent(tally[group][part]) for part in ("all", "sparse", "dense")]
        grid.add_row(f"  {group}" if " " in group else group, *shown)
    return grid


def dense_table(tally: dict[str, dict[str, int]]) -> Table:
    """Accuracy in percent with the number of questions behind it."""
    grid = Table(title="accuracy % (questions), dense pictures")
    grid.add_column("questions")
    grid.add_column("all", justify="right")
    for kind, found in tally.items():
        grid.add_row(kind, _percent(found))
    return grid


def _percent(found: dict[str, int]) -> str:
    return f"{100 * found['right'] / found['asked']:.1f} ({found['asked']})" if found["asked"] else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="directory of a saved model")
    parser.add_argument("--questions", type=int, default=1000, help="how many held-out questions about scenes")
    parser.add_argument("--dense", type=int, default=600, help="how many held-out questions about dense pictures")
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    model, processor = load(arguments.model)
    tally = evaluate(model, processor, held_out(arguments.questions, arguments.seed), arguments.batch_size)
    dense = evaluate_dense(model, processor, dense_held_out(arguments.dense, arguments.seed), arguments.batch_size)
    if arguments.json:
        found = {"schema": "mmtok.demo-evaluation/2", "seed": arguments.seed, "accuracy": tally, "dense": dense}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        Console().print(table(tally), dense_table(dense))


if __name__ == "__main__":
    main()
