"""What every method must do on every family; a new method is tested by being in the catalogue."""

from __future__ import annotations

import pytest
import torch

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import answer, prefill, reduce

BUDGET = Budget(count=8)  # a rectangle of 2x4 for those that resize
ALL = method_names()
BUDGETED = [name for name in ALL if make_method(name).takes_budget]


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


@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
def test_identity_at_full_budget(name: str, tiny: Llava, samples: list[Sample]) -> None:
    for sample in samples:
        reduced = reduce(tiny, make_method(name), [sample], Budget(percent=100))
        assert reduced.tokens[0].kept == reduced.tokens[0].total == 36
        with torch.inference_mode():
            logits, _ = prefill(tiny, reduced.inputs)
        assert torch.equal(logits, stock_logits(tiny, sample))


@pytest.mark.parametrize("name", BUDGETED)
def test_exact_count_in_ascending_order(name: str, tiny: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny, make_method(name), samples, BUDGET)
    placeholders = (reduced.inputs["input_ids"] == tiny.image_token_id).sum(1).tolist()
    rows = [len(rows) for rows in reduced.inputs["mm_encoder_outputs"]["image"].pooler_output]
    for selection, tokens, placeholder, row in zip(reduced.selections, reduced.tokens, placeholders, rows, strict=True):
        assert selection.kept == tokens.kept == placeholder == row == 8
        assert tokens.total == 36
        indices = selection.indices
        assert bool((indices[1:] > indices[:-1]).all())
        if selection.order is not None:
            assert selection.order.sort().values.equal(indices)


@pytest.mark.parametrize("name", BUDGETED)
def test_padding_is_never_selected(name: str, tiny: Llava, samples: list[Sample]) -> None:
    """Every kept token covers some of the image, by the boxes that overlays are drawn from."""
    reduced = reduce(tiny, make_method(name), samples, BUDGET)
    for sample, vision, selection in zip(samples, reduced.vision, reduced.selections, strict=True):
        width, height = sample.images[0].size
        boxes = tiny.patch_boxes(sample.images[0], vision.grid)
        for index in selection.indices.tolist():
            left, top, right, bottom = boxes[index]
            assert left < width and top < height and right > 0 and bottom > 0


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_it_was(name: str, tiny: Llava, samples: list[Sample]) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()]

    before, hooks_before = [stock_logits(tiny, sample) for sample in samples], hooks()
    answer(tiny, make_method(name), samples, BUDGET, max_new_tokens=2)
    assert all(torch.equal(b, stock_logits(tiny, s)) for b, s in zip(before, samples, strict=True))
    assert hooks() == hooks_before


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single(name: str, tiny: Llava, samples: list[Sample]) -> None:
    method = make_method(name)
    together = answer(tiny, method, samples, BUDGET, max_new_tokens=5)
    for i, sample in enumerate(samples):
        alone = answer(tiny, method, [sample], BUDGET, max_new_tokens=5)
        assert together.reduced.selections[i].indices.equal(alone.reduced.selections[0].indices)
        assert together.reduced.tokens[i] == alone.reduced.tokens[0]
        torch.testing.assert_close(together.first_logits[i], alone.first_logits[0], atol=2e-5, rtol=1e-5)
        assert together.texts[i] == alone.texts[0]


@pytest.mark.parametrize("name", ALL)
def test_same_selection_every_time(name: str, tiny: Llava, samples: list[Sample]) -> None:
    first, second = (reduce(tiny, make_method(name), samples, BUDGET).selections for _ in range(2))
    assert all(a.indices.equal(b.indices) for a, b in zip(first, second, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("name", ALL)
def test_removing_rows_equals_a_prompt_without_them(name: str, tiny: Llava, samples: list[Sample]) -> None:
    """The answer equals the one from plain embeddings put together by hand, without any cache."""
    sample = samples[1]
    said = answer(tiny, make_method(name), [sample], BUDGET, max_new_tokens=4)
    inputs = said.reduced.inputs
    embeddings = tiny.model.get_input_embeddings()(inputs["input_ids"])
    embeddings[inputs["input_ids"] == tiny.image_token_id] = inputs["mm_encoder_outputs"]["image"].pooler_output[0]
    expected = []
    for _ in range(said.token_ids.shape[1]):
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        logits = tiny.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[:, -1]
        expected.append(logits.argmax(-1))
        embeddings = torch.cat([embeddings, tiny.model.get_input_embeddings()(expected[-1])[:, None]], 1)
    assert said.token_ids.equal(torch.stack(expected, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_gpu_selects_as_the_cpu_does(name: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    on_cpu = reduce(tiny_sdpa, make_method(name), samples, BUDGET).selections
    tiny_sdpa.model.cuda()
    try:
        on_gpu = reduce(tiny_sdpa, make_method(name), samples, BUDGET).selections
    finally:
        tiny_sdpa.model.cpu()
    assert all(a.indices.equal(b.indices.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
