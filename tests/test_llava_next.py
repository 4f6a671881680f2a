"""What only LLaVA-NeXT does: crops, how they are packed, and budgets over them."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from PIL import Image
from tiny_models import PATCH, SQUARE, build_tiny_llava_next
from transformers import LlavaNextConfig

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models.llava_next import LlavaNext
from mmtok_cli.models.room import laid_out
from mmtok_cli.models.sources import architecture
from mmtok_cli.pipeline import answer, check_budget, reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import CLASS_TOKEN, PADDING, Crops, Selection, VisionTokens

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
    packing = full_size.packing(height, width)
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


def test_next_scores_of_the_crops_in_the_order_of_the_prompt(tiny_next: LlavaNext) -> None:
    prompt = tiny_next.prepare(["What?"], [(picture(160, 100),)], [("x",)], [None])
    with torch.inference_mode():
        (vision,) = tiny_next.encode(prompt, ("class_attention",))
    scores = vision.scores(lambda crop: crop.signals["class_attention"].mean(0))
    assert vision.crops is not None and len(scores) == vision.total
    for crop, places in zip(vision.crops.tokens, vision.crops.places, strict=True):
        assert scores[places[places >= 0]].equal(crop.signals["class_attention"].mean(0)[places >= 0])
    assert set(scores[~vision.eligible].tolist()) == {float(scores[vision.eligible].min())}


def test_next_prompt_is_the_processors_own(tiny_next: LlavaNext) -> None:
    image = picture(160, 100, 3)
    text = tiny_next.chat("What digit is it?", 1)
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


@pytest.mark.parametrize("size", [(5000, 1), (2000, 30), (1, 5000), (30, 2000)])
def test_next_panels_of_thin_images(size: tuple[int, int], tiny_next: LlavaNext) -> None:
    """Of the thinnest nothing is left of the crops; what is left is drawn inside the picture."""
    image = picture(*size)
    first, *others = tiny_next.panels(image, None)
    assert len(first.tokens) == 36 and len(others) <= 1
    for panel in others:
        assert panel.grid[0] * panel.grid[1] == len(panel.tokens) > 0


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
    with pytest.raises(MMTokError, match="comes to 0 tokens"):
        check_budget(tiny_next, make_method("mmtok"), [sample], Budget(count=1))


def test_next_reduces_as_far_as_possible(tiny_next: LlavaNext) -> None:
    """One of several images that cannot meet a budget keeps one token, all tokens, or all that are no padding."""
    image = picture(84, 84)
    sample, total = Sample((image,), "How many?", ("x",)), tiny_next.total(image)

    def kept(budget: int, rules: Rules) -> int:
        return reduce(tiny_next, make_method("mmtok"), [sample], Budget(count=budget), rules=rules).tokens[0].kept

    assert kept(1, Rules()) == 1 and kept(total * 2, Rules()) == total
    assert kept(75, HARMONISED) == 72 and kept(total + 1, HARMONISED) == total


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


def test_methods_that_read_signals_must_say_that_they_see_crops(tiny_next: LlavaNext, samples: list[Sample]) -> None:
    class Blind(type(make_method("vispruner"))):  # type: ignore[misc]
        per_crop = False

    with pytest.raises(MMTokError, match=r"Blind\.per_crop must be True: the method reads signals"):
        reduce(tiny_next, Blind(), samples[:1], Budget(count=5))


def test_pool_of_uneven_crops_keeps_what_forms_a_grid(tiny_next: LlavaNext) -> None:
    sample = Sample((picture(84, 84),), "How many?", ("x",))
    kept = reduce(tiny_next, make_method("resize:pool"), [sample], Budget(count=21), rules=HARMONISED).tokens[0].kept
    assert 15 <= kept < 21  # seven for each crop, and six form a grid
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
