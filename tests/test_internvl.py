"""What only InternVL does: tiles, a thumbnail behind them, tokens of several patches."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from tiny_models import PATCH, build_tiny_internvl

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf
from mmtok_cli.models.internvl import InternVL
from mmtok_cli.models.room import laid_out
from mmtok_cli.pipeline import answer
from mmtok_cli.profiles import known_profiles

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def tiny_eager() -> InternVL:
    return InternVL("tiny", *build_tiny_internvl("eager"))


def stand_in() -> InternVL:
    profile = known_profiles()["internvl3-2b"]
    config = hf.make_config("internvl", profile.architecture or {})
    return InternVL("2b", laid_out(config, None), InternVL.stand_in_processor(config, profile.chat_template or ""))


@torch.inference_mode()
def test_signals_are_those_of_the_attention_itself(tiny_eager: InternVL) -> None:
    """Of a single tile, 8x8 patches; a token is made of 2x2 of them."""
    seen: list[torch.Tensor] = []
    attention = tiny_eager.model.model.vision_tower.encoder.layer[-1].attention
    image, names = picture(112, 112, 5), tiny_eager.signals
    prompt = tiny_eager.prepare(["Is there a star?"], [(image,)], [("x",)], [None])
    plain = tiny_eager.encode(prompt)[0]
    handle = attention.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    vision = tiny_eager.encode(prompt, names)[0]
    handle.remove()

    def merged(values: torch.Tensor) -> torch.Tensor:
        blocks = values.unflatten(-1, (8, 8)).unfold(-2, 2, 2).unfold(-2, 2, 2)
        return blocks.flatten(-2).mean(-1).flatten(-2)

    (weights,) = seen[0]
    found = vision.signals
    torch.testing.assert_close(found["class_attention"], 4 * merged(weights[:, 0, 1:]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        found["received_attention"], merged(weights[:, 1:, 1:].mean(0).sum(0)), atol=1e-5, rtol=1e-5
    )
    assert found["mean_keys"].shape == (16, 16)
    assert torch.equal(vision.projected, plain.projected) and not plain.signals
    assert torch.equal(vision.project(vision.features[None])[0], vision.projected)


def test_tiles_are_those_of_the_processor() -> None:
    model = stand_in()
    for width, height in ((640, 480), (448, 448), (300, 300), (100, 1500), (1, 1), (2000, 700)):
        image = picture(width, height)
        tiles = model.pixels(image, None)
        assert tiles.shape[1:] == (3, 448, 448) and model.total(image) == 256 * len(tiles)
    assert model.total(picture(640, 480)) == known_profiles()["internvl3-2b"].vision_tokens


def test_prompts_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`<img>`, 256 tokens for each tile, `</img>`, in the chat prompt of the released template."""
    model, image = stand_in(), picture(448, 448)
    monkeypatch.setattr(InternVL, "device", torch.device("cpu"))  # the model itself has no memory
    prompt = model.prepare(["red?"], [(image, image)], [("a", "b")], [None, None])
    around = "<img>" + "<IMG_CONTEXT>" * 256 + "</img>\n"
    text = "<|im_start|>user\n" + 2 * around + "red?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.input_ids[0].tolist() == model.tokenizer(text)["input_ids"]


def test_a_smaller_image_goes_through_the_encoder_in_one_piece(tiny_eager: InternVL) -> None:
    sample = Sample((picture(160, 100, 6),), "Is there a star?", ("x",))
    said = answer(tiny_eager, make_method("resize"), [sample], Budget(count=24), max_new_tokens=1)
    assert said.reduced.prompt.pixel_values[0].shape == (1, 3, 8 * PATCH, 12 * PATCH)
    assert said.reduced.tokens[0].kept == 24 and said.reduced.vision[0].crops is None


def test_features_of_another_layer_are_refused() -> None:
    model, processor = build_tiny_internvl()
    model.config.vision_feature_layer = -2
    with pytest.raises(MMTokError, match="takes its features from layer -2"):
        InternVL("tiny", model, processor)
