"""Estimates for a whole model from a part of its layers."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from tiny_models import FAMILIES

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.timing.flops import measure_flops
from mmtok_cli.timing.partial import last_layer, of_whole_model
from mmtok_cli.timing.runner import run_case

CASES = [
    Case("full", make_method("full"), None),
    Case("mmtok", make_method("mmtok"), Budget(count=8)),
    Case("fastv", make_method("fastv", layer=1), Budget(count=8)),
]


def shorten(model: VisionLanguageModel, layers: int) -> None:
    """Run the first layers alone, as if the others had not been loaded."""
    language_model = model.model.model.language_model
    model.depth = len(language_model.layers)
    del language_model.layers[layers:]
    for config in (model.model.config.text_config, language_model.config):
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_a_part_are_those_of_the_whole(family: str, case: Case, samples: list[Sample]) -> None:
    """Layers behind the last cut are alike, so what can be counted must come out exactly."""
    if case.name == "fastv" and family in ("gemma3", "qwen3_5"):
        pytest.skip("its first layers cannot be cut")
    whole, part = FAMILIES[family]("sdpa"), FAMILIES[family]("sdpa")
    shorten(part, 2)
    true, estimate = (run_case(model, case, samples[:1], 1) for model in (whole, part))
    assert estimate.kv_cache == true.kv_cache and estimate.tokens == true.tokens
    expected, found = (measure_flops(model, case, samples[:1], 1).stages for model in (whole, part))
    for stage in ("encode", "select", "prefill", "total"):
        assert found[stage] == expected[stage]
    assert found["measured_prefill"] < found["prefill"]
    assert "measured_prefill" not in expected


def test_times_are_extrapolated_and_the_measured_ones_kept(samples: list[Sample]) -> None:
    part = FAMILIES["llava"]("sdpa")
    shorten(part, 2)
    run = run_case(part, CASES[0], samples[:1], 3)
    seconds = run.seconds
    assert 0 < seconds["measured_prefill"] < seconds["prefill"] < 3 * seconds["measured_prefill"]
    stages = ("prepare", "encode", "select", "prefill", "decode")
    assert seconds["total"] == pytest.approx(sum(seconds[stage] for stage in stages))
    assert seconds["ttft"] == pytest.approx(seconds["total"] - seconds["decode"])


def test_missing_layers_cost_what_the_last_one_does() -> None:
    measured = {"encode": 1.0, "prefill": 5.0, "decode": 0.5}
    found = of_whole_model(measured, {"prefill": 2.0, "decode": 0.1}, 10)
    assert found == {
        "encode": 1.0,
        "prefill": 25.0,
        "decode": 1.5,
        "measured_prefill": 5.0,
        "measured_decode": 0.5,
    }
    assert of_whole_model(measured, {"prefill": 2.0}, 0) == measured


def test_the_layer_is_watched_in_prefill_and_at_each_step(samples: list[Sample]) -> None:
    part = FAMILIES["llava"]("sdpa")
    shorten(part, 1)
    clock = count()
    with last_layer(part, lambda: next(clock)) as spans, torch.inference_mode():
        CASES[1].answer(part, samples[:1], 3, stage=lambda name: torch.inference_mode())
    assert [name for name, _, _ in spans][:1] == ["prefill"]
    assert all(end == start + 1 for _, start, end in spans)
    layer = part.model.model.language_model.layers[-1]
    assert not layer._forward_hooks and not layer.input_layernorm._forward_pre_hooks
