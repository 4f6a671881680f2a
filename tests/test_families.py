"""Families of which `make test` runs a part: one method of each kind through what the shared matrix checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_matrix as matrix
import torch
import transformers
from tiny_models import FAMILIES

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf, load_model
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.families import WITHOUT_ENCODED_IMAGES
from mmtok_cli.pipeline import reduce
from mmtok_cli.rules import Rules

pytestmark = pytest.mark.compat
# One that selects by features, one with signals of the encoder that merges, one whose signals come of the middle of the
# encoder, inside the language model by attention, by keys, by states and at random, and a smaller image.
METHODS = ["mmtok", "visionzip", "hiprune", "fastv", "sparsevlm", "dart", "v2drop", "resize"]


@pytest.fixture(scope="module", params=["gemma3", "llava_onevision", "qwen3_5", "qwen3_vl_moe"])
def vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return FAMILIES[request.param]("sdpa")


@pytest.mark.parametrize("name", METHODS)
def test_matrix_in_part(name: str, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    matrix.skip_refused(name, vlm)
    matrix.test_identity_at_full_budget(name, "released", vlm, samples)
    matrix.test_exact_count(name, "harmonised", vlm, samples)
    matrix.test_padding_is_never_selected(name, "harmonised", vlm, samples)
    matrix.test_batch_equals_single(name, Rules("harmonised"), vlm, samples)
    matrix.test_the_model_is_left_as_it_was(name, vlm, samples)
    if name not in matrix.INSIDE:
        matrix.test_removing_rows_equals_a_prompt_without_them(name, vlm.positions[0], vlm, samples)


@torch.inference_mode()
def test_the_forward_pass_reads_what_it_is_given(vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    reduced = reduce(vlm, matrix.tiny_method("mmtok"), samples[:1], Budget(count=8))
    _, cache = hf.forward(vlm.model, reduced.inputs)
    assert hf.cached_tokens(cache) == reduced.inputs["input_ids"].shape[1]
    assert len(hf.cached_bytes(cache)) == vlm.layer_count


@pytest.mark.parametrize("model_type", WITHOUT_ENCODED_IMAGES)
def test_families_that_take_no_encoded_images_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(MMTokError, match=f"is a '{model_type}' model, to which transformers gives no encoded") as error:
        load_model(str(tmp_path))
    assert "qwen3_5" in error.value.hint


@pytest.mark.parametrize("model_type", [*FAMILIES, *WITHOUT_ENCODED_IMAGES])
def test_encoded_images_are_taken_as_the_lists_say(model_type: str) -> None:
    """By the text of transformers' own file of each architecture."""
    folder = Path(transformers.__file__).parent / "models" / model_type
    text = (folder / f"modeling_{model_type}.py").read_text(encoding="utf-8")
    assert ("mm_encoder_outputs" in text) == (model_type in FAMILIES)
