"""What `mmtok compare` was asked to measure, as the command line says it; a run's plan keeps it."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mmtok_cli.errors import MMTokError

if TYPE_CHECKING:
    from mmtok_cli.data.datasets import Dataset
    from mmtok_cli.results.records import Plan

RUNS = Path("runs")


class Request(BaseModel):
    """Options that say what is measured. What is done with the result is no part of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    methods: str
    budget: str | None
    limit: int
    batch_size: str
    rounds: int | None
    runs: int
    min_time: float | None
    warmup: int
    device: str
    dtype: str
    weights: str
    track: str
    positions: str | None
    budget_means: str
    settings: list[str]
    seed: int
    max_new_tokens: int
    data: str = "demo"
    image_root: str | None = None
    question: str | None = None
    columns: str | None = None
    no_quality: bool = False
    layers: int | None = None
    attention: str = "sdpa"
    device_map: str | None = None

    def batch_sizes(self) -> list[int]:
        """The sizes, each once. Raises MMTokError for what is none."""
        sizes = [part.strip() for part in self.batch_size.split(",")]
        for size in sizes:
            if not re.fullmatch(r"[0-9]{1,6}", size) or int(size) < 1:
                raise MMTokError(f"{size!r} is not a batch size", "give one or several, as in --batch-size 1,8")
        return list(dict.fromkeys(map(int, sizes)))

    def column_names(self) -> dict[str, str]:
        """Fields of a sample by what the dataset calls them. Raises MMTokError for what is no `field=name`."""
        parts = [part.strip() for part in (self.columns or "").split(",") if part.strip()]
        pairs = [part.partition("=") for part in parts]
        for part, (field, _, name) in zip(parts, pairs, strict=True):
            if not field.strip() or not name.strip():
                raise MMTokError(f"--columns {part!r} is not field=name", "as in --columns question=text,answer=label")
        return {field.strip(): name.strip() for field, _, name in pairs}

    def open_data(self) -> Dataset:
        """The dataset that was named. Raises MMTokError where there is none to be asked."""
        from mmtok_cli.data.datasets import open_dataset

        return open_dataset(
            self.data,
            image_root=None if self.image_root is None else Path(self.image_root),
            limit=self.limit,
            question=self.question,
            columns=self.column_names(),
        )

    def method_names(self) -> list[str]:
        """The methods, each once."""
        return list(dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip()))

    def resumed(self, plan: Plan, given: Collection[str], directory: Path) -> Request:
        """The request of a plan. given: options that were spelled out now, which must not say anything else.

        Raises MMTokError for one that does.
        """
        then = Request(**plan.options)
        for name in given:
            before, now = getattr(then, name), getattr(self, name)
            if before != now:
                option = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
                raise MMTokError(
                    f"{option} is {_shown(now)} here and {_shown(before)} in the run in {directory}",
                    f"leave {option} out, or begin a new run without --resume",
                )
        return then


def new_directory(model: str) -> Path:
    """Where a run goes that nobody has named: the time and the model."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name) or "model"
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name[:60]}"
    names = [stem, *(f"{stem}-{i}" for i in range(2, 100))]
    return next(path for path in (RUNS / name for name in names) if not path.exists())


def _shown(value: object) -> str:
    return " ".join(value) or "missing" if isinstance(value, list) else "missing" if value is None else str(value)
