"""VisionZip on Qwen2.5-VL from the picture to the next token, against what the authors' own code gave (see
golden_cases.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_model, golden_sample, golden_tensors, require_cases

from mmtok_cli.budget import Budget
from mmtok_cli.decoding import prefill
from mmtok_cli.methods.visionzip import VisionZip
from mmtok_cli.pipeline import reduce

FOLDER = "visionzip_qwen2_5_vl"


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases(FOLDER)
    assert {param.values[0]["kind"] for param in golden_cases(FOLDER)} <= {"end_to_end", "degenerate"}


@torch.inference_mode()
@pytest.mark.parametrize("case", golden_cases(FOLDER, "end_to_end"))
def test_end_to_end(case: dict[str, Any]) -> None:
    expected, params, tolerance = golden_tensors(FOLDER, case), case["params"], case["tolerance"]
    model, sample = golden_model(FOLDER, case["model"], "eager"), golden_sample(FOLDER, case)
    embeds: list[torch.Tensor] = []
    hook = model.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    reduced = reduce(model, VisionZip(), [sample], Budget(percent=70))
    logits, _ = prefill(model, reduced.inputs)
    hook.remove()
    (vision,), (selection,) = reduced.vision, reduced.selections
    assert reduced.prompt.input_ids[0].equal(expected["input_ids"])
    assert vision.total == params["vision_tokens"]
    for name in ("received_attention", "mean_keys"):
        torch.testing.assert_close(vision.signals[name], expected[name], atol=1e-5, rtol=1e-5)
    assert selection.merged is not None
    counts = [int(selection.merged.logical_not().sum()), int(selection.merged.sum())]
    assert counts == [params["dominant"], params["contextual"]]
    assert reduced.inputs["position_ids"][-3:, 0].equal(expected["expected_position_ids"])
    torch.testing.assert_close(embeds[0], expected["expected_inputs_embeds"], atol=tolerance["rows_atol"], rtol=0)
    torch.testing.assert_close(logits[0], expected["expected_logits"], atol=tolerance["logits_atol"], rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("case", golden_cases(FOLDER, "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    model, sample = golden_model(FOLDER, case["model"], "eager"), golden_sample(FOLDER, case)
    reduced = reduce(model, VisionZip(), [sample], Budget(percent=70))
    for vision, selection in zip(reduced.vision, reduced.selections, strict=True):
        kept = selection.indices.tolist()
        assert len(kept) == len(set(kept)) == int(0.65 * vision.total) + max(1, int(0.05 * vision.total))
    assert prefill(model, reduced.inputs)[0].isfinite().all()
