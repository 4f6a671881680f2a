"""What every method must do on every family; a new method is tested by being in the catalogue."""

from __future__ import annotations

import pytest
import torch

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.methods.base import Method
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import Answers, answer
from mmtok_cli.rules import Positions, Rules, Track

BUDGET = Budget(count=8)  # a rectangle of 2x4 for those that resize
ALL = method_names()
TINY_LAYERS = {  # of a language model of four
    "fastv": {"layer": 1},
    "random:inside": {"layer": 2},
    "pyramiddrop": {"layers": (1, 3)},
    "sparsevlm": {"layers": (0, 1, 2)},
    "sparsevlm:v2": {"layers": (0, 1, 2)},
}
MERGING = ("visionzip", "sparsevlm")  # whose merged tokens stand last


def tiny_method(name: str) -> Method:
    return make_method(name, **TINY_LAYERS.get(name, {}))


BUDGETED = [name for name in ALL if tiny_method(name).takes_budget]
INSIDE = [name for name in ALL if tiny_method(name).cuts(36, 8, 4)]
TRACKS = pytest.mark.parametrize("track", ["released", "harmonised"])


def stock_logits(model: Llava, sample: Sample) -> torch.Tensor:
    """The next token's logits by transformers alone."""
    prompt = model.prepare([sample.question], [sample.images], [sample.image_ids], [model.grid(sample.images[0])])
    with torch.inference_mode():
        out = model.model(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            pixel_values=torch.stack(prompt.pixel_values),
            logits_to_keep=1,
        )
    return out.logits[:, -1]


@TRACKS
@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
def test_identity_at_full_budget(name: str, track: Track, tiny: Llava, samples: list[Sample]) -> None:
    for sample in samples:
        said = answer(tiny, tiny_method(name), [sample], Budget(percent=100), rules=Rules(track), max_new_tokens=1)
        assert said.reduced.tokens[0].kept == said.reduced.tokens[0].total == 36
        assert said.reduced.tokens[0].layer_average == 36
        assert torch.equal(said.first_logits, stock_logits(tiny, sample))


@TRACKS
@pytest.mark.parametrize("name", BUDGETED)
def test_exact_count(name: str, track: Track, tiny: Llava, samples: list[Sample]) -> None:
    said = answer(tiny, tiny_method(name), samples, BUDGET, rules=Rules(track), max_new_tokens=1)
    entered = 36 if name in INSIDE else 8
    assert (said.reduced.inputs["input_ids"] == tiny.image_token_id).sum(1).tolist() == [entered] * 3
    rows = said.reduced.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert [len(image) for image in rows] == [entered] * 3
    for selection, tokens in zip(said.selections, said.reduced.tokens, strict=True):
        assert selection.kept == tokens.kept == 8
        assert tokens.total == 36
        places = selection.places
        assert bool((places[1:] > places[:-1]).all())
        if name not in MERGING:
            assert selection.indices.equal(places)
        if selection.order is not None:
            assert selection.order.sort().values.equal(places)


@TRACKS
@pytest.mark.parametrize("name", BUDGETED)
def test_padding_is_never_selected(name: str, track: Track, tiny: Llava, samples: list[Sample]) -> None:
    """Every kept token covers some of the image, by the boxes that overlays are drawn from."""
    if track == "released" and tiny_method(name).keeps_padding:
        pytest.skip("released so that padding competes for the budget")
    said = answer(tiny, tiny_method(name), samples, BUDGET, rules=Rules(track), max_new_tokens=1)
    for sample, vision, selection in zip(samples, said.reduced.vision, said.selections, strict=True):
        width, height = sample.images[0].size
        boxes = tiny.patch_boxes(sample.images[0], vision.grid)
        for index in selection.places.tolist():
            left, top, right, bottom = boxes[index]
            assert left < width and top < height and right > 0 and bottom > 0


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_it_was(name: str, tiny: Llava, samples: list[Sample]) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()]

    before, hooks_before = [stock_logits(tiny, sample) for sample in samples], hooks()
    answer(tiny, tiny_method(name), samples, BUDGET, max_new_tokens=2)
    assert all(torch.equal(b, stock_logits(tiny, s)) for b, s in zip(before, samples, strict=True))
    assert hooks() == hooks_before


@pytest.mark.parametrize("rules", [Rules(), Rules("harmonised"), Rules(positions="keep")], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single(name: str, rules: Rules, tiny: Llava, samples: list[Sample]) -> None:
    method = tiny_method(name)
    together = answer(tiny, method, samples, BUDGET, rules=rules, max_new_tokens=5)
    for i, sample in enumerate(samples):
        alone = answer(tiny, method, [sample], BUDGET, rules=rules, max_new_tokens=5)
        assert together.selections[i].indices.equal(alone.selections[0].indices)
        assert together.reduced.tokens[i] == alone.reduced.tokens[0]
        torch.testing.assert_close(together.first_logits[i], alone.first_logits[0], atol=2e-5, rtol=1e-5)
        assert together.texts[i] == alone.texts[0]


@pytest.mark.parametrize("name", ALL)
def test_same_selection_every_time(name: str, tiny: Llava, samples: list[Sample]) -> None:
    first, second = (answer(tiny, tiny_method(name), samples, BUDGET, max_new_tokens=1).selections for _ in range(2))
    assert all(a.indices.equal(b.indices) for a, b in zip(first, second, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in INSIDE])
def test_removing_rows_equals_a_prompt_without_them(
    name: str, positions: Positions, tiny: Llava, samples: list[Sample]
) -> None:
    """The answer equals the one from plain embeddings put together by hand, without any cache."""
    sample = samples[1]
    said = answer(tiny, tiny_method(name), [sample], BUDGET, rules=Rules(positions=positions), max_new_tokens=4)
    inputs = said.reduced.inputs
    embeddings = tiny.model.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == tiny.image_token_id] = inputs["mm_encoder_outputs"]["image"].pooler_output[0]
    places = expected_positions(tiny, sample, said) if positions == "keep" else torch.arange(embeddings.shape[1])
    expected = []
    for _ in range(said.token_ids.shape[1]):
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        logits = tiny.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=places[None], use_cache=False
        ).logits[:, -1]
        expected.append(logits.argmax(-1))
        embeddings = torch.cat([embeddings, tiny.model.get_input_embeddings()(expected[-1])[:, None]], 1)
        places = torch.cat([places, places[-1:] + 1])
    assert said.token_ids.equal(torch.stack(expected, 1))


def expected_positions(tiny: Llava, sample: Sample, said: Answers) -> torch.Tensor:
    """Where the tokens that remain stood in the whole prompt."""
    grid = said.reduced.vision[0].grid  # `resize` has another whole than the rest
    whole = tiny.prepare([sample.question], [sample.images], [sample.image_ids], [grid]).input_ids[0]
    image = (whole == tiny.image_token_id).nonzero().squeeze(1)
    kept = image[0] + said.selections[0].indices.clamp(min=0)
    return torch.cat([torch.arange(int(image[0])), kept, torch.arange(int(image[-1]) + 1, len(whole))])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_gpu_selects_as_the_cpu_does(name: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    on_cpu = answer(tiny_sdpa, tiny_method(name), samples, BUDGET, max_new_tokens=1).selections
    tiny_sdpa.model.cuda()
    try:
        on_gpu = answer(tiny_sdpa, tiny_method(name), samples, BUDGET, max_new_tokens=1).selections
    finally:
        tiny_sdpa.model.cpu()
    assert all(a.indices.equal(b.indices.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
