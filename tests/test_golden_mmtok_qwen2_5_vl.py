"""MMTok on Qwen2.5-VL from the picture to the answer, against what the authors' own code gave (see golden_cases.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_model, golden_sample, golden_tensors, require_cases

from mmtok_cli.budget import Budget
from mmtok_cli.decoding import Continuation, prefill
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.mmtok import MMTok
from mmtok_cli.pipeline import answer, reduce

FOLDER = "mmtok_qwen2_5_vl"


def method_of(case: dict[str, Any]) -> MMTok:
    p = case["params"]
    return MMTok(alpha=p["alpha"], text_temperature=p["tv_temp"], vision_temperature=p["vv_temp"])


def budget_of(case: dict[str, Any]) -> Budget:
    return Budget.parse(f"{100 * case['params']['retain_ratio']:.10g}%")


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases(FOLDER)
    assert {param.values[0]["kind"] for param in golden_cases(FOLDER)} <= {"end_to_end", "degenerate"}


@torch.inference_mode()
@pytest.mark.parametrize("case", golden_cases(FOLDER, "end_to_end"))
def test_end_to_end(case: dict[str, Any]) -> None:
    expected, atol = golden_tensors(FOLDER, case), case["tolerance"]["logits_atol"]
    model, sample = golden_model(FOLDER, case["model"], "sdpa"), golden_sample(FOLDER, case)
    method = method_of(case)

    whole = reduce(model, method, [sample], Budget(percent=100))
    torch.testing.assert_close(prefill(model, whole.inputs)[0][0], expected["unpruned_logits"], atol=atol, rtol=0)

    reduced = reduce(model, method, [sample], budget_of(case))
    assert reduced.prompt.input_ids[0].equal(expected["input_ids"])
    text = model.text_tokens(reduced.prompt, "released")
    (words,) = method._words(text)
    assert words.equal(model.model.get_input_embeddings()(expected["expected_text_ids"]))
    projected = torch.cat([vision.projected for vision in reduced.vision])
    features = torch.cat([vision.features for vision in reduced.vision])
    # What the release calls image_embeds is behind the merger, image_features in front of it.
    torch.testing.assert_close(projected, expected["image_embeds"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(features, expected["image_features"], atol=2e-5, rtol=1e-5)
    assert reduced.selections[0].indices.equal(expected["expected_kept"])
    assert reduced.inputs["position_ids"][-3:, 0].equal(expected["expected_position_ids"])

    positions: list[list[int]] = []
    language_model = model.model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"][-3:, 0, -1].tolist()), with_kwargs=True
    )
    first, cache = prefill(model, reduced.inputs)
    continuation = Continuation(model, reduced.inputs, cache)
    logits = [first[0]]
    for token in expected["expected_tokens"][: len(expected["expected_logits"]) - 1]:
        logits.append(continuation.read(token[None])[0])
    hook.remove()
    torch.testing.assert_close(torch.stack(logits), expected["expected_logits"], atol=atol, rtol=0)
    assert positions[1:] == expected["expected_decode_position_ids"].tolist()

    said = answer(model, method, [sample], budget_of(case), max_new_tokens=len(expected["expected_tokens"]))
    assert said.token_ids[0].equal(expected["expected_tokens"])


@torch.inference_mode()
@pytest.mark.parametrize("case", golden_cases(FOLDER, "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    """Small images are reduced as well, and each image of several keeps its own share, so that a forward pass works."""
    model, sample = golden_model(FOLDER, case["model"], "sdpa"), golden_sample(FOLDER, case)
    totals = [model.total(image) for image in sample.images]
    assert sum(totals) == case["params"]["vision_tokens"]
    counts = [int(case["params"]["retain_ratio"] * total) for total in totals]
    if not all(counts):
        with pytest.raises(MMTokError, match="less than one"):
            reduce(model, method_of(case), [sample], budget_of(case))
        return
    said = answer(model, method_of(case), [sample], budget_of(case), max_new_tokens=1)
    assert [selection.kept for selection in said.selections] == counts
    for selection, total in zip(said.selections, totals, strict=True):
        kept = selection.indices.tolist()
        assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < total
    assert said.first_logits.isfinite().all()
    words, *_ = method_of(case)._words(model.text_tokens(said.reduced.prompt, "released"))
    covered = model.model.get_input_embeddings()(golden_tensors(FOLDER, case)["expected_text_ids"])
    assert words.equal(covered)
