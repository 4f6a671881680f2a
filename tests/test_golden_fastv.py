"""FastV against vectors recorded from the authors' code: kept tokens, caches, logits and what is decoded."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_directory, golden_tensors, require_cases
from transformers import LlamaForCausalLM

from mmtok_cli.methods.fastv import FastV
from mmtok_cli.models import hf
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage

CASES = golden_cases("fastv")
pytestmark = pytest.mark.compat


@lru_cache(maxsize=4)
def language_model(name: str, attention: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(golden_directory("fastv") / name, attn_implementation=attention).eval()


def fastv_inside(model: LlamaForCausalLM, params: dict[str, Any]) -> Inside:
    method, total = FastV(layer=params["K"]), params["image_length"]
    length = params["image_start"] + total + params["question_length"]
    image = CutImage(
        row=0,
        start=params["image_start"],
        eligible=torch.ones(total, dtype=torch.bool),
        image_id="image",
        cuts=method.cuts(total, params["keep"], model.config.num_hidden_layers),
        queries=lambda vision, text, stage: method.queries(vision, text),
        choose=lambda tokens, cut, stage: method.choose(tokens, cut),
    )
    return Inside(model.model, torch.ones(1, length, dtype=torch.long), [image], "keep", lambda name: nullcontext())


def kept_indices(inside: Inside, params: dict[str, Any], length: int) -> torch.Tensor:
    """Places in the whole sequence, text included."""
    start, end = params["image_start"], params["image_start"] + params["image_length"]
    places = inside.selections[0].indices + start
    return torch.cat([torch.arange(start), places, torch.arange(end, length)])


def test_there_are_cases() -> None:
    require_cases("fastv")


@pytest.mark.parametrize("case", CASES)
def test_counts(case: dict[str, Any]) -> None:
    params = case["params"]
    assert FastV().count(1 - params["fastv_r"], params["image_length"]) == params["keep"]


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [c for c in CASES if c.values[0]["params"]["use_cache"]])
def test_with_cache(case: dict[str, Any], attention: str) -> None:
    params, expected = case["params"], golden_tensors("fastv", case)
    model, atol = language_model(case["model"], attention), case["tolerance"]["logits_atol"]
    embeds = expected["inputs_embeds"]
    length = embeds.shape[1]
    stock = model(inputs_embeds=embeds).logits[0]
    torch.testing.assert_close(stock, expected["unpruned_logits"], atol=atol, rtol=0)

    with fastv_inside(model, params) as inside:
        out = model(inputs_embeds=embeds, use_cache=True)
        assert kept_indices(inside, params, length).equal(expected["expected_kept_indices"])
        torch.testing.assert_close(out.logits[0], expected["expected_prefill_logits"], atol=atol, rtol=0)
        for name in [name for name in expected if name.startswith("kv.")]:
            _, layer, part = name.split(".")
            cached = getattr(hf.cache_of(out).layers[int(layer)], f"{part}s")[0]
            torch.testing.assert_close(cached, expected[name], atol=atol, rtol=0)
        lengths = [[layer.keys.shape[2] for layer in hf.cache_of(out).layers]]
        tokens = [out.logits[0, -1].argmax()]
        for step, position in enumerate(case["decode"]["position_ids"]):
            out = model(
                input_ids=tokens[-1][None, None],
                position_ids=torch.tensor([[position]]),
                **hf.cache_argument(model, hf.cache_of(out)),
                use_cache=True,
            )
            torch.testing.assert_close(out.logits[0, -1], expected["expected_decode_logits"][step], atol=atol, rtol=0)
            lengths.append([layer.keys.shape[2] for layer in hf.cache_of(out).layers])
            tokens.append(out.logits[0, -1].argmax())
    assert lengths == case["decode"]["kv_lengths_per_layer_after_each_forward"]
    assert torch.stack(tokens).equal(expected["expected_tokens"])
    assert torch.equal(model(inputs_embeds=embeds).logits[0], stock)


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.values[0]["params"]["use_cache"]])
def test_without_cache(case: dict[str, Any], attention: str) -> None:
    """Every step reads the whole sequence again and ranks from the new last token."""
    params, expected = case["params"], golden_tensors("fastv", case)
    model, atol = language_model(case["model"], attention), case["tolerance"]["logits_atol"]
    embeds = expected["inputs_embeds"]
    tokens = []
    with fastv_inside(model, params) as inside:
        for step in range(params["decode_steps"] + 1):
            out = model(inputs_embeds=embeds, use_cache=False)
            kept = kept_indices(inside, params, embeds.shape[1])
            if step == 0:
                assert kept.equal(expected["expected_kept_indices"])
                torch.testing.assert_close(out.logits[0], expected["expected_prefill_logits"], atol=atol, rtol=0)
            else:
                assert kept.equal(expected[f"expected_kept_indices_step{step}"])
                logits = expected["expected_decode_logits"][step - 1]
                torch.testing.assert_close(out.logits[0, -1], logits, atol=atol, rtol=0)
            tokens.append(out.logits[0, -1].argmax())
            embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[-1])[None, None]], dim=1)
    assert torch.stack(tokens).equal(expected["expected_tokens"])
