"""Where model and method meet: stages, decoding, positions, several images."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from conftest import picture

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import STAGES, answer, reduce


def test_decode_equals_generate(tiny: Llava, samples: list[Sample]) -> None:
    said = answer(tiny, make_method("mmtok"), samples, Budget(count=6), max_new_tokens=12)
    with torch.inference_mode():
        expected = tiny.model.generate(
            **reduce(tiny, make_method("mmtok"), samples, Budget(count=6)).inputs, max_new_tokens=12, do_sample=False
        )
    new = expected[:, said.reduced.inputs["input_ids"].shape[1] :]
    assert said.token_ids.equal(new)


def test_stages_are_entered_in_order(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    entered = []

    @contextmanager
    def stage(name: str):
        entered.append(name)
        yield

    answer(tiny_sdpa, make_method("full"), samples[:1], None, stage=stage, max_new_tokens=2)
    assert tuple(entered) == STAGES


def test_cache_holds_the_kept_tokens_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    full, reduced = (
        answer(tiny_sdpa, make_method(name), samples[:1], Budget(count=6), max_new_tokens=1)
        for name in ("full", "mmtok")
    )
    per_token = 4 * 2 * 2 * 12 * 4  # layers, keys and values, KV heads, head width, bytes
    assert full.kv_cache_bytes - reduced.kv_cache_bytes == 30 * per_token
    assert full.reduced.tokens[0].text == reduced.reduced.tokens[0].text


def test_prefix_of_a_larger_budget(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    large, small = (
        reduce(tiny_sdpa, make_method("mmtok"), samples[:1], Budget(count=k)).selections[0] for k in (16, 5)
    )
    assert large.order is not None and small.order is not None
    assert large.order[:5].equal(small.order)


def test_several_images_in_one_question(tiny: Llava) -> None:
    images = (picture(84, 84, 5), picture(160, 100, 6))
    sample = Sample(images, "Is there a star?", ("a", "b"))
    both = reduce(tiny, make_method("mmtok"), [sample], Budget(count=8))
    assert both.tokens[0].total == 72 and both.tokens[0].kept == 16
    for image, image_id, selection in zip(images, "ab", both.selections, strict=True):
        alone = reduce(tiny, make_method("mmtok"), [Sample((image,), "Is there a star?", (image_id,))], Budget(count=8))
        assert selection.indices.equal(alone.selections[0].indices)


def test_the_encoder_is_spared_by_resize(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny_sdpa, make_method("resize"), samples, Budget(count=8))
    assert [v.grid for v in reduced.vision] == [(2, 4), (2, 4), (4, 2)]  # the long side follows the image's
    assert all(bool(v.eligible.all()) for v in reduced.vision)  # no padding: the image fills the smaller grid
    assert [tuple(p.shape) for p in reduced.prompt.pixel_values] == [(3, 28, 56), (3, 28, 56), (3, 56, 28)]


def test_budget_above_the_eligible_tokens_is_refused(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    for name in ("mmtok", "mmtok:text", "mmtok:vision", "random", "uniform"):
        with pytest.raises(MMTokError, match="30 is more than the 24 vision tokens of picture-1") as error:
            reduce(tiny_sdpa, make_method(name), samples[1:2], Budget(count=30))
        assert "1 to 24" in error.value.hint


def test_image_placeholder_in_the_question_is_refused(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    with pytest.raises(MMTokError, match="stands for an image"):
        reduce(tiny_sdpa, make_method("full"), [Sample(samples[0].images, "a <image>?", ("x",))], None)


@pytest.mark.parametrize("question", ["🙂🙂", "?!", "the", "é" * 300])
def test_questions_without_keywords_are_answered(question: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny_sdpa, make_method("mmtok"), [Sample(samples[0].images, question, ("x",))], Budget(count=4))
    assert reduced.tokens[0].kept == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
def test_images_of_extreme_shape_are_answered(size: tuple[int, int], tiny_sdpa: Llava) -> None:
    sample = Sample((picture(*size),), "Is there a star?", ("x",))
    assert (
        answer(tiny_sdpa, make_method("mmtok"), [sample], Budget(count=4), max_new_tokens=2).reduced.tokens[0].kept == 4
    )


def test_patches_land_where_they_were_seen(tiny_sdpa: Llava) -> None:
    """A bright patch of an oblong image must be the token that its box on the image says."""
    for width, height in ((168, 84), (84, 168), (84, 84)):
        dark = picture(width, height).point(lambda _: 0)
        plain = Sample((dark,), "Is there a star?", ("x",))
        grid = tiny_sdpa.grid(dark)
        boxes = tiny_sdpa.patch_boxes(dark, grid)
        baseline = tiny_sdpa.prepare([plain.question], [plain.images], [plain.image_ids], [grid]).pixel_values[0]
        for index in (14, 21):
            box = tuple(round(v) for v in boxes[index])
            marked = dark.copy()
            marked.paste((255, 255, 255), (max(box[0], 0), max(box[1], 0), box[2], box[3]))
            pixels = tiny_sdpa.prepare([plain.question], [(marked,)], [("x",)], [grid]).pixel_values[0]
            change = (pixels - baseline).abs().sum(0).view(6, 14, 6, 14).sum((1, 3)).flatten()
            assert int(change.argmax()) == index


def test_random_draws_depend_on_seed_and_image_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    def drawn(seed: int, order: list[int]) -> dict[int, list[int]]:
        reduced = reduce(tiny_sdpa, make_method("random", seed=seed), [samples[i] for i in order], Budget(count=8))
        return {i: selection.indices.tolist() for i, selection in zip(order, reduced.selections, strict=True)}

    assert drawn(0, [0, 1, 2]) == drawn(0, [2, 0, 1])
    assert drawn(0, [0, 1, 2]) != drawn(1, [0, 1, 2])
