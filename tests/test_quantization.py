"""Quantized weights and a compiled language model."""

from __future__ import annotations

import json
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import refused, run, run_json
from torch import nn

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of, weights_digest
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf, load_model, quantization
from mmtok_cli.models.llava import Llava
from mmtok_cli.models.quantization import quantized_bytes, require_quantization, stored_bytes, stored_tensors
from mmtok_cli.models.room import needs_of, needs_quantized
from mmtok_cli.pipeline import answer

CPU = torch.device("cpu")
FULL = make_method("full")
BUDGET = Budget(count=8)
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None or find_spec("accelerate") is None,
    reason="needs torchao: pip install mmtok[quantization]",
)
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None or find_spec("accelerate") is None,
    reason="needs bitsandbytes: pip install mmtok[quantization]",
)


@pytest.fixture()
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())


@pytest.mark.usefixtures("everything_installed")
def test_what_does_not_work_is_one_line() -> None:
    for name, weights, device_map, message in (
        ("fp3", "pretrained", None, "there is no quantization 'fp3'"),
        ("int4", "pretrained", None, "int4 runs on cuda, and the device is cpu"),
        ("bnb-4bit", "random", None, "bnb-4bit does not work with --weights random"),
        ("int8", "pretrained", "auto", "does not work with --device-map"),
    ):
        with pytest.raises(MMTokError, match=message):
            require_quantization(name, CPU, weights, device_map)
    require_quantization("int8", CPU, "random", None)
    require_quantization("int4", torch.device("cuda"), "pretrained", None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    for name, weights, packages in (
        ("int8", "random", "torchao"),
        ("int8", "pretrained", "torchao accelerate"),
        ("bnb-8bit", "pretrained", "bitsandbytes accelerate"),
        ("int4", "random", "torchao mslk"),
    ):
        device = torch.device("cuda") if name == "int4" else CPU
        with pytest.raises(MMTokError, match="needs the package") as error:
            require_quantization(name, device, weights, None)
        assert error.value.hint == f"pip install {packages}"


def test_bytes_of_weights_that_are_to_be_quantized(tiny_sdpa: Llava) -> None:
    model = tiny_sdpa.model
    head = hf.output_embedding(model)
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    whole = sum(weight.nbytes for weight in model.parameters())
    assert quantized_bytes(model, "int8", torch.float32) == whole - linear * 3 // 4
    assert quantized_bytes(model, "bnb-4bit", torch.float32) == whole - linear * 7 // 8
    needs = needs_of(model, torch.float32, (36,))
    fewer = needs_quantized(needs, model, torch.float32, "int8")
    assert fewer.weights == quantized_bytes(model, "int8", torch.float32) and fewer.layer == needs.layer // 4
    assert (fewer.working, fewer.parameters) == (needs.working, needs.parameters)


def test_a_plain_weight_is_stored_as_itself() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    assert stored_tensors(weight) == [weight] and stored_bytes(weight) == 48


def bytes_of(model: Any) -> int:
    return sum(map(stored_bytes, model.parameters()))


@needs_torchao
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_int8_by_torchao(weights: str, tiny_directory: Path, samples: list[Sample]) -> None:
    """Pretrained weights are quantized by transformers, random ones by torchao, and the same layers of both."""
    plain = load_model(str(tiny_directory), weights=weights)
    quantized = load_model(str(tiny_directory), weights=weights, quantization="int8")
    expected = quantized_bytes(plain.model, "int8", torch.float32)
    assert expected < bytes_of(quantized.model) < 1.2 * expected  # with scales
    assert quantized.parameter_count == plain.parameter_count
    assert weights_digest(quantized.model) != weights_digest(plain.model)
    assert type(hf.output_embedding(quantized.model).weight.data) is torch.Tensor
    environment = environment_of(quantized)
    assert (environment.quantization, environment.compiled) == ("int8", False)
    for name in ("full", "mmtok", "fastv"):
        method = make_method(name, **({"layer": 1} if name == "fastv" else {}))
        budget = None if name == "full" else BUDGET
        said = answer(quantized, method, samples[:2], budget, max_new_tokens=3, ignore_eos=True)
        assert said.token_ids.shape == (2, 3) and bool(said.first_logits.isfinite().all())
    before = answer(plain, FULL, samples[:1], None, max_new_tokens=1).first_logits.log_softmax(-1)
    after = answer(quantized, FULL, samples[:1], None, max_new_tokens=1).first_logits.log_softmax(-1)
    divergence = nn.functional.kl_div(after, before, log_target=True, reduction="sum")
    assert not torch.equal(before, after) and float(divergence) < 0.5


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-4bit"])
def test_bitsandbytes(name: str, samples: list[Sample]) -> None:
    """On the demo model, since bitsandbytes quantizes blocks of 64 values."""
    plain, quantized = load_model("demo"), load_model("demo", quantization=name)
    assert bytes_of(quantized.model) < bytes_of(plain.model) / 2
    assert answer(quantized, FULL, samples[:2], None, max_new_tokens=3, ignore_eos=True).token_ids.shape == (2, 3)
    with pytest.raises(MMTokError, match="bitsandbytes quantizes stored weights"):
        load_model("llava-1.5-7b", weights="random", quantization=name, layers=1)


@needs_torchao
def test_every_case_of_a_comparison_is_quantized(tiny_directory: Path, tmp_path: Path) -> None:
    common = ("compare", "-m", tiny_directory, "--limit", 2, "--methods", "random", "--budget", 4, "--rounds", 1)
    page = tmp_path / "page.html"
    found = run_json(*common, "--quantization", "int8", "--run-dir", tmp_path / "a", "--export", page)
    plain = run_json(*common, "--run-dir", tmp_path / "b")
    assert found["environment"]["quantization"] == "int8" and plain["environment"]["quantization"] is None
    assert "float32 quantized to int8" in page.read_text()
    keys = [{case["key"] for case in json.loads((tmp_path / name / "plan.json").read_text())["cases"]} for name in "ab"]
    assert not keys[0] & keys[1]
    merged = run("report", tmp_path / "a", tmp_path / "b")
    assert "quantization differs: int8 (A), None (B)" in " ".join(merged.stderr.split())
    assert "quantized to int8 (A), none (B)" in " ".join(merged.stdout.split())


@pytest.fixture()
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture graphs as always, but run them as they are, since generating code takes a minute."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_model_answers_the_same(tiny_directory: Path, samples: list[Sample]) -> None:
    plain, compiled = load_model(str(tiny_directory)), load_model(str(tiny_directory), compiled=True)
    assert environment_of(compiled).compiled and not environment_of(plain).compiled
    assert weights_digest(compiled.model) == weights_digest(plain.model)
    for method, budget in ((FULL, None), (make_method("mmtok"), BUDGET)):
        for batch in (samples[:1], samples[:2]):
            before, after = (
                answer(model, method, batch, budget, max_new_tokens=4, ignore_eos=True) for model in (plain, compiled)
            )
            assert torch.equal(before.token_ids, after.token_ids)
            assert torch.allclose(before.first_logits, after.first_logits, atol=1e-4)
    with pytest.raises(MMTokError, match="do not run in a compiled one"):
        answer(compiled, make_method("fastv", layer=1), samples[:1], BUDGET, max_new_tokens=1)


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_comparison(tiny_directory: Path, tmp_path: Path) -> None:
    common = ("-m", tiny_directory, "--limit", 2, "--budget", 4, "--rounds", 1, "--compile")
    found = run_json("compare", *common, "--methods", "random", "--run-dir", tmp_path / "run")
    assert found["environment"]["compiled"] and not found["failures"]
    refused(
        run("compare", *common, "--methods", "random,fastv", "--set", "fastv.layer=1", "--run-dir", tmp_path / "no"),
        "fastv @ 4: methods inside the language model do not run in a compiled one",
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_what_excludes_compiling(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run(command, "--compile", "--layers", 1), "--compile runs whole models only")
    refused(run(command, "--device-map", "auto", "--layers", 1), "--device-map runs whole models only")
    refused(run(command, "--compile", "--warmup", 0), "--compile needs a warm-up")
    monkeypatch.setattr("mmtok_cli.models.devices.shutil.which", lambda name: None)
    refused(run(command, "--compile"), "--compile needs a C++ compiler")
