"""What only one family of models does: crops and their packing, native resolution, DeepStack."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import picture
from PIL import Image
from tiny_models import FAMILIES, PATCH, SQUARE, build_tiny_llava_next
from torch.nn.functional import normalize
from transformers import LlavaNextConfig

from mmtok_cli.budget import Budget
from mmtok_cli.crops import Crops
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava_next import LlavaNext
from mmtok_cli.models.room import laid_out
from mmtok_cli.models.sources import architecture
from mmtok_cli.pipeline import answer, check_budget, reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import CLASS_TOKEN, PADDING, Selection, VisionTokens

HARMONISED = Rules("harmonised")
# Measured on the real processor and model: height, width, crops, vision tokens, ends of lines among them.
PACKED = [
    (480, 640, 5, 2340, 36),
    (640, 480, 5, 2352, 48),
    (427, 640, 5, 2144, 32),
    (672, 672, 5, 2928, 48),
    (336, 336, 3, 1176, 24),
    (300, 900, 4, 2328, 24),
    (1000, 250, 4, 1944, 72),
]


@pytest.fixture(scope="module")
def full_size() -> LlavaNext:
    """The real model's geometry, without memory behind its weights."""
    config = architecture("llava-next-7b", "")
    assert isinstance(config, LlavaNextConfig)
    template = known_profiles()["llava-next-7b"].chat_template
    return LlavaNext("next", laid_out(config, None), LlavaNext.stand_in_processor(config, template))


@pytest.fixture(scope="module")
def tiny_next() -> LlavaNext:
    return LlavaNext("tiny", *build_tiny_llava_next())


@pytest.mark.parametrize(("height", "width", "crops", "total", "lines"), PACKED)
def test_next_counts(height: int, width: int, crops: int, total: int, lines: int, full_size: LlavaNext) -> None:
    image = Image.new("RGB", (width, height))
    packing = full_size._packing(height, width)
    assert (full_size.total(image), len(packing.places)) == (total, crops)
    assert int((packing.sources < 0).sum()) == lines
    assert full_size.pixels(image, None).shape == (crops, 3, 336, 336)
    assert full_size.keep(image, Budget(count=160), "released") == 32 * crops
    assert full_size.keep(image, Budget(count=160), "harmonised") == 160
    assert full_size.keep(image, Budget(percent=10), "released") == total // 10
    first, second = full_size.panels(image, None)
    assert first.grid == (24, 24) and second.grid == (lines, (total - 576) // lines - 1)
    assert sorted((*first.tokens, *second.tokens)) == (packing.sources >= 0).nonzero().squeeze(1).tolist()


def test_next_packs_as_the_model_does(tiny_next: LlavaNext) -> None:
    """Crops' tokens at their places give the packed sequence back, bit for bit."""
    for size in ((84, 84), (160, 100), (60, 190)):
        image = picture(*size)
        prompt = tiny_next.prepare(["What?"], [(image,)], [("x",)], [None])
        with torch.inference_mode():
            (vision,) = tiny_next.encode(prompt)
            stock = tiny_next.model.model.get_image_features(
                prompt.pixel_values[0][None], torch.tensor([[size[1], size[0]]]), return_dict=True
            ).pooler_output[0]
        assert torch.equal(vision.projected, stock)
        assert vision.crops is not None
        for crop, places in zip(vision.crops.tokens, vision.crops.places, strict=True):
            shown = places >= 0
            assert crop.eligible.equal(shown)
            assert torch.equal(crop.projected[shown], vision.projected[places[shown]])
        newline = tiny_next.model.model.image_newline
        assert all(torch.equal(row, newline) for row in vision.projected[~vision.eligible])
        assert not bool(vision.features[~vision.eligible].any())


def test_next_prompt_is_the_processors_own(tiny_next: LlavaNext) -> None:
    image = picture(160, 100, 3)
    text = tiny_next._chat("What digit is it?", 1)
    expected = tiny_next.processor(images=image, text=text, return_tensors="pt")
    prompt = tiny_next.prepare(["What digit is it?"], [(image,)], [("x",)], [None])
    assert (prompt.input_ids == tiny_next.image_token_id).sum() == (
        expected["input_ids"] == tiny_next.image_token_id
    ).sum()
    assert torch.equal(prompt.pixel_values[0], expected["pixel_values"][0])


@torch.inference_mode()
def test_next_order_of_visionzip(tiny_next: LlavaNext) -> None:
    """The first crop's class token, dominant patches and merged ones; then the others' dominant patches line by line of
    the stitched crops, their class tokens, and what was merged, crop by crop."""
    sample = Sample((picture(168, 168, 3),), "How many stars?", ("x",))
    said = reduce(tiny_next, make_method("visionzip"), [sample], Budget(count=50))
    (vision,), (joined,) = said.vision, said.selections
    assert vision.crops is not None and joined.kept == 50
    method = make_method("visionzip")
    alone = [method.select(crop, None, 10) for crop in vision.crops.tokens]  # type: ignore[arg-type]
    rows = [selection.tokens for selection in alone]
    dominant = []
    for number, (selection, kept) in enumerate(zip(alone[1:], rows[1:], strict=True)):
        for index, row in zip(selection.indices.tolist()[1:8], kept[1:8], strict=True):
            down, across = divmod(number, 2)
            y, x = divmod(index, 6)
            dominant.append(((down * 6 + y) * 12 + across * 6 + x, row))
    expected = [
        *rows[0],
        *(row for _, row in sorted(dominant, key=lambda pair: pair[0])),
        *(kept[0] for kept in rows[1:]),
        *(row for kept in rows[1:] for row in kept[8:]),
    ]
    torch.testing.assert_close(joined.tokens, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert (joined.indices == CLASS_TOKEN).nonzero().squeeze(1).tolist() == [0, 38, 39, 40, 41]
    assert joined.merged is not None and joined.merged.nonzero().squeeze(1).tolist() == [8, 9, *range(42, 50)]


def test_next_padding_is_kept_as_released_alone(tiny_next: LlavaNext) -> None:
    sample = Sample((picture(168, 90, 3),), "How many stars?", ("x",))
    released, harmonised = (
        reduce(tiny_next, make_method("random"), [sample], Budget(count=50), rules=rules).selections[0]
        for rules in (Rules(), HARMONISED)
    )
    assert bool((released.indices == PADDING).any()) and not bool((harmonised.indices < 0).any())
    with pytest.raises(MMTokError, match="has no position in the unreduced prompt") as error:
        reduce(tiny_next, make_method("random"), [sample], Budget(count=50), rules=Rules(positions="keep"))
    assert "harmonised" in error.value.hint


@pytest.mark.parametrize("name", ["divprune", "fastv", "pyramiddrop", "random:inside"])
def test_next_methods_that_see_the_packed_sequence(name: str, tiny_next: LlavaNext, samples: list[Sample]) -> None:
    """Ends of lines compete where the authors let them, and never on the harmonised track."""
    parameters = {"layers": (1, 2)} if name == "pyramiddrop" else {} if name == "divprune" else {"layer": 1}
    method = make_method(name, **parameters)
    for rules in (Rules(), HARMONISED):
        said = answer(tiny_next, method, samples[:1], Budget(percent=90), rules=rules, max_new_tokens=1)
        ends = ~said.reduced.vision[0].eligible
        kept = int(ends[said.selections[0].indices].sum())
        assert (kept > 0) == (rules == Rules() and name != "random:inside")


def test_next_refuses_what_it_cannot_keep(tiny_next: LlavaNext) -> None:
    image = picture(84, 84)
    with pytest.raises(MMTokError, match="comes to 0 tokens of an image that has 3 crops") as error:
        tiny_next.keep(image, Budget(count=1), "released")
    assert "choose 2 to" in error.value.hint
    total = tiny_next.total(image)
    assert tiny_next.keep(image, Budget(count=total * 5 // 3), "released") == total
    with pytest.raises(MMTokError, match="crops"):
        tiny_next.keep(image, Budget(count=total * 2), "released")
    sample = Sample((image,), "How many?", ("x",))
    with pytest.raises(MMTokError, match="more than the 72 vision tokens of the image's crops"):
        reduce(tiny_next, make_method("mmtok"), [sample], Budget(count=75), rules=HARMONISED)


def test_split_is_even_and_fills_what_there_is() -> None:
    def crops(*capacities: int) -> Crops:
        tokens = tuple(
            VisionTokens(torch.zeros(9, 2), torch.zeros(9, 2), (3, 3), torch.arange(9) < n, "x", lambda rows: rows)
            for n in capacities
        )
        return Crops(tokens, torch.zeros(len(tokens), 9), torch.zeros(len(tokens), 9))

    assert crops(9, 9, 9).split(15) == [5, 5, 5]
    assert crops(9, 9, 9).split(17) == [6, 6, 5]
    assert crops(9, 2, 9).split(17) == [8, 2, 7]
    assert crops(9, 0, 1).split(10) == [9, 0, 1]
    assert crops(9, 9).split(0) == [0, 0]
    with pytest.raises(MMTokError, match="more than the 10"):
        crops(9, 1).split(11)


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


@pytest.mark.parametrize("size", [(5000, 1), (2000, 30), (1, 5000), (30, 2000)])
def test_next_panels_of_thin_images(size: tuple[int, int], tiny_next: LlavaNext) -> None:
    """Of the thinnest nothing is left of the crops; what is left is drawn inside the picture."""
    image = picture(*size)
    first, *others = tiny_next.panels(image, None)
    assert len(first.tokens) == 36 and len(others) <= 1
    for panel in others:
        assert panel.grid[0] * panel.grid[1] == len(panel.tokens) > 0


def test_qwen_positions_cannot_be_counted_anew(samples: list[Sample]) -> None:
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    with pytest.raises(MMTokError, match="cannot be counted anew"):
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


def test_methods_that_read_signals_must_say_that_they_see_crops(tiny_next: LlavaNext, samples: list[Sample]) -> None:
    class Blind(type(make_method("vispruner"))):  # type: ignore[misc]
        per_crop = False

    with pytest.raises(MMTokError, match="Blind reads signals of the encoder"):
        reduce(tiny_next, Blind(), samples[:1], Budget(count=5))


def test_pool_of_uneven_crops_is_refused_clearly(tiny_next: LlavaNext) -> None:
    sample = Sample((picture(84, 84),), "How many?", ("x",))
    with pytest.raises(MMTokError, match="no rectangle of"):
        reduce(tiny_next, make_method("resize:pool"), [sample], Budget(count=21), rules=HARMONISED)
    kept = reduce(tiny_next, make_method("resize:pool"), [sample], Budget(count=20)).selections[0]
    assert kept.kept == 12 and kept.merged is not None and bool(kept.merged.all())


def test_smaller_next_image_goes_through_in_one_piece(tiny_next: LlavaNext) -> None:
    sample = Sample((picture(168, 168),), "How many?", ("x",))
    said = answer(tiny_next, make_method("resize"), [sample], Budget(count=60), max_new_tokens=1)
    assert said.reduced.prompt.pixel_values[0].shape == (1, 3, 6 * PATCH, 10 * PATCH)
    assert said.reduced.tokens[0].kept == 60 and said.reduced.vision[0].crops is None
    assert 6 * PATCH == SQUARE


def test_selection_of_nothing_in_a_crop(tiny_next: LlavaNext) -> None:
    """Two tokens for three crops: the last crop keeps none."""
    sample = Sample((picture(84, 84),), "How many?", ("x",))
    said = reduce(tiny_next, make_method("mmtok"), [sample], Budget(count=2), rules=HARMONISED)
    assert said.selections[0].kept == 2
    assert isinstance(said.selections[0], Selection)
