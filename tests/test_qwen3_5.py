"""What only Qwen3.5 does: layers of linear attention, a gate behind each query, a part of each head rotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import case, comparison
from test_profile_page import profile
from tiny_models import FAMILIES

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import cache_bytes
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf, load_model
from mmtok_cli.models.attention_rows import attention_rows, rotary_response
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.room import laid_out, needs_of
from mmtok_cli.models.sources import architecture, shortened
from mmtok_cli.pipeline import answer, inside, reduce
from mmtok_cli.report.checks import notes
from mmtok_cli.report.profiles import profile_notes
from mmtok_cli.report.tables import linear_text, part_text
from mmtok_cli.rules import Rules
from mmtok_cli.settings import ProfileSettings
from mmtok_cli.timing.ceilings import weights_read
from mmtok_cli.timing.flops import count_flops

pytestmark = pytest.mark.compat
BUDGET = Budget(count=8)
STEPS = 5
INSIDE = {
    "fastv": {"layer": 2},
    "dart": {"layer": 4},
    "pyramiddrop": {"layers": (3, 5)},
    "v2drop": {"layers": (2, 3, 6)},
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return FAMILIES["qwen3_5"](request.param)


@torch.inference_mode()
@pytest.mark.parametrize("name", INSIDE)
def test_layers_behind_a_cut_read_the_shorter_sequence(
    name: str, model: VisionLanguageModel, samples: list[Sample]
) -> None:
    """Greedy answers of a padded batch, each step against stock layers that are called one by one without a cache."""
    method = make_method(name, **INSIDE[name])
    together = reduce(model, method, samples, BUDGET)
    with inside(model, together):
        said = model.model.generate(
            **together.inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row, sample in enumerate(samples):
        alone = reduce(model, method, [sample], BUDGET)
        kept: dict[int, torch.Tensor] = {}
        with inside(model, alone) as cut:
            assert cut is not None
            for layer in {each.before for each in alone.cuts[0].cuts}:
                watch(cut, layer, kept)
            model.model(**alone.inputs)
        answered = said.sequences[row, -STEPS:]
        for step in range(STEPS):
            logits = by_hand(model, alone.inputs, kept, answered[:step])
            torch.testing.assert_close(said.logits[step][row], logits, atol=2e-5, rtol=1e-4)
            logits[list(model.eos_token_ids)] = float("-inf")  # as min_new_tokens does
            assert int(logits.argmax()) == int(answered[step])


def watch(cut: Any, layer: int, kept: dict[int, torch.Tensor]) -> None:
    """Note which slots of the sequence before it remain behind a cut."""
    original = cut._cut

    def noted(before: int, now: Any, hidden: torch.Tensor, cache: Any) -> Any:
        remaining, behind = original(before, now, hidden, cache)
        if before == layer:
            kept[layer] = (hidden[0][:, None] == remaining[0]).all(-1).any(1).nonzero().squeeze(1)
            assert torch.equal(hidden[0][kept[layer]], remaining[0])
        return remaining, behind

    cut._cut = noted


def by_hand(
    model: VisionLanguageModel, inputs: dict[str, Any], kept: dict[int, torch.Tensor], answered: torch.Tensor
) -> torch.Tensor:
    """The next token's logits by the layers' own forward, the sequence shortened before those in `kept`."""
    inner = model.model.model
    embedded = inner.get_input_embeddings()(inputs["input_ids"])
    rows = torch.cat(list(inputs["mm_encoder_outputs"]["image"].pooler_output))
    embedded[inputs["input_ids"] == model.image_token_id] = rows
    embedded = torch.cat([embedded, inner.get_input_embeddings()(answered)[None]], 1)
    positions, count = inputs["position_ids"], len(answered)
    more = positions[..., -1:] + torch.arange(1, count + 1)
    positions = torch.cat([positions, more], -1)
    language, hidden = inner.language_model, embedded
    cos, sin = language.rotary_emb(hidden, positions[1:])
    for index, layer in enumerate(language.layers):
        if index in kept:
            own = hidden.shape[1] - count
            columns = torch.cat([kept[index], torch.arange(own, own + count)])
            hidden, cos, sin = hidden[:, columns], cos[:, columns], sin[:, columns]
        mask = None
        if hasattr(layer, "self_attn"):
            width = hidden.shape[1]
            visible = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
            mask = torch.zeros(1, 1, width, width).masked_fill(~visible, torch.finfo(torch.float32).min)
        hidden = layer(hidden, position_embeddings=(cos, sin), attention_mask=mask)
    return model.model.lm_head(language.norm(hidden))[0, -1]


@torch.inference_mode()
def test_queries_are_read_without_their_gates(samples: list[Sample]) -> None:
    """Rows of the attention that eager attention reports."""
    model = FAMILIES["qwen3_5"]("eager")
    reduced = reduce(model, make_method("full"), samples[1:2], None)
    layer, seen = hf.decoder_layers(hf.language_model(model.model))[3], {}

    def remember(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(hidden=args[0], rotary=kwargs["position_embeddings"])

    handle = layer.register_forward_pre_hook(remember, with_kwargs=True)
    out = model.model(**reduced.inputs, output_attentions=True)
    handle.remove()
    weights = next(each for each in out.attentions[1:] if each is not None)  # of the second layer that has any
    cos, sin = seen["rotary"]
    queries = torch.tensor([4, 20])
    rows = attention_rows(layer, seen["hidden"][0], (cos[0], sin[0]), queries)
    torch.testing.assert_close(rows, weights[0][:, queries], atol=1e-6, rtol=1e-5)
    response = rotary_response(layer, (cos[0], sin[0]), queries, torch.arange(30))
    still = 24 - cos.shape[-1]  # values of each head that are not rotated
    turned = rotary_response_of(cos[0], sin[0], queries, torch.arange(30))
    torch.testing.assert_close(response, (turned + still) / 24**0.5)


def rotary_response_of(cos: torch.Tensor, sin: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Of vectors of ones: the first half of the values loses the sine, the second gains it."""
    sign = torch.cat([-torch.ones(cos.shape[1] // 2), torch.ones(cos.shape[1] // 2)])
    rotated = cos + sign * sin
    return rotated[queries] @ rotated[keys].T


@torch.inference_mode()
def test_the_cache_counts_states_that_do_not_shrink(model: VisionLanguageModel, samples: list[Sample]) -> None:
    """Keys and values of four layers, and the states of four others, by hand."""
    few, all_tokens = (
        answer(model, make_method(name), samples[1:2], budget, max_new_tokens=1)
        for name, budget in (("mmtok", BUDGET), ("full", None))
    )
    recurrent, conv = 4 * 12 * 12 * 4, (2 * 2 * 12 + 4 * 12) * 4 * 4  # float32; a window of four
    row = 2 * 2 * 24 * 4
    for said in (few, all_tokens):
        length = said.reduced.inputs["input_ids"].shape[1]
        assert said.kv_cache_bytes == 4 * (recurrent + conv) + 4 * length * row
    dropped = few.reduced.tokens[0].total - 8
    assert all_tokens.kv_cache_bytes - few.kv_cache_bytes == 4 * dropped * row


def test_layers_that_cannot_be_read_are_refused(samples: list[Sample]) -> None:
    model = FAMILIES["qwen3_5"]("sdpa")
    with pytest.raises(MMTokError, match="reads the attention of decoder layer 2 of tiny, which has linear") as error:
        answer(model, make_method("fastv", layer=3), samples[:1], BUDGET)
    assert error.value.hint.endswith("1, 3, 5, 7")
    with pytest.raises(MMTokError, match=r"the first 2 decoder layers of tiny need all .* \(linear attention\)"):
        answer(model, make_method("random:inside", layer=1), samples[:1], BUDGET)


def test_layers_come_in_groups() -> None:
    config = architecture("qwen3.5-4b", "")
    with pytest.raises(MMTokError, match="come in groups of 4, with linear attention and full attention") as error:
        shortened(config, 6, "qwen3.5-4b")
    assert "multiple of 4" in error.value.hint
    whole = needs_of(laid_out(architecture("qwen3.5-4b", ""), torch.bfloat16), torch.bfloat16, (300,))
    part = laid_out(shortened(config, 8, "qwen3.5-4b"), torch.bfloat16)
    rest = sum(p.numel() for p in part.parameters()) * 2
    assert whole.of_layers(8).weights == pytest.approx(rest, abs=32) and whole.group == 4
    assert whole.cache == 8 * 2 * 4 * 256 * 428 * 2 // 32  # keys and values of eight of 32 layers
    assert [whole.layers_within(whole.of_layers(n).total) for n in (8, 11, 32)] == [8, 8, 32]


def test_a_part_stands_for_the_whole(tmp_path: Path, samples: list[Sample]) -> None:
    """The last group of layers is what the missing ones are estimated from."""
    tiny = FAMILIES["qwen3_5"]("sdpa")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    with pytest.raises(MMTokError, match="come in groups of 2"):
        load_model(str(tmp_path), layers=3)
    whole, part = load_model(str(tmp_path)), load_model(str(tmp_path), layers=4)
    case = Case("mmtok", make_method("mmtok"), BUDGET)
    flops = [count_flops(model, case, samples[:1], 2) for model in (whole, part)]
    assert flops[0]["prefill"] == pytest.approx(flops[1]["prefill"], rel=1e-6)
    answers = [answer(each, case.method, samples[:1], BUDGET, max_new_tokens=1) for each in (whole, part)]
    assert answers[0].kv_cache_bytes == answers[1].kv_cache_bytes and weights_read(whole) == weights_read(part)
    environment = environment_of(part)
    assert environment.layers == (4, 8) and environment.linear_layers == 2
    assert "skipped layers cost as much as the last ones" in part_text(environment.layers)
    assert not linear_text(0) and "2 decoder layers have linear attention" in linear_text(2)


def test_reference_code_of_linear_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["qwen3_5"]("sdpa")
    told = "4 decoder layers with linear attention ran in transformers' reference code"
    assert hf.has_linear_attention_kernels() in (False, True)
    for usable in (False, True):
        monkeypatch.setattr(hf, "has_linear_attention_kernels", lambda usable=usable: usable)
        measured = {"environment": environment_of(model)}
        compared, profiled = comparison([case("full", 576)]), profile()
        found = notes(compared.model_copy(update=measured))
        also = profile_notes(profiled.model_copy(update=measured), ProfileSettings(), 5, (), 4096)
        assert [any(told in line for line in lines) for lines in (found, also)] == [not usable] * 2
        assert not environment_of(FAMILIES["llava"]("sdpa")).linear_reference


def test_states_of_missing_layers_are_those_of_the_last_group(samples: list[Sample]) -> None:
    model = FAMILIES["qwen3_5"]("sdpa")
    with torch.inference_mode():
        _, cache = hf.forward(model.model, reduce(model, make_method("full"), samples[:1], None, rules=Rules()).inputs)
    layers = hf.cached_bytes(cache)
    assert layers[0] != layers[1] and cache_bytes(cache, 4, 2) == sum(layers) + 2 * (layers[0] + layers[1])
