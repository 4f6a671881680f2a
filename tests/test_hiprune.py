"""HiPrune: its signals against transformers' own attention, and its choice at the limits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor

from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.hiprune import hierarchical
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.tokens import TextTokens, VisionTokens

NAMES = ("middle_attention", "received_attention")
TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


def encoded(vlm: VisionLanguageModel, sample: Sample, names: tuple[str, ...] = NAMES) -> VisionTokens:
    prompt = vlm.prepare([sample.question], [sample.images], [sample.image_ids], [None])
    with torch.inference_mode():
        (vision,) = vlm.encode(prompt, names)
    return vision


@torch.inference_mode()
def test_clip_signals_are_column_means_of_the_attention(samples: list[Sample]) -> None:
    """In the first of three layers and in the second, from which the features come."""
    vlm = FAMILIES["llava"]("eager")
    vision = encoded(vlm, samples[0])
    prompt = vlm.prepare([samples[0].question], [samples[0].images], [samples[0].image_ids], [None])
    out = vlm.model.model.vision_tower(prompt.pixel_values[0][None], output_attentions=True)
    for name, layer in zip(NAMES, (0, 1), strict=True):
        expected = out.attentions[layer][0].mean(0).sum(0)[1:]
        torch.testing.assert_close(vision.signals[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), [("qwen2_5_vl", True), ("qwen3_vl", True), ("internvl", False)])
def test_the_middle_layer_is_read_like_the_last(
    family: str, method: bool, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = FAMILIES[family]("sdpa")
    usual = encoded(vlm, samples[0]).signals
    assert not torch.allclose(usual["middle_attention"], usual["received_attention"])
    if method:
        monkeypatch.setattr(type(vlm), "_middle_attention", type(vlm)._last_attention)
    else:
        monkeypatch.setattr(type(vlm), "_middle_layer", -1)
    same = encoded(vlm, samples[0]).signals
    assert torch.equal(same["middle_attention"], usual["received_attention"])
    assert set(encoded(vlm, samples[0], ("middle_attention",)).signals) == {"middle_attention"}


def test_neighbours_and_limits() -> None:
    def one_image(
        middle: Tensor, last: Tensor, grid: tuple[int, int], k: int, anchors: int, allowed: Tensor | None = None
    ) -> Tensor:
        eligible = None if allowed is None else allowed[None]
        return hierarchical(middle[None], last[None], grid, k, anchors, eligible)[0]

    middle, last = torch.zeros(24), torch.arange(24.0)
    middle[6], middle[5], middle[12] = 3, 2, 1  # 6 begins the second of four rows
    picks = one_image(middle, last, (4, 6), 8, 1)
    assert picks[:5].tolist() == [6, 5, 12, 0, 7]  # the anchor, then its neighbours by attention in the middle layer
    assert picks[5:].tolist() == [23, 22, 21]
    assert one_image(middle, last, (4, 6), 3, 1).tolist() == [6, 5, 12]
    assert one_image(middle, last, (4, 6), 2, 5).tolist() == [6, 5]
    allowed = torch.ones(24, dtype=torch.bool).index_fill(0, torch.tensor([6, 23]), False)
    assert one_image(middle, last, (4, 6), 6, 1, allowed).tolist() == [5, 0, 4, 11, 22, 21]
    assert one_image(torch.zeros(9), torch.zeros(9), (3, 3), 9, 1).sort().values.tolist() == list(range(9))


def test_the_share_of_anchors_is_rounded_as_in_python() -> None:
    signals = {"middle_attention": torch.arange(600.0), "received_attention": torch.arange(600.0).flip(0)}
    image = VisionTokens(
        torch.zeros(600, 4),
        torch.zeros(600, 4),
        (20, 30),
        torch.ones(600, dtype=torch.bool),
        "image",
        lambda x: x,
        signals,
    )
    for budget, anchors in ((25, 0), (75, 2), (125, 2), (250, 5)):
        order = make_method("hiprune").select(image, TEXT, budget).order
        assert order is not None and len(order.unique()) == budget
        assert order[:anchors].tolist() == list(range(599, 599 - anchors, -1))
    with pytest.raises(MMTokError, match=r"alpha of 1\.5"):
        make_method("hiprune", alpha=1.5)
