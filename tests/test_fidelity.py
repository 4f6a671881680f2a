"""Fidelity: teacher-forced on the unreduced model's answer, before and inside the language model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import stock_inputs

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample, demo_samples
from mmtok_cli.evaluation.predictions import answer_mask, closeness_of, forced_logits, reference_of
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer
from mmtok_cli.results.records import Closeness
from mmtok_cli.rules import Rules

STEPS = 6
METHODS = {
    "mmtok": make_method("mmtok"),
    "resize": make_method("resize"),
    "none": make_method("none"),
    "fastv": make_method("fastv", layer=1),
    "pyramiddrop": make_method("pyramiddrop", layers=(1, 3)),
    "sparsevlm": make_method("sparsevlm", layers=(0, 1, 2)),
}


def budget_of(name: str) -> Budget | None:
    return Budget(count=8) if METHODS[name].takes_budget else None


@torch.inference_mode()
def plain_logits(model: VisionLanguageModel, sample: Sample, answer_ids: torch.Tensor) -> torch.Tensor:
    """[steps, vocabulary] of an answer's tokens, by one plain forward pass over prompt and answer, without a cache."""
    inputs = stock_inputs(model, sample)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.image_token_id).int()
    return model.model(**inputs, use_cache=False, logits_to_keep=len(answer_ids) + 1).logits[0, :-1]


def test_forced_logits_equal_a_plain_forward_over_prompt_and_answer(
    vlm: VisionLanguageModel, samples: list[Sample]
) -> None:
    """Of a batch whose prompts differ in length, and of an answer that the model would not give."""
    token_ids = torch.randint(5, 60, (3, STEPS), generator=torch.Generator().manual_seed(0))
    found, _ = forced_logits(vlm, make_method("full"), samples, None, token_ids)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(found[row], plain_logits(vlm, sample, token_ids[row]), atol=2e-4, rtol=1e-4)


def test_the_unreduced_model_is_true_to_itself(vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    reference = reference_of(vlm, samples, max_new_tokens=STEPS)
    assert reference.logits.shape == (
        3,
        *reference.answers.token_ids.shape[1:],
        vlm.model.config.text_config.vocab_size,
    )
    assert reference.logits.argmax(-1)[reference.mask].equal(reference.answers.token_ids[reference.mask])
    again, _ = forced_logits(vlm, make_method("full"), samples, None, reference.answers.token_ids)
    assert closeness_of(reference.logits, again, reference.mask) == [Closeness(kl=0.0, top1=1.0, same=True)] * 3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rules", [Rules(), Rules("harmonised")], ids=["released", "harmonised"])
def test_forced_on_its_own_answer_a_method_says_it_again(
    name: str, rules: Rules, vlm: VisionLanguageModel, samples: list[Sample]
) -> None:
    """The way through a ragged cache is that of decoding."""
    said = answer(vlm, METHODS[name], samples, budget_of(name), rules=rules, max_new_tokens=STEPS)
    logits, _ = forced_logits(vlm, METHODS[name], samples, budget_of(name), said.token_ids, rules=rules)
    mask = answer_mask(said.token_ids, vlm.eos_token_ids)
    assert logits[:, 0].equal(said.first_logits)
    assert logits.argmax(-1)[mask].equal(said.token_ids[mask])


@pytest.fixture(scope="module")
def demo() -> VisionLanguageModel:
    return load_model("demo")


@pytest.mark.parametrize("name", METHODS)
def test_same_means_that_greedy_decoding_says_the_same(name: str, demo: VisionLanguageModel) -> None:
    samples = demo_samples(8)
    reference = reference_of(demo, samples, max_new_tokens=4)
    found, _ = forced_logits(demo, METHODS[name], samples, budget_of(name), reference.answers.token_ids)
    said = answer(demo, METHODS[name], samples, budget_of(name), max_new_tokens=4)
    closeness = closeness_of(reference.logits, found, reference.mask)
    assert [c.same for c in closeness] == [a == b for a, b in zip(said.texts, reference.answers.texts, strict=True)]
    assert all(c.kl > 0 for c in closeness) and all(c.same == (c.top1 == 1) for c in closeness)


def test_padding_behind_an_answer_does_not_count() -> None:
    token_ids = torch.tensor([[7, 2, 0, 0], [7, 8, 9, 2], [7, 8, 9, 9], [2, 2, 2, 2]])
    mask = answer_mask(token_ids, [2])
    assert mask.sum(1).tolist() == [2, 4, 4, 1] and bool(mask[:, 0].all())
    assert answer_mask(token_ids, []).all()
    generator = torch.Generator().manual_seed(0)
    reference, found = torch.randn(4, 4, 11, generator=generator), torch.randn(4, 4, 11, generator=generator)
    expected = closeness_of(reference, found, mask)
    found[~mask] = 1e4 * torch.randn(11, generator=generator)
    assert closeness_of(reference, found, mask) == expected
    only_padding_differs = torch.where(mask[..., None], reference, found)
    assert closeness_of(reference, only_padding_differs, mask) == [Closeness(kl=0.0, top1=1.0, same=True)] * 4


def test_divergence_and_agreement_by_hand() -> None:
    reference = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
    found = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]).log()
    kl = (0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log(), 0.5 * torch.tensor(4 / 3).log())
    first, second = float(kl[0]), float(kl[1])
    (both,) = closeness_of(reference, found, torch.tensor([[True, True]]))
    assert both.kl == pytest.approx((first + second) / 2) and second == pytest.approx(0.1438, abs=1e-4)
    (one,) = closeness_of(reference, found, torch.tensor([[True, False]]))
    assert (one.top1, one.same) == (1, True) and one.kl == pytest.approx(first)
