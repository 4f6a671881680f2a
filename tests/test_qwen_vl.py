"""What only the Qwen families do: native resolution, positions of three axes, DeepStack."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import picture
from PIL import Image
from tiny_models import FAMILIES, PATCH
from torch.nn.functional import normalize

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer, check_budget, reduce
from mmtok_cli.rules import Rules


@pytest.fixture(scope="module")
def qwen() -> VisionLanguageModel:
    """Qwen2.5-VL's geometry in a tiny model, with the real bounds on an image's pixels."""
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    model.processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 12845056}
    return model


def test_qwen_counts(qwen: VisionLanguageModel) -> None:
    image = Image.new("RGB", (640, 480))
    assert qwen.total(image) == 17 * 23
    assert qwen.keep(image, Budget(percent=10), "released") == 39
    found = qwen.processor.image_processor(image, return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, 34, 46]]
    assert torch.equal(qwen.pixels(picture(640, 480), None), own_pixels(qwen, picture(640, 480)))


def own_pixels(qwen: VisionLanguageModel, image: Image.Image) -> torch.Tensor:
    side = 2 * PATCH
    resized = image.resize((23 * side, 17 * side), Image.Resampling.BICUBIC)
    return qwen.processor.image_processor(resized, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(("tokens", "grid"), [(64, (7, 9)), (128, (9, 13)), (192, (12, 16))])
def test_qwen_smaller_images(tokens: int, grid: tuple[int, int], qwen: VisionLanguageModel) -> None:
    image = Image.new("RGB", (640, 480))
    assert qwen.smaller(image, tokens) == grid
    assert len(qwen.pixels(image, grid)) == 4 * grid[0] * grid[1]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1024, 300), (300, 1000), (500, 500), (90, 60)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 39, 78, 160])
def test_qwen_smaller_images_fill_the_budget(size: tuple[int, int], tokens: int, qwen: VisionLanguageModel) -> None:
    rows, columns = qwen.smaller(Image.new("RGB", size), tokens)
    assert 0.85 * tokens <= rows * columns <= tokens
    if tokens >= 39:
        assert abs(math.log(rows / columns * size[0] / size[1])) < 0.35


def test_qwen_below_its_least_size_is_enlarged_by_nobody_but_the_model(qwen: VisionLanguageModel) -> None:
    """A budget below the processor's least number of pixels is met all the same."""
    sample = Sample((picture(200, 200),), "How many stars?", ("x",))
    said = answer(qwen, make_method("resize"), [sample], Budget(count=2), max_new_tokens=1)
    assert said.reduced.tokens[0].kept == 2


@torch.inference_mode()
def test_qwen_features_are_means_of_patches_in_raster_order() -> None:
    """Of the encoder's own last hidden state; the merger on the same cells gives the projected tokens."""
    for family in ("qwen2_5_vl", "qwen3_vl"):
        model = FAMILIES[family]("sdpa")
        prompt = model.prepare(["What?"], [(picture(160, 100),)], [("x",)], [None])
        (vision,) = model.encode(prompt)
        rows, columns = vision.grid
        sizes = torch.tensor([[1, 2 * rows, 2 * columns]])
        out = model.model.model.get_image_features(prompt.pixel_values[0], sizes, return_dict=True)
        assert torch.equal(vision.projected, out.pooler_output[0])
        merged = model.model.model.visual.merger(out.last_hidden_state)
        nearest = torch.cdist(vision.projected, merged).argmin(1)  # which cell of the encoder each token is
        cells = out.last_hidden_state.unflatten(0, (-1, 4)).mean(1)
        assert torch.equal(vision.features, cells[nearest])
        assert (nearest.tolist() == list(range(len(nearest)))) == (family == "qwen3_vl")


@torch.inference_mode()
def test_qwen_received_attention_equals_eager() -> None:
    """Column sums of the last block's attention matrix, by image, mean of the heads, mean over a token's patches."""
    model = FAMILIES["qwen2_5_vl"]("eager")
    images = (picture(160, 100), picture(84, 84, 2))
    prompt = model.prepare(["What?"], [images], [("a", "b")], [None, None])
    visions = model.encode(prompt, ("received_attention", "mean_keys"))
    attention = model.model.model.visual.blocks[2].attn
    seen: list[torch.Tensor] = []

    def watch(_: object, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.extend(kwargs["position_embeddings"])

    handle = attention.register_forward_pre_hook(watch, with_kwargs=True)
    plain = model.encode(prompt)
    handle.remove()
    hidden, cos, sin = seen
    half = cos.shape[-1] // 2

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos[:, None] + turned * sin[:, None]

    q, k, _ = attention.qkv(hidden).view(len(hidden), 3, 2, 16).unbind(1)
    q, k = rotated(q), rotated(k)
    start = 0
    for vision, same in zip(visions, plain, strict=True):
        patches = slice(start, start + 4 * vision.total)
        start = patches.stop
        matrix = (torch.einsum("ihd,jhd->hij", q[patches], k[patches]) / 4).softmax(-1)
        received = matrix.mean(0).sum(0).view(-1, 4).mean(1)
        keys = k[patches].view(-1, 4, 2, 16).mean((1, 2))
        assert float(received.sum()) == pytest.approx(vision.total, rel=1e-4)
        torch.testing.assert_close(vision.signals["received_attention"].sort().values, received.sort().values)
        order = torch.cdist(vision.signals["received_attention"][:, None], received[:, None]).argmin(1)
        torch.testing.assert_close(vision.signals["mean_keys"], keys[order], atol=1e-5, rtol=1e-5)
        assert torch.equal(vision.projected, same.projected) and not same.signals


@torch.inference_mode()
def test_visionzip_without_a_class_token(samples: list[Sample]) -> None:
    """Against the definition, token by token."""
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    prompt = model.prepare(["What?"], [samples[1].images], [("a",)], [None])
    (vision,) = model.encode(prompt, ("received_attention", "mean_keys"))
    found = make_method("visionzip").select(vision, None, 9)  # type: ignore[arg-type]
    scores, keys = vision.signals["received_attention"], normalize(vision.signals["mean_keys"], dim=-1)
    dominant = sorted(scores.topk(8).indices.tolist())
    others = [i for i in range(vision.total) if i not in dominant]
    target = others[0]
    members = [i for i in others if i != target]
    expected = {i: vision.projected[i] for i in dominant}
    expected[target] = vision.projected[target] + vision.projected[members].mean(0)
    assert found.indices.tolist() == sorted(expected)
    assert found.merged is not None and found.indices[found.merged].tolist() == [target]
    torch.testing.assert_close(found.tokens, torch.stack([expected[i] for i in sorted(expected)]))
    two = make_method("visionzip", contextual=2).select(vision, None, 9)  # type: ignore[arg-type]
    dominant = sorted(scores.topk(7).indices.tolist())
    others = [i for i in range(vision.total) if i not in dominant]
    targets = [others[0], others[len(others) // 2]]
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for i in others:
        if i not in targets:
            groups[targets[int((keys[targets] @ keys[i]).argmax())]].append(i)
    for t in targets:
        row = two.tokens[two.indices.tolist().index(t)]
        torch.testing.assert_close(row, vision.projected[t] + vision.projected[groups[t]].mean(0))


@torch.inference_mode()
def test_visionzip_has_the_authors_two_settings_without_a_class_token() -> None:
    model, method = FAMILIES["qwen2_5_vl"]("sdpa"), make_method("visionzip")
    sample = Sample((picture(200, 160),), "What?", ("a",))
    total = model.total(sample.images[0])
    contextual = max(1, int(0.05 * total))
    assert total > 40 and contextual > 1
    for percent, dominant in ((70, int(0.65 * total)), (50, int(0.45 * total))):
        (found,) = reduce(model, method, [sample], Budget(percent=percent)).selections
        assert (found.kept, int(found.merged.sum())) == (dominant + contextual, contextual)
        (counted,) = reduce(model, method, [sample], Budget(count=found.kept)).selections
        assert counted.indices.equal(found.indices)
        (other,) = reduce(model, method, [sample], Budget(count=found.kept - 3)).selections
        assert int(other.merged.sum()) == round(other.kept / 6.4) != contextual


def test_deepstack_rows_follow_the_selection(samples: list[Sample]) -> None:
    model = FAMILIES["qwen3_vl"]("sdpa")
    reduced = reduce(model, make_method("mmtok"), samples, Budget(count=5))
    for number, layer in enumerate(reduced.inputs["mm_encoder_outputs"]["image"].deepstack_features):
        for rows, vision, selection in zip(layer, reduced.vision, reduced.selections, strict=True):
            assert torch.equal(rows, vision.deepstack[number][selection.indices])


def test_cuts_before_deepstack_is_done_are_refused(samples: list[Sample]) -> None:
    model = FAMILIES["qwen3_vl"]("sdpa")
    model.model.config.vision_config.deepstack_visual_indexes = [0, 1]
    with pytest.raises(MMTokError, match="FastV drops tokens before layer 2, and the first 2 decoder layers"):
        check_budget(model, make_method("fastv", layer=1), samples[:1], Budget(count=5))
    answer(model, make_method("fastv", layer=2), samples[:1], Budget(count=5), max_new_tokens=1)


@pytest.mark.parametrize("size", [(30, 5970), (5970, 30)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_sees_images_as_thin_as_it_may(family: str, size: tuple[int, int]) -> None:
    model = FAMILIES[family]("sdpa")
    sample = Sample((picture(*size),), "How many stars?", ("x",))
    for method in ("mmtok", "resize"):
        assert answer(model, make_method(method), [sample], Budget(count=5), max_new_tokens=1).reduced.tokens[0].kept
    with pytest.raises(MMTokError, match="cannot see an image of 1x5000") as error:
        model.total(picture(1, 5000))
    assert "crop" in error.value.hint


def test_qwen_positions_cannot_be_renumbered(samples: list[Sample]) -> None:
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    with pytest.raises(MMTokError, match="cannot be renumbered"):
        reduce(model, make_method("mmtok"), samples[:1], Budget(count=5), rules=Rules(positions="renumber"))


def test_qwen_covers_all_words_as_released() -> None:
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    prompt = model.prepare(["What is the red star?"], [(picture(84, 84),)], [("x",)], [None])
    (released,), (harmonised,) = (model.text_tokens(prompt, track) for track in ("released", "harmonised"))
    assert released.words == ("Question:", "What", "is", "the", "red", "star?") and harmonised.words is None
    seen = []
    method = make_method("mmtok:text")
    for text in (released, harmonised):
        watched = type(text)(text.question, lambda words: seen.append(tuple(words)) or text.embed(words), text.words)  # noqa: B023
        method.select(model.encode(prompt)[0], watched, 3)
    assert seen == [released.words, ("red", "star")]
