"""What test_quality.py runs as several processes: demo questions, cases and results, written by one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.datasets import open_dataset
from mmtok_cli.evaluation.predictions import predict
from mmtok_cli.evaluation.processes import Processes, join_processes
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.results.progress import Remaining
from mmtok_cli.results.records import Prediction

CASES = [
    Case("full", make_method("full"), None),
    Case("mmtok", make_method("mmtok"), Budget(count=4)),
    Case("fastv", make_method("fastv"), Budget(count=4)),
]


def evaluate(processes: Processes) -> dict[str, Any]:
    """All predictions, and which batches were evaluated at a time."""
    predictions: list[Prediction] = []
    batches = []
    for step in predict(
        load_model("demo", device="cpu"),
        CASES,
        open_dataset("demo", limit=13),
        Remaining(batch_size=3, cases=[0, 1, 2], batches=[0, 1, 2, 3, 4]),
        processes=processes,
        max_new_tokens=2,
    ):
        batches.append([batch.batch for batch in step])
        predictions += [prediction for batch in step for prediction in batch.predictions]
    predictions.sort(key=lambda p: (p.sample, p.case))
    found = [[p.sample, p.case, p.answer, p.score, p.closeness.kl, p.closeness.same] for p in predictions]
    return {"predictions": found, "batches": batches, "count": processes.count}


def threads() -> list[str]:
    """Names of this process's threads, where the system lists them."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":
    with join_processes("cpu") as all_processes:
        found = evaluate(all_processes)
    if all_processes.is_writer:
        with Path(sys.argv[1]).open("x", encoding="utf-8") as file:
            json.dump({**found, "threads": threads()}, file)
