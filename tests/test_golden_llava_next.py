"""MMTok and VisionZip on LLaVA-NeXT from the picture to the next token, against what the authors' own code gave (see
golden_cases.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_model, golden_sample, golden_tensors, require_cases

from mmtok_cli.budget import Budget
from mmtok_cli.decoding import prefill
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.mmtok import MMTok
from mmtok_cli.methods.visionzip import VisionZip
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava_next import LlavaNext
from mmtok_cli.pipeline import reduce
from mmtok_cli.tokens import Selection

FOLDER = "llava_next"
KINDS = ("llava_next_mmtok", "llava_next_visionzip")


def method_of(case: dict[str, Any]) -> Method:
    p = case["params"]
    if case["kind"] == "llava_next_visionzip":
        return VisionZip(contextual=p["contextual"])
    return MMTok(alpha=p["alpha"], text_temperature=p["tv_temp"], vision_temperature=p["vv_temp"])


def prompt_ids(model: VisionLanguageModel, input_ids: torch.Tensor) -> list[int]:
    """The prompt as the authors' code has it: one -200 in the place of all vision tokens of the image."""
    places = (input_ids == model.image_token_id).nonzero().squeeze(1)
    return [*input_ids[: places[0]].tolist(), -200, *input_ids[places[-1] + 1 :].tolist()]


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases(FOLDER)
    assert {param.values[0]["kind"] for param in golden_cases(FOLDER)} <= {*KINDS, "degenerate"}


@torch.inference_mode()
@pytest.mark.parametrize("case", golden_cases(FOLDER, *KINDS))
def test_end_to_end(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, params, tolerance = golden_tensors(FOLDER, case), case["params"], case["tolerance"]
    model, sample = golden_model(FOLDER, case.get("model", "model_next"), "eager"), golden_sample(FOLDER, case)
    assert isinstance(model, LlavaNext)
    method, of_crops = method_of(case), list[Selection]()

    whole = reduce(model, method, [sample], Budget(percent=100))
    assert whole.tokens[0].total == params["unreduced_tokens"]
    atol = tolerance["logits_atol"]
    torch.testing.assert_close(prefill(model, whole.inputs)[0][0], expected["unpruned_logits"], atol=atol, rtol=0)

    select_batch = type(method).select_batch

    def watched(self: Method, *arguments: Any) -> list[Selection]:
        of_crops.extend(select_batch(self, *arguments))
        return list(of_crops)

    monkeypatch.setattr(type(method), "select_batch", watched)
    reduced = reduce(model, method, [sample], Budget(count=params["per_crop"] * model.most_crops))
    assert prompt_ids(model, reduced.prompt.input_ids[0]) == expected["prompt_ids"].tolist()
    assert len(of_crops) == params["crops"]
    for chosen, places in zip(of_crops, expected["expected_kept"], strict=True):
        own = chosen.indices if chosen.merged is None else chosen.indices[~chosen.merged]
        assert own[own >= 0].sort().values.equal(places.sort().values)
    if isinstance(method, MMTok):
        (words,) = method._words(model.text_tokens(reduced.prompt, "released"))
        covered = expected["expected_text_ids"][1:]  # the first begins the sequence, and is dropped
        assert words.equal(model.model.get_input_embeddings()(covered))
    rows = reduced.inputs["mm_encoder_outputs"]["image"].pooler_output[0]
    torch.testing.assert_close(rows, expected["expected_rows"], atol=tolerance["rows_atol"], rtol=0)
    logits, _ = prefill(model, reduced.inputs)
    torch.testing.assert_close(logits[0], expected["expected_logits"], atol=atol, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("case", golden_cases(FOLDER, "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    model, sample = golden_model(FOLDER, case.get("model", "model_next"), "eager"), golden_sample(FOLDER, case)
    assert isinstance(model, LlavaNext)
    params = case["params"]
    method: Method = VisionZip(contextual=params["contextual"]) if "contextual" in params else MMTok()
    reduced = reduce(model, method, [sample], Budget(count=params["per_crop"] * model.most_crops))
    (selection,) = reduced.selections
    assert selection.kept == params["per_crop"] * params["crops"]
    assert len(set(selection.places.tolist())) == len(selection.places)
    assert prefill(model, reduced.inputs)[0].isfinite().all()
