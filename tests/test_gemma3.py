"""What only Gemma 3 does: tokens that are means of patches, and that attend to each other in both directions."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from tiny_models import FAMILIES, LAYERS, build_tiny_gemma3

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf
from mmtok_cli.models.gemma3 import Gemma3
from mmtok_cli.models.room import laid_out
from mmtok_cli.pipeline import answer, check_budget, reduce
from mmtok_cli.profiles import known_profiles

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def tiny() -> Gemma3:
    return Gemma3("tiny", *build_tiny_gemma3("eager"))


@torch.inference_mode()
def test_signals_are_those_of_the_attention_itself(tiny: Gemma3) -> None:
    layers = tiny.model.model.vision_tower.encoder.layers
    weights: list[torch.Tensor] = []
    prompt = tiny.prepare(["Is there a star?"], [(picture(160, 100, 5),)], [("x",)], [None])
    plain = tiny.encode(prompt)[0]
    handles = [
        layer.self_attn.register_forward_hook(lambda _, args, output: weights.append(output[1])) for layer in layers
    ]
    vision = tiny.encode(prompt, tiny.signals)[0]
    for handle in handles:
        handle.remove()

    def averaged(values: torch.Tensor) -> torch.Tensor:
        return values.view(6, 2, 6, 2).mean((1, 3)).flatten()

    found = vision.signals
    for name, layer in (("received_attention", weights[-1]), ("middle_attention", weights[0])):
        torch.testing.assert_close(found[name], averaged(layer[0].mean(0).sum(0)), atol=1e-5, rtol=1e-5)
    assert found["mean_keys"].shape == (36, 16) and not plain.signals
    assert torch.equal(vision.projected, plain.projected)
    torch.testing.assert_close(vision.project(vision.features), vision.projected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_kept_tokens_attend_in_both_directions(tiny: Gemma3) -> None:
    """Of each image by itself: the attention of the first layer, a window, and of the second, which sees everything."""
    pair = Sample((picture(84, 84, 5), picture(160, 100, 6)), "Is <image> darker than <image>?", ("a", "b"))
    single = Sample((picture(84, 84, 7),), "What is it?", ("c",))
    reduced = reduce(tiny, make_method("mmtok"), [pair, single], Budget(count=8))
    ids, mask = reduced.inputs["input_ids"], reduced.inputs["attention_mask"].bool()
    of_images = ids == tiny.image_token_id
    assert reduced.inputs["token_type_ids"].equal(of_images.long()) and of_images.sum(1).tolist() == [16, 8]
    out = tiny.model(**reduced.inputs, output_attentions=True)
    assert len(out.attentions) == LAYERS
    for row in range(2):
        groups = of_images[row].long().diff(prepend=torch.zeros(1)).clamp(min=0).cumsum(0) * of_images[row]
        length = ids.shape[1]
        together = (groups[:, None] == groups[None]) & (groups > 0)
        visible = torch.ones(length, length, dtype=torch.bool).tril() | together
        near = torch.arange(length)[:, None] - torch.arange(length)[None] < 24  # the window of the first layer
        live = mask[row]
        for layer, seen in ((0, visible & near), (1, visible)):
            weights = out.attentions[layer][row].sum(0) > 0
            assert torch.equal(weights[live][:, live], seen[live][:, live]), (row, layer)


def test_nothing_runs_inside_the_language_model(tiny: Gemma3, samples: list[Sample]) -> None:
    for name in ("fastv", "random:inside", "v2drop"):
        method = make_method(name, **({"layers": (1, 2, 3)} if name == "v2drop" else {"layer": 2}))
        with pytest.raises(MMTokError, match="inside the language model do not run on tiny") as error:
            check_budget(tiny, method, samples[:1], Budget(count=5))
        assert "mmtok" in error.value.hint


def test_a_smaller_image_has_its_own_shape(tiny: Gemma3) -> None:
    sample = Sample((picture(160, 80, 6),), "Is there a star?", ("x",))
    said = answer(tiny, make_method("resize"), [sample], Budget(count=18), max_new_tokens=1)
    assert said.reduced.prompt.pixel_values[0].shape == (3, 3 * 28, 6 * 28)
    assert said.reduced.tokens[0].kept == 18


def test_prompts_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty lines around each image, `<start_of_image>`, 256 tokens, `<end_of_image>`, as the processor writes it."""
    profile = known_profiles()["gemma-3-4b"]
    config = hf.make_config("gemma3", profile.architecture or {})
    model = Gemma3("4b", laid_out(config, None), Gemma3.stand_in_processor(config, profile.chat_template or ""))
    monkeypatch.setattr(Gemma3, "device", torch.device("cpu"))  # the model itself has no memory
    image, shape = picture(640, 480), hf.encoder_shape(config)
    assert (shape.patches, shape.longest) == (16, 4096)  # of a token, and of an image
    assert model.pixels(image, None).shape == (3, 896, 896) and model.total(image) == profile.vision_tokens
    prompt = model.prepare(["red?"], [(image, image)], [("a", "b")], [None, None])
    around = "\n\n<start_of_image>" + "<image_soft_token>" * 256 + "<end_of_image>\n\n"
    text = "<bos><start_of_turn>user\n" + 2 * around + "red?<end_of_turn>\n<start_of_turn>model\n"
    assert prompt.input_ids[0].tolist() == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.input_ids[0, 0] == 2 and {1, 106} <= set(model.eos_token_ids)
    for token in ("<image_soft_token>", "<end_of_image>"):
        with pytest.raises(MMTokError, match=f"the question contains {token}"):
            model.chat(f"What is {token}?", 1)


def test_the_cache_of_a_window_is_counted_as_it_is(samples: list[Sample]) -> None:
    """Every other layer keeps no more than its window of 24 tokens, less the one that is read."""
    model = FAMILIES["gemma3"]("sdpa")
    said = answer(model, make_method("full"), samples[1:2], None, max_new_tokens=1)
    length, row = said.reduced.inputs["input_ids"].shape[1], 2 * 2 * 12 * 4
    assert said.kv_cache_bytes == 2 * row * length + 2 * row * 23
