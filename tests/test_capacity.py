"""The largest batch that fits into memory."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import run, run_json
from comparisons import case

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method
from mmtok_cli.models.llava import Llava
from mmtok_cli.option_values import LARGEST_BATCH
from mmtok_cli.report.cells import largest_batch_cell
from mmtok_cli.settings import AnswerLength
from mmtok_cli.timing import capacity
from mmtok_cli.timing.capacity import fitting, largest_batch, line, search

LENGTH = AnswerLength(max_new_tokens=4, ignore_eos=True)
FULL = Case("full", make_method("full"), None)
REDUCED = Case("mmtok", make_method("mmtok"), Budget(count=4))


def test_a_line_through_two_peaks() -> None:
    assert line([150, 250]) == (50, 100)
    assert line([100, 210]) == (0, 110)  # more than in proportion: nothing is fixed
    assert fitting(1050, 50, 100) == 10 and fitting(49, 50, 100) == 0
    assert fitting(10**12, 0, 1) == LARGEST_BATCH


@pytest.mark.parametrize("true", [2, 3, 7, 64, 100, 1000, LARGEST_BATCH])
@pytest.mark.parametrize("off", [0.2, 0.9, 1.0, 1.05, 1.5, 4.0])
def test_the_search_finds_the_limit_from_a_rough_estimate(true: int, off: float) -> None:
    """Whatever it returns was run, and fits; nothing that fits is larger by more than a few percent."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= true

    found = search(min(LARGEST_BATCH, int(true * off)), fits)
    assert found <= true and (found in tried or found == 2)
    assert true - found <= max(1, true // 16)
    assert len(tried) == len(set(tried)) <= capacity.MOST_TRIES


@pytest.fixture()
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """64 MiB of memory, whatever the machine has."""
    monkeypatch.setattr(capacity, "free_memory", lambda device: 64 * 2**20)
    return 64 * 2**20


def test_on_a_cpu_it_is_computed_from_peaks(free: int, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    full, reduced = (largest_batch(tiny_sdpa, case, samples[0], LENGTH) for case in (FULL, REDUCED))
    assert full and reduced and not full.measured and full.free == free
    assert full.size == (free - full.fixed) // full.per_sample > 0
    assert reduced.size >= full.size  # the encoder of the tiny model takes most, whatever is kept
    # The KV cache of a sample is a part of what it takes.
    cache = FULL.answer(tiny_sdpa, samples[:1], 4, stage=lambda name: torch.no_grad()).kv_cache_bytes
    assert full.per_sample > cache


def test_layers_that_are_not_run_take_memory(
    free: int, tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = largest_batch(tiny_sdpa, FULL, samples[0], LENGTH)
    monkeypatch.setattr(tiny_sdpa, "depth", 40)  # 36 more than the tiny model has
    part = largest_batch(tiny_sdpa, FULL, samples[0], LENGTH)
    assert whole and part and part.size < whole.size and part.per_sample > whole.per_sample


def test_memory_that_runs_out(free: int, samples: list[Sample], tiny_sdpa: Llava, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    usual = Case.answer
    monkeypatch.setattr(Case, "answer", fail)
    assert largest_batch(tiny_sdpa, FULL, samples[0], LENGTH) is None
    monkeypatch.setattr(
        Case, "answer", lambda self, model, batch, *a, **b: [fail, usual][len(batch) == 1](self, model, batch, *a, **b)
    )
    single = largest_batch(tiny_sdpa, FULL, samples[0], LENGTH)
    assert single and (single.size, single.measured) == (1, True)
    assert not capacity._fits(tiny_sdpa.device, fail, 8)
    with pytest.raises(ZeroDivisionError):
        capacity._fits(tiny_sdpa.device, lambda size: 1 // 0, 8)


@pytest.mark.gpu
def test_on_a_gpu_it_is_run(samples: list[Sample]) -> None:
    from tiny_models import FAMILIES

    vlm = FAMILIES["llava"]("sdpa")
    vlm.model.to("cuda")
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device="cuda")  # leaves about 1 GiB
    found = largest_batch(vlm, FULL, samples[0], LENGTH)
    del held
    assert found and found.measured and found.size > 2


def test_it_is_in_every_format(free: int, tiny_directory: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"profile.{kind}" for kind in ("json", "csv", "md")]
    written = [part for file in files for part in ("--export", file)]
    result = run(
        *("profile", "--model", tiny_directory, "--methods", "random", "--budget", 4, "--batch-size", "1,2"),
        *("--rounds", 1, "--warmup", 0, "--new-tokens", 2, "--find-batch", *written),
    )
    assert result.exit_code == 0, result.output
    assert "largest batch" in " ".join(result.stdout.split())
    assert "largest batch: computed (~)" in " ".join(result.stderr.split())
    cases = json.loads(files[0].read_text())["cases"]
    found = [case["largest_batch"]["size"] for case in cases]
    assert found[1] >= found[0] > 0 and found[:2] == found[2:]
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [int(row["largest_batch"]) for row in rows] == found
    assert {row["largest_batch_measured"] for row in rows} == {"False"}
    assert f"~ {found[1]} |" in files[2].read_text().replace("\\", "")


def test_a_comparison_finds_it_once_and_keeps_it(
    free: int, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, searched = tmp_path / "run", []
    usual = capacity.largest_batch

    def counted(model: Any, case: Case, *rest: Any) -> Any:
        searched.append(case)
        return usual(model, case, *rest)

    monkeypatch.setattr("mmtok_cli.timing.rounds.largest_batch", counted)
    model = ("--model", tiny_directory, "--methods", "random", "--budget", 4)
    common = ("compare", "--limit", 4, *model, "--warmup", 0, "--no-quality")
    first = run_json(*common, "--rounds", 1, "--batch-size", "1,2", "--find-batch", "--run-dir", place)
    assert len(searched) == 2
    sizes = [case["largest_batch"]["size"] for case in first["results"]]
    assert sizes[1] >= sizes[0] > 0 and sizes[:2] == sizes[2:]
    for file in (place / "rounds").iterdir():
        file.unlink()
    again = run_json("compare", "--run-dir", place, "--resume")
    assert len(searched) == 2
    assert [case["largest_batch"]["size"] for case in again["results"]] == sizes
    page = tmp_path / "page.html"
    assert run("report", place, "--export", page).exit_code == 0
    assert "largest batch" in page.read_text() and f"~ {sizes[0]}" in page.read_text()


def test_as_many_as_the_option_takes(tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda device: 2**50)
    found = largest_batch(tiny_sdpa, FULL, samples[0], LENGTH)
    assert found and found.size == LARGEST_BATCH
    full = case("full", 576, largest_batch=found)
    assert str(largest_batch_cell(full)) == f"≥ {LARGEST_BATCH}"


def test_batch_sizes_do_not_change_what_a_case_is() -> None:
    assert replace(replace(FULL, batch_size=8), batch_size=1) == FULL
