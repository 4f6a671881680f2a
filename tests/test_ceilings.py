"""What the device can do, and how near the stages come to it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from cli_helpers import QUESTION, run, run_json
from test_report import result

from mmtok_cli.bench.ceilings import achieved, measure_ceilings, weights_read
from mmtok_cli.bench.results import Times
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava import Llava


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_of_this_machine(dtype: torch.dtype) -> None:
    start = time.perf_counter()
    found = measure_ceilings(torch.device("cpu"), dtype)
    assert time.perf_counter() - start < 20
    assert 1e8 < found.flops_per_second < 1e14 and 1e8 < found.bytes_per_second < 1e13
    assert found.dtype == str(dtype).split(".")[1] and not found.tf32
    assert len(found.matmul_seconds) == len(found.copy_seconds) == 5
    assert sorted(found.matmul_seconds)[2] >= 5e-3 or found.rows == 16384
    assert found.flops_per_second == pytest.approx(2 * found.rows**3 / sorted(found.matmul_seconds)[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ceilings_of_a_gpu(dtype: torch.dtype) -> None:
    found = measure_ceilings(torch.device("cuda"), dtype)
    assert 1e12 < found.flops_per_second < 3e15 and 1e11 < found.bytes_per_second < 2e13


def test_achieved_is_counted_over_median() -> None:
    case = result("mmtok", 64, 64)
    half = Times(median=0.5, p10=0.5, p90=0.5, values=[0.5])
    case = case.model_copy(
        update={
            "seconds": case.seconds | {"prefill": half, "decode": half},
            "flops": {"encode": 0.0, "prefill": 3e9, "decode": 2e6, "total": 3e9},
            "tokens": case.tokens.model_copy(update={"new": 5}),
        }
    )
    (found,) = achieved([case], weights_read=1000)
    assert found.flops_per_second["prefill"] == 6e9 and "encode" not in found.flops_per_second
    assert found.decode_bytes_per_second == 1000 * 4 / 0.5
    one = case.model_copy(update={"tokens": case.tokens.model_copy(update={"new": 1})})
    assert achieved([one], weights_read=1000)[0].decode_bytes_per_second is None


def test_weights_that_a_decoded_token_reads(tiny_sdpa: Llava) -> None:
    """All of the language model and the head, of the embedding nothing, whether or not it is the head as well."""
    inner, head = tiny_sdpa.model.model.language_model, tiny_sdpa.model.lm_head
    layers = sum(p.nbytes for name, p in inner.named_parameters() if "embed" not in name)
    assert weights_read(tiny_sdpa) == layers + head.weight.nbytes


def test_every_family_has_such_weights(vlm: VisionLanguageModel) -> None:
    assert 0 < weights_read(vlm) < vlm.parameter_count * vlm.dtype.itemsize


def test_profile_shows_them(tiny_directory: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--runs", 2, "--warmup", 1)
    command += ("--trace-dir", tmp_path, "--max-new-tokens", 3)
    found = run_json(*command)
    assert found["ceilings"]["flops_per_second"] > 0 and found["weights_read"] > 0
    full, ours = found["achieved"]
    assert (full["method"], ours["method"], ours["budget"]) == ("full", "mmtok", "4")
    case = found["cases"][1]
    assert ours["flops_per_second"]["prefill"] == pytest.approx(
        case["flops"]["prefill"] / case["seconds"]["prefill"]["median"]
    )
    on_screen = run(*command)
    assert "Against the device's ceilings" in on_screen.stdout and "the device" in on_screen.stdout
    assert "ceilings, measured in this run" in on_screen.stderr
