"""VisionZip against the outputs of the authors' own code (see golden_cases.py)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_directory, golden_tensors, require_cases
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModel

from mmtok_cli.methods.visionzip import zip_tokens
from mmtok_cli.models.clip_signals import class_attention, inputs_of, mean_keys, patch_keys


@cache
def tower(attention: str = "sdpa") -> CLIPVisionModel:
    directory = golden_directory("visionzip") / "model"
    return CLIPVisionModel.from_pretrained(directory, attn_implementation=attention).eval()


@torch.no_grad()
def encode(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What VisionZip sees of the encoder: hidden states [batch, 1 + patches, dim] and the two signals of that layer."""
    attention = tower().encoder.layers[-2].self_attn
    with inputs_of(attention) as seen:
        hidden = tower()(pixels.float(), output_hidden_states=True).hidden_states[-2]
    keys = patch_keys(attention, seen[0])
    return hidden, class_attention(attention, seen[0], keys), mean_keys(keys)


def test_cases_are_there() -> None:
    require_cases("visionzip")


def test_the_weights_are_loaded_properly() -> None:
    require_cases("visionzip")
    unpruned = load_file(golden_directory("visionzip") / "unpruned.safetensors")
    hidden, _, _ = encode(unpruned["pixel_values"])
    torch.testing.assert_close(hidden, unpruned["hidden_states_m2"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", golden_cases("visionzip"))
def test_signals(case: dict[str, Any]) -> None:
    tensors = golden_tensors("visionzip", case)
    hidden, attention, keys = encode(tensors["pixel_values"])
    torch.testing.assert_close(hidden, tensors["hidden_states_m2"], atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.sum(1), tensors["cls_attention_sum"], atol=1e-6, rtol=0)
    torch.testing.assert_close(keys, tensors["key_metric"][:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", golden_cases("visionzip"))
def test_class_attention_equals_eager(case: dict[str, Any]) -> None:
    pixels = golden_tensors("visionzip", case)["pixel_values"]
    with torch.no_grad():
        eager = tower("eager")(pixels.float(), output_attentions=True).attentions[-2][:, :, 0, 1:]
    assert (encode(pixels)[1] - eager).abs().max() < 1e-6


@pytest.mark.parametrize("case", golden_cases("visionzip"))
def test_tokens(case: dict[str, Any]) -> None:
    tensors, p = golden_tensors("visionzip", case), case["params"]
    dominant, contextual, atol = p["dominant_argument"], p["contextual"], case["tolerance"]["tokens_atol"]
    for image, (hidden, attention, keys) in enumerate(zip(*encode(tensors["pixel_values"]), strict=True)):
        seen = (each[None] for each in (hidden[1:], hidden[0], attention, keys))
        (rows,), (places,) = zip_tokens(*seen, dominant, contextual)
        expected = tensors["expected_all_indices"][image] - 1  # the class token is 0 there, and -1 here
        assert places[:dominant].tolist() == sorted(expected.tolist())
        assert not set(places[dominant:].tolist()) & set(expected.tolist())
        torch.testing.assert_close(rows, tensors["expected_tokens"][image], atol=atol, rtol=0)
