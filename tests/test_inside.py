"""Reduction inside the language model: removed equals masked, and everything around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from conftest import picture

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method, attention_at
from mmtok_cli.models import hf
from mmtok_cli.models.attention_rows import attention_rows, mean_attention
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import Reduced, answer, inside, reduce
from mmtok_cli.rules import Positions, Rules
from mmtok_cli.tokens import Cut, LayerTokens, Selection, TextTokens, VisionTokens

BUDGET = Budget(count=8)
STEPS = 8
pytestmark = pytest.mark.compat
INSIDE = {
    "fastv": make_method("fastv", layer=2),
    "random:inside": make_method("random:inside", layer=1),
    "pyramiddrop": make_method("pyramiddrop", layers=(1, 2)),
    "sparsevlm": make_method("sparsevlm", layers=(0, 1, 2)),
    "sparsevlm:v2": make_method("sparsevlm:v2", layers=(0, 1, 2)),
    "dart": make_method("dart", layer=1),
    "v2drop": make_method("v2drop", layers=(1, 2, 3)),
    "pace": make_method("pace", layer=2),
}
DROPPING = [name for name in INSIDE if name != "sparsevlm"]  # merged tokens have no masked counterpart
POLICIES = pytest.mark.parametrize("positions", ["keep", "renumber"])


@dataclass(frozen=True)
class Everything(Method):
    """A cut that drops nothing."""

    summary: ClassVar[str] = "everything"
    takes_budget: ClassVar[bool] = False
    keeps_padding: ClassVar[bool] = True

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        return (Cut(1, total, reads=0), Cut(3, total))

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        return Selection(torch.arange(len(tokens.hidden)))


def generate(tiny: VisionLanguageModel, reduced: Reduced, **options: Any) -> Any:
    with torch.inference_mode(), inside(tiny, reduced):
        return tiny.model.generate(
            **reduced.inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, return_dict_in_generate=True, **options
        )


@contextmanager
def masked(
    tiny: VisionLanguageModel, survivors: dict[int, torch.Tensor], prompt: int, positions: Positions
) -> Iterator[None]:
    """From each layer of `survivors` on, the prompt's other slots are seen by nobody but themselves.

    The sequence keeps its length, so that this is another way to say the same as removing them.
    """
    language_model = tiny.model.model.language_model

    def block(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        width = args[0].shape[1]
        seen = torch.ones(width, dtype=torch.bool)
        seen[:prompt] = survivors[layer]
        visible = (torch.ones(width, width, dtype=torch.bool).tril() & seen) | torch.eye(width, dtype=torch.bool)
        mask = torch.zeros(width, width).masked_fill(~visible, torch.finfo(torch.float32).min)
        kwargs = kwargs | {"attention_mask": mask[None, None]}
        if positions == "renumber":
            counted = (seen.long().cumsum(0) - 1).clamp(min=0)[None]
            kwargs["position_embeddings"] = language_model.rotary_emb(args[0], counted)
        return args, kwargs

    handles = []
    for number, layer in enumerate(language_model.layers):
        behind = max((cut for cut in survivors if cut <= number), default=None)
        if behind is not None:
            hook = lambda _, args, kwargs, behind=behind: block(behind, args, kwargs)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
@POLICIES
@pytest.mark.parametrize("name", DROPPING)
def test_removed_equals_masked(
    name: str, positions: Positions, vlm: VisionLanguageModel, samples: list[Sample]
) -> None:
    """A batch of prompts of different lengths, eight greedy steps: each row as if alone, uncut and without a cache."""
    if positions not in vlm.positions:
        pytest.skip(f"{vlm.family} cannot {positions}")
    method, rules = INSIDE[name], Rules(positions=positions)
    reduced = reduce(vlm, method, samples, BUDGET, rules=rules)
    out = generate(vlm, reduced, do_sample=False, output_logits=True)
    for row, sample in enumerate(samples):
        alone = reduce(vlm, method, [sample], BUDGET, rules=rules)
        ids = alone.inputs["input_ids"]
        places = (ids[0] == vlm.image_token_id).nonzero().squeeze(1)
        survivors = {}
        for number, each in enumerate(alone.cuts[0].cuts):
            up_to = replace(alone, cuts=[replace(alone.cuts[0], cuts=alone.cuts[0].cuts[: number + 1])])
            with inside(vlm, up_to) as cut:
                vlm.model(**alone.inputs)
                survivors[each.before] = cut.selections[0].indices
        assert [len(kept) for kept in survivors.values()] == [each.keep for each in alone.cuts[0].cuts]
        flags = {}
        for layer, kept in survivors.items():
            flags[layer] = torch.ones(ids.shape[1], dtype=torch.bool)
            flags[layer][places] = False
            flags[layer][places[kept]] = True
        inputs = dict(alone.inputs)
        with masked(vlm, flags, ids.shape[1], positions):
            for step in range(STEPS):
                logits = vlm.model(**inputs, use_cache=False).logits[0, -1]
                torch.testing.assert_close(out.logits[step][row], logits, atol=2e-5, rtol=1e-5)
                token, places = out.sequences[row, step - STEPS], inputs["position_ids"]
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["position_ids"] = torch.cat([places, places[..., -1:] + 1], -1)


@POLICIES
def test_cut_that_drops_nothing_changes_nothing(positions: Positions, tiny: Llava, samples: list[Sample]) -> None:
    for sample in samples:
        whole, cut = (
            reduce(tiny, m, [sample], BUDGET, rules=Rules(positions=positions))
            for m in (make_method("full"), Everything())
        )
        stock, through = (generate(tiny, r, do_sample=False, output_logits=True) for r in (whole, cut))
        assert through.sequences.equal(stock.sequences)
        assert all(torch.equal(a, b) for a, b in zip(through.logits, stock.logits, strict=True))


@pytest.mark.parametrize("name", INSIDE)
def test_generate_says_what_answer_says(name: str, tiny: Llava, samples: list[Sample]) -> None:
    said = answer(tiny, INSIDE[name], samples, BUDGET, max_new_tokens=STEPS)
    with torch.inference_mode(), inside(tiny, said.reduced):
        out = tiny.model.generate(**said.reduced.inputs, max_new_tokens=STEPS, do_sample=False)
    assert said.token_ids.equal(out[:, said.reduced.inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", INSIDE)
def test_beams_in_a_batch_equal_beams_alone(name: str, tiny: Llava, samples: list[Sample]) -> None:
    together = generate(tiny, reduce(tiny, INSIDE[name], samples, BUDGET), num_beams=3, do_sample=False).sequences
    for row, sample in enumerate(samples):
        alone = generate(tiny, reduce(tiny, INSIDE[name], [sample], BUDGET), num_beams=3, do_sample=False).sequences
        assert together[row, -STEPS:].equal(alone[0, -STEPS:])


def test_several_answers_to_one_prompt(tiny: Llava, samples: list[Sample]) -> None:
    first, second = (reduce(tiny, INSIDE["fastv"], samples, BUDGET) for _ in range(2))  # generate changes its inputs
    sampled = generate(tiny, first, do_sample=True, top_k=1, num_return_sequences=2).sequences
    greedy = generate(tiny, second, do_sample=False).sequences
    assert sampled[0::2].equal(greedy) and sampled[1::2].equal(greedy)


@pytest.mark.parametrize("name", INSIDE)
def test_the_cache_holds_what_the_layer_average_says(name: str, tiny: Llava, samples: list[Sample]) -> None:
    for sample in samples:
        reduced = reduce(tiny, INSIDE[name], [sample], BUDGET)
        with torch.inference_mode(), inside(tiny, reduced):
            cache = hf.cache_of(tiny.model(**reduced.inputs, use_cache=True))
        lengths = [layer.keys.shape[2] - reduced.tokens[0].text for layer in cache.layers]
        assert sum(lengths) / len(lengths) == pytest.approx(reduced.tokens[0].layer_average)
        assert lengths[0] == 36 and lengths[-1] == 8


@POLICIES
def test_positions_in_decoding(positions: Positions, tiny: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny, INSIDE["fastv"], samples[:1], BUDGET, rules=Rules(positions=positions))
    length = reduced.inputs["input_ids"].shape[1]
    seen: list[int] = []

    def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args[0].shape[1] == 1:
            expected = tiny.model.model.language_model.rotary_emb(args[0], kwargs["position_ids"])
            assert all(torch.equal(a, b) for a, b in zip(kwargs["position_embeddings"], expected, strict=True))
            seen.append(int(kwargs["position_ids"][0, 0]))

    with inside(tiny, reduced), torch.inference_mode():
        handle = tiny.model.model.language_model.layers[3].register_forward_pre_hook(watch, with_kwargs=True)
        try:
            tiny.model.generate(**reduced.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        finally:
            handle.remove()
    first = length if positions == "keep" else length - 28
    assert seen == [first, first + 1, first + 2]


@pytest.mark.parametrize("name", INSIDE)
def test_images_of_different_counts(name: str, tiny: Llava, samples: list[Sample]) -> None:
    """Two images in one prompt, one in another: each image keeps a budget of its own, and rows end up ragged."""
    pair = Sample((picture(84, 84, 5), picture(160, 100, 6)), "Is there a star?", ("a", "b"))
    together = answer(tiny, INSIDE[name], [pair, samples[0]], BUDGET, max_new_tokens=STEPS)
    assert [s.kept for s in together.selections] == [8, 8, 8]
    assert [t.kept for t in together.reduced.tokens] == [16, 8]
    for row, sample in enumerate((pair, samples[0])):
        alone = answer(tiny, INSIDE[name], [sample], BUDGET, max_new_tokens=STEPS)
        assert alone.texts[0] == together.texts[row]
        torch.testing.assert_close(alone.first_logits[0], together.first_logits[row], atol=2e-5, rtol=1e-5)
        mine = together.selections[:2] if row == 0 else together.selections[2:]
        assert all(a.indices.equal(b.indices) for a, b in zip(alone.selections, mine, strict=True))


@dataclass(frozen=True)
class Watching(Everything):
    """Drops every other token before layer 2 and, seeing all that a cut may show, of what is left before layer 3."""

    signals: ClassVar[tuple[str, ...]] = ("received_attention",)
    alternative_signals: ClassVar[tuple[tuple[str, ...], ...]] = (("class_attention",),)
    seen: ClassVar[list[LayerTokens]] = []

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        first = Cut(2, total // 2, reads=1, rows="mean", earlier=(0, 1))
        return (first, Cut(3, total // 4, reads=2, rows="none", earlier=(1, 2)))

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(0, 2 * cut.keep, 2))


@torch.inference_mode()
@POLICIES
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_a_cut_shows(positions: Positions, use_cache: bool, vlm: VisionLanguageModel) -> None:
    """Two images in one row of a batch, padding in the other: the states, keys and attention of the plain model."""
    if positions not in vlm.positions or vlm.first_cut:
        pytest.skip(f"{vlm.family} cannot {positions}, or reports states without what DeepStack adds to them")
    pair = Sample((picture(84, 84, 5), picture(160, 100, 6)), "Is there a star?", ("a", "b"))
    single = Sample((picture(84, 84, 7),), "What is it?", ("c",))
    reduced, method = reduce(vlm, Watching(), [pair, single], None, rules=Rules(positions=positions)), Watching()
    assert not bool(reduced.inputs["attention_mask"].all())
    mask, placeholders = reduced.inputs["attention_mask"].bool(), reduced.inputs["input_ids"] == vlm.image_token_id
    kernel = vlm.attention
    vlm.model.set_attn_implementation("eager")
    try:
        plain = vlm.model(**reduced.inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
    finally:
        vlm.model.set_attn_implementation(kernel)
    method.seen.clear()
    with inside(vlm, reduced) as cut:
        vlm.model(**reduced.inputs, use_cache=use_cache)
        assert cut is not None and not cut._read  # nothing is held after the last cut
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
    for number, image in enumerate(reduced.cuts):
        first, second = method.seen[number], method.seen[len(reduced.cuts) + number]
        row, total = image.row, len(image.eligible)
        live = mask[row].nonzero().squeeze(1)
        places = image.start + torch.arange(total)
        text = live[(live >= image.start + total) & ~placeholders[row, live]]
        states = plain.hidden_states
        close(first.hidden, states[2][row, places])
        close(first.earlier[0], states[0][row, places])
        close(first.earlier[1], states[1][row, places])
        close(second.earlier[1], states[1][row, places][::2][: total // 2])
        close(second.earlier[2], first.hidden[::2][: total // 2])
        assert first.text and first.keys and first.norm and first.vision and first.places is not None
        close(first.text(), states[2][row, text])
        keys = hf.cached_keys(hf.cache_of(plain), 1)[row]
        close(first.keys()[0], keys[:, places])
        close(first.keys()[1], keys[:, text])
        close(attention_at(first)[:, 0], plain.attentions[1][row][:, live].mean(1)[:, places])
        close(first.norm(states[2][row]), hf.final_norm(hf.language_model(vlm.model))(states[2][row]))
        assert first.vision is reduced.images[number].vision and first.places.equal(torch.arange(total))
        assert second.attention is None and second.places is not None
        assert second.places.equal(torch.arange(0, 2 * (total // 2), 2))


@torch.inference_mode()
def test_mean_attention_in_blocks(tiny: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = hf.decoder_layers(hf.language_model(tiny.model))[0]
    hidden = torch.randn(50, tiny.model.config.text_config.hidden_size)
    rotary = hf.rotary_embedding(hf.language_model(tiny.model), hidden[None], torch.arange(50)[None], tiny.device)
    rotary = (rotary[0][0], rotary[1][0])
    whole = mean_attention(layer, hidden, rotary)
    torch.testing.assert_close(whole, attention_rows(layer, hidden, rotary, torch.arange(50)).mean(1))
    monkeypatch.setattr("mmtok_cli.models.attention_rows.BLOCK", 7 * whole.numel())
    torch.testing.assert_close(mean_attention(layer, hidden, rotary), whole)


def test_attention_row_equals_eager(samples: list[Sample], tiny: Llava) -> None:
    reduced = reduce(tiny, make_method("full"), samples[:1], None)
    layers, seen = tiny.model.model.language_model.layers, {}
    handle = layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0], rotary=kwargs["position_embeddings"]), with_kwargs=True
    )
    kernel = tiny.attention
    tiny.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            out = tiny.model(**reduced.inputs, output_attentions=True, use_cache=True)
            rotary = (seen["rotary"][0][0], seen["rotary"][1][0])
            queries = torch.tensor([seen["hidden"].shape[1] - 1, 20])
            rows = attention_rows(layers[1], seen["hidden"][0], rotary, queries)
            cached = attention_rows(layers[1], seen["hidden"][0], rotary, queries, hf.cache_of(out).layers[1].keys[0])
    finally:
        handle.remove()
        tiny.model.set_attn_implementation(kernel)
    expected = out.attentions[1][0][:, queries]
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cached, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cache_implementation": "static"}, "StaticCache"), ({"prefill_chunk_size": 8}, "in one piece")],
    ids=["static cache", "chunked prefill"],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], message: str, tiny_sdpa: Llava, samples: list[Sample]
) -> None:
    reduced = reduce(tiny_sdpa, INSIDE["fastv"], samples, BUDGET)
    with pytest.raises(MMTokError, match=message):
        generate(tiny_sdpa, reduced, do_sample=False, **options)
    assert not any(layer._forward_pre_hooks for layer in tiny_sdpa.model.model.language_model.layers)


def test_padding_on_the_right_is_refused(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny_sdpa, INSIDE["fastv"], samples, BUDGET)
    reduced.inputs["attention_mask"] = reduced.inputs["attention_mask"].flip(1)
    with pytest.raises(MMTokError, match="padded on the left"), inside(tiny_sdpa, reduced):
        pass


def test_other_kernels_are_refused(tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = reduce(tiny_sdpa, INSIDE["fastv"], samples, BUDGET)
    monkeypatch.setattr(type(tiny_sdpa), "attention", "flash_attention_2")
    with pytest.raises(MMTokError, match="flash_attention_2"), inside(tiny_sdpa, reduced):
        pass


def test_a_cache_of_another_prompt_is_refused(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    reduced, other = (reduce(tiny_sdpa, INSIDE["fastv"], [sample], BUDGET) for sample in samples[1:])
    with torch.inference_mode():
        cache = hf.cache_of(tiny_sdpa.model(**other.inputs, use_cache=True))
        with inside(tiny_sdpa, reduced), pytest.raises(MMTokError, match="were read after"):
            tiny_sdpa.model(input_ids=torch.tensor([[5]]), **hf.cache_argument(tiny_sdpa.model, cache))
        longer = reduce(tiny_sdpa, INSIDE["fastv"], [samples[0]], BUDGET)
        assert longer.inputs["input_ids"].shape[1] > other.inputs["input_ids"].shape[1]
        with inside(tiny_sdpa, other), pytest.raises(MMTokError, match=r"need the prompt in one piece"):
            tiny_sdpa.model(**longer.inputs, use_cache=True)


def test_the_context_is_not_entered_twice(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    cut = inside(tiny_sdpa, reduce(tiny_sdpa, INSIDE["fastv"], samples, BUDGET))
    with cut, pytest.raises(RuntimeError, match="open already"), cut:
        pass
    assert not any(layer._forward_pre_hooks for layer in tiny_sdpa.model.model.language_model.layers)


@pytest.mark.parametrize("cuts", [(Cut(0, 8),), (Cut(9, 8),), (Cut(2, 8), Cut(1, 4)), (Cut(1, 37),), (Cut(3, 8, 0),)])
def test_impossible_cuts_are_named(cuts: tuple[Cut, ...], tiny_sdpa: Llava, samples: list[Sample]) -> None:
    class Impossible(Everything):
        def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
            return cuts

    with pytest.raises(MMTokError, match=r"Impossible\.cuts makes an impossible cut"):
        reduce(tiny_sdpa, Impossible(), samples, BUDGET)


@dataclass(frozen=True)
class Halving(Everything):
    """Half of the tokens before the language model, the rest inside."""

    takes_budget: ClassVar[bool] = True

    def entering(self, total: int, budget: int) -> int:
        return max(budget, total // 2)

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        return Selection(torch.arange(0, vision.total, 2)[:budget])

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        return (Cut(2, budget),)

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        return Selection(torch.arange(cut.keep) + 1)


def test_method_that_acts_at_two_places(tiny: Llava, samples: list[Sample]) -> None:
    said = answer(tiny, Halving(), samples, BUDGET, max_new_tokens=2)
    assert [s.indices.tolist() for s in said.selections] == [list(range(2, 18, 2))] * 3
    assert [(t.kept, t.layer_average) for t in said.reduced.tokens] == [(8, 13)] * 3
    average = answer(tiny, Halving(), samples, Budget(count=13), rules=Rules(budget_means="layer-average"))
    assert [(t.kept, t.layer_average) for t in average.reduced.tokens] == [(8, 13)] * 3

    class Generous(Halving):
        def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
            return Selection(torch.arange(budget + 1))

    with pytest.raises(MMTokError, match=r"Generous\.select kept 19 tokens of picture-0 at a budget of 18"):
        answer(tiny, Generous(), samples, BUDGET)


def test_merged_tokens_are_marked(tiny: Llava, samples: list[Sample]) -> None:
    selection = answer(tiny, INSIDE["sparsevlm"], samples[:1], BUDGET, max_new_tokens=1).selections[0]
    assert selection.merged is not None and bool(selection.merged[-1]) and not bool(selection.merged.all())


def test_a_method_that_breaks_its_promise_is_named(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    class Greedy(Everything):
        def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
            return (Cut(1, budget),)

    with pytest.raises(MMTokError, match="kept 36 of picture-0, and `cuts` announced 8"):
        answer(tiny_sdpa, Greedy(), samples, BUDGET)
    assert not any(layer._forward_pre_hooks for layer in tiny_sdpa.model.model.language_model.layers)


@pytest.mark.parametrize("name", INSIDE)
def test_layers_that_the_model_does_not_have(name: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    parameter = "layer" if "layer" in INSIDE[name].__dataclass_fields__ else "layers"
    method = make_method(name, **{parameter: 4 if parameter == "layer" else (0, 1, 9)})
    with pytest.raises(MMTokError, match="does not fit a language model of 4 layers"):
        reduce(tiny_sdpa, method, samples, BUDGET)


def test_budget_above_the_eligible_tokens_keeps_them_all(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    answer(tiny_sdpa, INSIDE["fastv"], samples[1:2], Budget(count=30), max_new_tokens=1)  # padding competes
    rules = Rules("harmonised")
    answers = answer(tiny_sdpa, INSIDE["fastv"], samples[1:2], Budget(count=30), rules=rules, max_new_tokens=1)
    (image,) = answers.reduced.images
    assert answers.selections[0].indices.equal(image.eligible.nonzero().squeeze(1)) and image.kept == 24


def test_selection_inside_is_timed_as_selection(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    entered: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        entered.append(f"+{name}")
        yield
        entered.append(f"-{name}")

    answer(tiny_sdpa, INSIDE["fastv"], samples[:1], BUDGET, stage=stage, max_new_tokens=1)
    start, end = entered.index("+prefill"), entered.index("-prefill")
    assert "+select" in entered[start:end]
