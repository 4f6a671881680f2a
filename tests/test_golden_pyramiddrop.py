"""PyramidDrop against vectors recorded from the authors' code: kept tokens, positions, caches, logits and what is
decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_directory, golden_tensors, require_cases
from transformers import LlamaForCausalLM

from mmtok_cli.methods.base import attention_at
from mmtok_cli.methods.pyramiddrop import PyramidDrop
from mmtok_cli.models import hf
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage
from mmtok_cli.tokens import Cut, LayerTokens, Selection

pytestmark = pytest.mark.compat


@lru_cache(maxsize=4)
def language_model(name: str, attention: str) -> LlamaForCausalLM:
    directory = golden_directory("pyramiddrop") / name
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()


def cuts_of(case: dict[str, Any], layers: int) -> tuple[Cut, ...]:
    """The method's own cuts where the case has the authors' ratios or a single stage, otherwise those of the case."""
    params = case["params"]
    ratios, kept = params["image_token_ratio_list"], params["kept_per_stage"]
    if len(ratios) > 1 and ratios != [0.5**stage for stage in range(1, len(ratios) + 1)]:
        return tuple(Cut(at, keep, reads=at) for at, keep in zip(params["layer_list"], kept, strict=True))
    method = PyramidDrop(layers=tuple(params["layer_list"]))
    assert method.count(ratios[-1], params["image_length"]) == kept[-1]
    cuts = method.cuts(params["image_length"], kept[-1], layers)
    assert [cut.keep for cut in cuts] == kept
    return cuts


def test_there_are_cases() -> None:
    require_cases("pyramiddrop")


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", golden_cases("pyramiddrop"))
def test_end_to_end(case: dict[str, Any], attention: str) -> None:
    params, expected = case["params"], golden_tensors("pyramiddrop", case)
    model, atol = language_model(case["model"], attention), case["tolerance"]["logits_atol"]
    if attention == "eager":
        atol *= 5  # recorded under sdpa; in float64 the recorded logits are off by up to 3.5e-5 themselves
    method = PyramidDrop(layers=tuple(params["layer_list"]))
    start, total = params["image_start"], params["image_length"]
    embeds = expected["inputs_embeds"][None]
    length, stages = embeds.shape[1], []

    def choose(tokens: LayerTokens, cut: Cut) -> Selection:
        chosen = method.choose(tokens, cut)
        stages.append((attention_at(tokens).mean((0, 1)), chosen.indices))
        return chosen

    eligible = torch.ones(total, dtype=torch.bool)
    cuts = cuts_of(case, model.config.num_hidden_layers)
    image = CutImage(
        0,
        start,
        eligible,
        "image",
        cuts,
        lambda vision, text, stage: method.queries(vision, text),
        lambda tokens, cut, stage: choose(tokens, cut),
    )
    mask = torch.ones(1, length, dtype=torch.long)
    with (
        Inside(model.model, mask, [image], method.positions, lambda name: nullcontext()),
        positions_of(model.model.layers) as positions,
    ):
        out = model(inputs_embeds=embeds, use_cache=True)
        assert len(stages) == len(params["kept_per_stage"])
        kept = torch.arange(total)
        for number, (scores, indices) in enumerate(stages):
            torch.testing.assert_close(scores, expected[f"scores_stage{number}"], atol=1e-6, rtol=1e-5)
            kept = kept[indices]
            places = torch.cat([torch.arange(start), kept + start, torch.arange(start + total, length)])
            assert places.equal(expected[f"expected_kept_stage{number}"])
        assert len(positions) == len(model.model.layers)
        for layer, found in enumerate(positions):
            assert found.equal(expected[f"positions_layer{layer}"])
        torch.testing.assert_close(out.logits[0], expected["expected_prefill_logits"], atol=atol, rtol=0)

        logits, lengths = [out.logits[0, -1]], [[layer.keys.shape[2] for layer in hf.cache_of(out).layers]]
        for step in range(params["decode_steps"]):
            positions.clear()
            out = model(
                input_ids=expected["expected_tokens"][step][None, None],
                position_ids=torch.tensor([[length + step]]),
                **hf.cache_argument(model, hf.cache_of(out)),
                use_cache=True,
            )
            for layer, found in enumerate(positions):
                assert found.tolist() == [expected[f"decode_positions_layer{layer}"][step]]
            logits.append(out.logits[0, -1])
            lengths.append([layer.keys.shape[2] for layer in hf.cache_of(out).layers])
    torch.testing.assert_close(torch.stack(logits), expected["expected_logits"], atol=atol, rtol=0)
    assert torch.stack(logits).argmax(-1).equal(expected["expected_tokens"])
    assert lengths == case["kv_lengths_per_layer_after_each_forward"]


@contextmanager
def positions_of(layers: torch.nn.ModuleList) -> Iterator[list[torch.Tensor]]:
    """The positions of the first row that each layer in turn is called with."""
    found: list[torch.Tensor] = []

    def remember(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["position_ids"][0])

    hooks = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
