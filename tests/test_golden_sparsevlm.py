"""SparseVLM against vectors recorded from the authors' code: its parts, and whole decoder stacks of both versions."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_directory, golden_tensors, require_cases
from transformers import LlamaForCausalLM

from mmtok_cli.methods.base import highest
from mmtok_cli.methods.sparsevlm import SparseVLM, SparseVLM2, cluster_and_merge, heads_by_attention, raters
from mmtok_cli.models import hf
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage
from mmtok_cli.tokens import Cut, LayerTokens, Selection

pytestmark = pytest.mark.compat


@lru_cache(maxsize=4)
def language_model(name: str, attention: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(golden_directory("sparsevlm") / name, attn_implementation=attention).eval()


def test_there_are_cases() -> None:
    require_cases("sparsevlm")


@pytest.mark.parametrize("case", golden_cases("sparsevlm", "cluster_and_merge"))
def test_cluster_and_merge(case: dict[str, Any]) -> None:
    expected = golden_tensors("sparsevlm", case)
    merged, centres = cluster_and_merge(expected["tokens"][0], case["params"]["clusters"])
    torch.testing.assert_close(merged, expected["expected_merged"][0], atol=case["tolerance"]["atol"], rtol=0)
    assert len(set(centres.tolist())) == case["params"]["clusters"]


@pytest.mark.parametrize("case", golden_cases("sparsevlm", "token_scoring"))
def test_token_scoring(case: dict[str, Any]) -> None:
    params, expected = case["params"], golden_tensors("sparsevlm", case)
    start, total = params["image_start"], params["image_tokens"]
    rows = expected["attention_text_rows"][0][:, expected["rater_indices"], start : start + total]
    tokens = LayerTokens(torch.zeros(total, 1), rows, lambda: rows[0], torch.ones(total, dtype=torch.bool), "image")
    scores = SparseVLM()._scores(tokens)
    torch.testing.assert_close(scores, expected["expected_scores"][0], atol=1e-6, rtol=0)
    kept = highest(scores, tokens.eligible, params["kept"]).indices
    assert kept.equal(expected["expected_mask"][0].nonzero().squeeze(1))


@pytest.mark.parametrize("case", golden_cases("sparsevlm", "head_selection_v2"))
def test_head_selection(case: dict[str, Any]) -> None:
    params, expected = case["params"], golden_tensors("sparsevlm", case)
    start, total = params["image_start"], params["image_tokens"]
    rows = expected["attention"][0][:, params["text_start"] + expected["rater_indices"], start : start + total]
    assert heads_by_attention(rows, params["heads_kept"]).equal(expected["expected_selected_heads"])


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", golden_cases("sparsevlm", "end_to_end_v1_0", "end_to_end_v2_0"))
def test_end_to_end(case: dict[str, Any], attention: str) -> None:
    params, expected = case["params"], golden_tensors("sparsevlm", case)
    model, atol = language_model(case["model"], attention).model, case["tolerance"]["atol"]
    first = case["kind"] == "end_to_end_v1_0"
    method = SparseVLM() if first else SparseVLM2()
    embeds, start, total = expected["inputs_embeds"], params["image_start"], params["image_length"]
    length = embeds.shape[1]
    stock = model(inputs_embeds=embeds).last_hidden_state[0]
    torch.testing.assert_close(stock, expected["unpruned_last_hidden_state"], atol=atol, rtol=0)
    found = raters(embeds[0, start : start + total], embeds[0, start + total :])
    assert found.nonzero().squeeze(1).equal(expected["rater_indices"])

    stages = []

    def choose(tokens: LayerTokens, cut: Cut) -> Selection:
        chosen = method.choose(tokens, cut)
        stages.append((method._scores(tokens), chosen))
        return chosen

    text = params["image_start"] + params["question_length"]
    lengths = case["kv_lengths_prefill"]
    behind = [*lengths[1:], len(expected["expected_last_hidden_state"])]
    cuts = tuple(Cut(layer + 1, behind[layer] - text, reads=layer) for layer in params["pruning_layers"])
    image = CutImage(
        0,
        start,
        torch.ones(total, dtype=torch.bool),
        "image",
        cuts,
        lambda vision, text, stage: method.queries(vision, text),
        lambda tokens, cut, stage: choose(tokens, cut),
    )
    mask = torch.ones(1, length, dtype=torch.long)
    with Inside(model, mask, [image], method.positions, lambda name: nullcontext()):
        out = model(inputs_embeds=embeds, use_cache=True)
        torch.testing.assert_close(out.last_hidden_state[0], expected["expected_last_hidden_state"], atol=atol, rtol=0)
        assert [layer.keys.shape[2] for layer in hf.cache_of(out).layers] == lengths
        for number, (scores, chosen) in enumerate(stages):
            torch.testing.assert_close(scores, expected[f"stage{number}.scores"], atol=atol, rtol=0)
            kept = expected[f"stage{number}.kept_mask"].nonzero().squeeze(1)
            assert chosen.indices[: len(kept)].equal(kept)
        for step, token in enumerate(expected["decode_tokens"]):
            out = model(
                input_ids=token[None, None],
                position_ids=torch.tensor([[length + step]]),
                **hf.cache_argument(model, hf.cache_of(out)),
                use_cache=True,
            )
            hidden = expected["expected_decode_hidden"][step]
            torch.testing.assert_close(out.last_hidden_state[0, -1], hidden, atol=atol, rtol=0)
        assert [layer.keys.shape[2] for layer in hf.cache_of(out).layers] == case["kv_lengths_after_3_decodes"]
    assert torch.equal(model(inputs_embeds=embeds).last_hidden_state[0], stock)
