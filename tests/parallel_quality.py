"""What test_quality.py runs as several processes: demo questions, cases and results, written by one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmtok_cli.budget import Budget
from mmtok_cli.data.datasets import open_dataset
from mmtok_cli.evaluation.predictions import Outcome
from mmtok_cli.evaluation.processes import Processes, ask_all, join_processes
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.timing.runner import Case

CASES = [
    Case("full", make_method("full"), None),
    Case("mmtok", make_method("mmtok"), Budget(count=4)),
    Case("fastv", make_method("fastv"), Budget(count=4)),
]


def ask(processes: Processes) -> dict[str, Any]:
    """All outcomes, and which batches were asked at a time."""
    outcomes: list[Outcome] = []
    batches = []
    for found in ask_all(
        load_model("demo", device="cpu"),
        CASES,
        open_dataset("demo", limit=13),
        processes=processes,
        batch_size=3,
        max_new_tokens=2,
    ):
        batches.append([batch.batch for batch in found])
        outcomes += [item for batch in found for item in batch.items if isinstance(item, Outcome)]
    outcomes.sort(key=lambda o: (o.number, o.case))
    said = [[o.number, o.case, o.answer, o.score, o.closeness.kl, o.closeness.same] for o in outcomes]
    return {"outcomes": said, "batches": batches, "count": processes.count}


def threads() -> list[str]:
    """Names of this process's threads, where the system lists them."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":
    with join_processes("cpu") as all_processes:
        found = ask(all_processes)
    if all_processes.is_writer:
        with Path(sys.argv[1]).open("x", encoding="utf-8") as file:
            json.dump({**found, "threads": threads()}, file)
