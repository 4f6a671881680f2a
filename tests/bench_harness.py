"""What measuring costs beside what is measured: a case of known length, run as `mmtok compare` runs it.

    python tests/bench_harness.py [--milliseconds 100] [--rounds 40]

Prints the harness's share of the time, which is to stay under 2 % at 100 ms per run. What it does between runs, such as
writing records, counts; what it does within a stage would be part of the seconds that it reports.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mmtok_cli.budget import TokenCounts
from mmtok_cli.cases import Case
from mmtok_cli.data.datasets import open_dataset
from mmtok_cli.environment import environment_of
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.pipeline import Answers, Reduced
from mmtok_cli.planning import in_batches, make_plan
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.settings import CompareSettings
from mmtok_cli.stages import STAGES
from mmtok_cli.timing.rounds import Measurement

VOCABULARY = 32_000
SHARES = {"prepare": 0.1, "encode": 0.3, "select": 0.05, "prefill": 0.45, "decode": 0.1}
REDUCED = Reduced(cast(Any, None), [], {}, [], "renumber", [TokenCounts(576, 64, 20, 64.0)])
SAID = Answers(["red"], torch.ones(1, 2, dtype=torch.long), torch.zeros(1, VOCABULARY), 1, [], REDUCED, 0)


@dataclass(frozen=True)
class Sleeper(Case):
    """A case that sleeps through its stages."""

    seconds: float = 0.1

    def answer(self, model: Any, samples: Any, max_new_tokens: int, stage: Any, **options: Any) -> Answers:
        slept = time.perf_counter()
        for name in STAGES:
            with stage(name):
                slept += SHARES[name] * self.seconds
                time.sleep(max(0.0, slept - time.perf_counter()))
        return SAID


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--milliseconds", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
    seconds = chosen.milliseconds / 1000

    model = load_model("demo")
    cases = [Sleeper(name, make_method("full"), None, seconds=seconds) for name in ("full", "a", "b")]
    dataset = open_dataset("demo", limit=chosen.rounds)
    samples = dataset.samples
    plan = make_plan(
        CompareSettings(max_new_tokens=2, rounds=chosen.rounds, warmup=0, limit=chosen.rounds),
        cases,
        dataset,
        environment_of(model),
        len(samples),
    )
    with tempfile.TemporaryDirectory() as scratch, RunDirectory.create(Path(scratch) / "run", plan) as store:
        measurement = Measurement(model, cases, in_batches(samples, [1]), store)
        extra, start, busy = [], time.perf_counter(), time.process_time()
        for number in measurement.rounds():
            end = time.perf_counter()
            measured = sum(store.runs[number, case].seconds["total"] for case in range(len(cases)))
            extra.append((end - start - measured) / len(cases))
            start = end
        busy = (time.process_time() - busy) / len(extra) / len(cases)
    share = statistics.median(extra) / seconds
    sys.stdout.write(
        f"{chosen.rounds} rounds of {len(cases)} cases of {chosen.milliseconds:g} ms: the harness takes "
        f"{1000 * statistics.median(extra):.2f} ms per run (median of rounds), {share:.2%}; "
        f"{1000 * busy:.2f} ms of the processor\n"
    )


if __name__ == "__main__":
    main()
