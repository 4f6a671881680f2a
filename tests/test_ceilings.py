"""What the device can do, and how near the stages come to it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import QUESTION, run, run_json
from test_profile_page import profile
from test_report import result
from tiny_models import FAMILIES

from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.report.profiles import ceiling_notes
from mmtok_cli.results.schema import Times
from mmtok_cli.timing.ceilings import REPETITIONS, achieved, grow, measure_ceilings, weights_read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_of_this_machine(dtype: torch.dtype) -> None:
    found = measure_ceilings(torch.device("cpu"), dtype)
    assert found.dtype == str(dtype).split(".")[1] and not found.tf32
    assert 64 <= found.rows <= 16384 and 2**20 <= found.copied <= 2**28
    assert 1 <= len(found.matmul_seconds) <= 5 and 1 <= len(found.copy_seconds) <= 5
    assert found.flops_per_second == pytest.approx(2 * found.rows**3 / np.median(found.matmul_seconds))
    assert found.bytes_per_second == pytest.approx(2 * found.copied / np.median(found.copy_seconds))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ceilings_of_a_gpu(dtype: torch.dtype) -> None:
    """More than any card can do would mean that only the launch was timed."""
    found = measure_ceilings(torch.device("cuda"), dtype)
    assert 0 < found.flops_per_second < 3e15 and 0 < found.bytes_per_second < 2e13


class Machine:
    """Does nothing, and says that it took `fixed` seconds and those of size**power at `rate` a second."""

    def __init__(self, rate: float, power: int, fixed: float = 0.0) -> None:
        self.rate, self.power, self.fixed = rate, power, fixed
        self.done: list[int] = []  # sizes, in order

    def takes(self, size: int) -> float:
        return self.fixed + size**self.power / self.rate

    def time(self, work: int) -> float:
        self.done.append(work)
        return self.takes(work)

    def grow(self, largest: int = 16384, enough: float = math.inf) -> tuple[int, list[float]]:
        return grow(lambda size: size, self.time, smallest=64, largest=largest, power=self.power, enough=enough)


@pytest.mark.parametrize(("power", "enough"), [(1, math.inf), (3, 0.01)], ids=["copy", "product"])
@pytest.mark.parametrize("rate", [10.0**exponent for exponent in range(18)])
@pytest.mark.parametrize("fixed", [0.0, 1e-5, 0.06])
def test_measuring_a_ceiling_is_bounded_on_any_machine(rate: float, power: int, enough: float, fixed: float) -> None:
    machine = Machine(rate, power, fixed)
    size, seconds = machine.grow(enough=enough)
    assert machine.done[-1] == size and seconds == [machine.takes(size)] * len(seconds)
    assert all(machine.takes(done) <= 0.5 for done in machine.done if done > 64)
    in_all = sum(machine.takes(done) for done in machine.done)
    if machine.takes(64) > 0.2:
        assert size == 64 and in_all < 1 + 2 * machine.takes(64)  # to warm up, and to go over the limit
    else:
        assert len(seconds) >= 2 and in_all < 5.5


@pytest.mark.parametrize("rate", [1e7, 1e8, 1e10, 1e12])
def test_products_are_as_large_as_they_need_be(rate: float) -> None:
    """A fixed cost that would be long enough by itself is told from work."""
    size, seconds = Machine(rate, 3).grow(enough=0.01)
    assert seconds[0] >= 0.01 and len(seconds) == REPETITIONS
    assert size == 64 * 2 or (size / 2) ** 3 / rate < 0.01
    busy = Machine(rate, 3, fixed=0.03)
    larger, seconds = busy.grow(enough=0.01)
    assert larger >= size and (larger**3 / seconds[0] > 0.8 * rate or 8 * seconds[0] > 0.5)


def test_copies_are_as_large_as_they_may_be() -> None:
    """More than caches hold, whether or not what caches hold is copied fast."""
    machine = Machine(1e9, 1)
    assert machine.grow(largest=10_000)[0] == 10_000
    assert sorted(set(machine.done)) == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 10_000]


def test_a_disturbed_run_does_not_end_the_growth() -> None:
    machine = Machine(1e6, 1)

    def disturbed(work: int) -> float:
        return machine.time(work) + (0.4 if len(machine.done) % 3 == 0 else 0)

    size, _ = grow(lambda size: size, disturbed, smallest=64, largest=10_000, power=1)
    assert size == 10_000


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


def test_a_decoded_token_reads_the_experts_that_it_is_sent_to() -> None:
    model = FAMILIES["qwen3_vl_moe"]("sdpa")
    inner = hf.language_model(model.model)
    of_experts = sum(weight.nbytes for name, weight in inner.named_parameters() if "experts" in name)
    others = sum(w.nbytes for name, w in inner.named_parameters() if "experts" not in name and "embed" not in name)
    assert of_experts > 0
    assert weights_read(model) == others + of_experts // 2 + hf.output_embedding(model.model).weight.nbytes  # 2 of 4
    one = result("mmtok", 64, 64)
    one = one.model_copy(update={"tokens": one.tokens.model_copy(update={"new": 5})})
    batches = [one, one.model_copy(update={"case": one.case.model_copy(update={"batch_size": 4})})]
    alone, together = achieved(batches, weights_read=1000, experts=True)
    assert alone.decode_bytes_per_second and together.decode_bytes_per_second is None
    shown = profile()
    said = shown.model_copy(update={"cases": batches, "achieved": [alone, together]})
    assert "how many experts" in "".join(ceiling_notes(said)) and "experts" not in "".join(ceiling_notes(shown))
    assert achieved(batches, weights_read=1000)[1].decode_bytes_per_second


def test_every_family_has_such_weights(vlm: VisionLanguageModel) -> None:
    assert 0 < weights_read(vlm) < vlm.parameter_count * vlm.dtype.itemsize


def test_profile_shows_them(tiny_directory: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--rounds", 2, "--warmup", 1)
    command += ("--trace-dir", tmp_path, "--max-new-tokens", 3)
    found = run_json(*command)
    assert found["ceilings"]["flops_per_second"] > 0 and found["weights_read"] > 0
    full, ours = found["achieved"]
    assert (full["case"]["method"], ours["case"]["method"], ours["case"]["budget"]) == ("full", "mmtok", "4")
    case = found["cases"][1]
    assert ours["flops_per_second"]["prefill"] == pytest.approx(
        case["flops"]["prefill"] / case["seconds"]["prefill"]["median"]
    )
    on_screen = run(*command)
    assert "Against the device's ceilings" in on_screen.stdout and "the device" in on_screen.stdout
    assert "ceilings, measured in this run" in on_screen.stderr
    assert case["flop_coverage"]["missed"] == {} and "FLOPs cover" in on_screen.stderr
