"""What evaluations by lmms-eval cost: one line of JSON for each sample, below a header.

Each process of an evaluation writes a file of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mmtok_cli.errors import MMTokError
from mmtok_cli.files import require_writable
from mmtok_cli.results.records import Tokens
from mmtok_cli.results.run_directory import parsed, read_file
from mmtok_cli.results.schema import CaseId, Environment, Measure, Number, Record, Seconds, json_text
from mmtok_cli.rules import Rules

SUFFIX = "_costs.jsonl"


class CostHeader(Record):
    """The first line of a file of cost records: what was evaluated.

    model_args: those of lmms-eval, by which its results are found. started: in the clock of lmms-eval's results,
    YYYYMMDD_HHMMSS. process: its number, of `processes`.
    """

    schema_: Literal["mmtok.costs/1"] = Field(default="mmtok.costs/1", alias="schema")
    model: str
    case: CaseId
    rules: Rules
    environment: Environment
    lmms_eval: str
    model_args: str
    started: str
    process: Number = 0
    processes: Annotated[Number, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _is_one_of_the_processes(self) -> Self:
        if self.process >= self.processes:
            raise ValueError("there are fewer processes")
        return self


class SampleCost(Record):
    """What one request of a sample cost.

    request: kind of the request. round: of requests of several rounds, from 0. seconds: by stage, and their sums `ttft`
    and `total`; kv_cache: bytes of keys and values. Both are the share of this sample in its batch of `batch_size`.
    new_tokens: of the answer; of a given continuation for log-likelihoods.
    """

    task: str
    doc_id: Number
    request: str
    tokens: Tokens
    new_tokens: Number
    seconds: dict[str, Seconds]
    kv_cache: Measure
    batch_size: Annotated[Number, Field(ge=1)]
    round: Number = 0


def require_new_file(path: Path) -> None:
    """Raises MMTokError for a file of cost records that cannot be written, and for one that exists."""
    require_writable(path, (".jsonl",), "cost_path")
    if os.path.exists(path):  # noqa: PTH110 (which raises nothing for a name that cannot be)
        raise MMTokError(f"cost_path {path} exists", "name a new file")


class CostFile:
    """A file of cost records that is being written, line by line. Raises MMTokError where it cannot be."""

    def __init__(self, path: Path, header: CostHeader) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(json_text(header) + "\n")
        except OSError as error:
            raise self._unwritten(error) from error

    def add(self, costs: list[SampleCost]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json_text(cost) + "\n" for cost in costs)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> MMTokError:
        return MMTokError(f"{self.path} cannot be written: {error.strerror}", "choose another place with cost_path")


def read_costs(path: Path) -> tuple[CostHeader, list[SampleCost]]:
    """The header and the records of a file. Raises MMTokError that names a line which cannot be read."""
    first, *rest = read_file(path).splitlines() or [b""]
    hint = "delete the file, or evaluate again"
    header = parsed(path, first, CostHeader, hint)
    places = ((Path(f"{path}, line {number}"), line) for number, line in enumerate(rest, 2))
    return header, [parsed(place, line, SampleCost, hint) for place, line in places]
