"""What only LLaVA-OneVision does: many crops are scaled down, and several images are shown without crops."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from tiny_models import FAMILIES, build_tiny_llava_onevision, stock_logits
from transformers import LlavaOnevisionProcessor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf
from mmtok_cli.models.llava_onevision import LlavaOneVision
from mmtok_cli.models.room import laid_out
from mmtok_cli.pipeline import answer, reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.rules import Rules

pytestmark = pytest.mark.compat
LARGE = Sample((picture(400, 330, 8),), "Is there a star?", ("large",))  # sixteen crops of the tiny model


@pytest.fixture(scope="module")
def tiny() -> LlavaOneVision:
    model = FAMILIES["llava_onevision"]("sdpa")
    assert isinstance(model, LlavaOneVision)
    return model


def test_counts_are_those_of_the_processor() -> None:
    profile = known_profiles()["llava-onevision-0.5b"]
    config = hf.make_config("llava_onevision", profile.architecture or {})
    processor = LlavaOneVision.stand_in_processor(config, profile.chat_template or "")
    model = LlavaOneVision("0.5b", laid_out(config, None), processor)
    theirs = SimpleNamespace(
        image_processor=processor.image_processor, num_image_tokens=27 * 27, vision_aspect_ratio="anyres_max_9"
    )
    theirs._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, theirs)
    for width, height in ((640, 480), (384, 384), (100, 90), (90, 700), (1500, 400), (1600, 1200), (2300, 2300)):
        image = picture(width, height)
        expected = LlavaOnevisionProcessor._get_number_of_features(theirs, height, width, 384, 384)
        assert model.total(image) == expected == model.unencoded(image).total
        shown = {token for panel in model.panels(image, None) for token in panel.tokens}
        assert len(shown) == int(model.unencoded(image).eligible.sum())
    assert model.total(picture(640, 480)) == profile.vision_tokens
    assert model.pixels(picture(640, 480), None).shape == (5, 3, 384, 384)


@torch.inference_mode()
def test_an_image_of_many_crops(tiny: LlavaOneVision) -> None:
    """Chosen from as a whole, with features and signals that are scaled down as the model scales tokens down."""
    total = tiny.total(LARGE.images[0])
    assert tiny.packing(330, 400).stitched == (4, 4) and total < len(tiny.packing(330, 400).sources)
    whole = answer(tiny, make_method("mmtok"), [LARGE], Budget(percent=100), max_new_tokens=1)
    assert torch.equal(whole.first_logits, stock_logits(tiny, LARGE))
    prompt = tiny.prepare([LARGE.question], [LARGE.images], [LARGE.image_ids], [None])
    (vision,) = tiny.encode(prompt, tiny.signals)
    ends = ~vision.eligible
    assert (
        vision.crops is None
        and vision.total == total
        and vision.eligible.equal(tiny.unencoded(LARGE.images[0]).eligible)
    )
    assert bool((vision.features[ends] == 0).all()) and not bool((vision.features[~ends] == 0).all(1).any())
    assert vision.signals["received_attention"].shape == (total,) and vision.signals["mean_keys"].shape == (total, 16)
    rows, columns = tiny.whole_grid(LARGE.images[0])
    assert int(ends.sum()) == rows and total == 36 + rows * (columns + 1)
    assert float(vision.signals["received_attention"][:36].mean()) == pytest.approx(1, abs=1e-4)  # as in any crop
    for name in ("mmtok", "visionzip", "hiprune", "divprune", "uniform", "resize"):
        for rules in (Rules(), Rules("harmonised")):
            said = answer(tiny, make_method(name), [LARGE], Budget(count=24), rules=rules, max_new_tokens=1)
            assert said.reduced.tokens[0].kept == 24
            if name != "resize" and not (rules.track == "released" and make_method(name).keeps_padding):
                assert not bool(ends[said.selections[0].places].any())
    with pytest.raises(MMTokError, match="pooling needs vision tokens that form a rectangle"):
        reduce(tiny, make_method("resize:pool"), [LARGE], Budget(count=24))


def test_several_images_are_refused(tiny: LlavaOneVision) -> None:
    pair = Sample((picture(84, 84), picture(84, 84)), "Which is darker?", ("a", "b"))
    with pytest.raises(MMTokError, match="a question about 2 images") as error:
        answer(tiny, make_method("mmtok"), [pair], Budget(count=5))
    assert "one image at a time" in error.value.hint


def test_other_features_are_refused() -> None:
    model, processor = build_tiny_llava_onevision()
    model.config.vision_feature_layer = -2
    with pytest.raises(MMTokError, match="features of layer -2, which is not supported"):
        LlavaOneVision("tiny", model, processor)
