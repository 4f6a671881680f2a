"""Several turns: the cache is continued, or the conversation is read again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import picture
from tiny_models import FAMILIES
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.conversation import Conversation, TurnAnswer
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import Continuation, decode, decode_after, prefill
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.families import family_class
from mmtok_cli.pipeline import inside, reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.rules import Positions, Rules
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

QUESTIONS = ("What color is the star?", "Is there a red circle in the image?", "How many hearts are there?")
NEW = 5
BUDGET = Budget.parse("5")
SAMPLE = Sample((picture(160, 100, 2),), QUESTIONS[0], ("picture",))
INSIDE = {
    "fastv": make_method("fastv", layer=2),
    "pyramiddrop": make_method("pyramiddrop", layers=(1, 2)),
    "sparsevlm": make_method("sparsevlm", layers=(0, 1, 2)),
    "sparsevlm:v2": make_method("sparsevlm:v2", layers=(0, 1, 2)),
    "random:inside": make_method("random:inside"),
}


@pytest.fixture(autouse=True)
def speaking(request: pytest.FixtureRequest) -> Iterator[None]:
    """Answers without tokens of images, which no model gives that was trained."""
    names = [name for name in ("vlm", "tiny_sdpa", "tiny") if name in request.fixturenames]
    models = [request.getfixturevalue(name) for name in names]
    before = [model.model.lm_head.weight.clone() for model in models]
    with torch.no_grad():
        for model in models:
            model.model.lm_head.weight[model.image_token_id] = 0
        yield
        for model, weight in zip(models, before, strict=True):
            model.model.lm_head.weight.copy_(weight)


def talk(
    model: VisionLanguageModel, method: Method, *, budget: Budget | None = BUDGET, **options: Any
) -> list[TurnAnswer]:
    sample = options.pop("sample", SAMPLE)
    options = {"max_new_tokens": NEW} | options
    with Conversation(model, method, sample, budget, **options) as conversation:
        return [conversation.ask(question) for question in QUESTIONS]


def said(model: VisionLanguageModel, turn: TurnAnswer) -> Tensor:
    """The answer's tokens without the one that ends it."""
    ids = turn.token_ids
    return ids[:-1] if int(ids[-1]) in model.eos_token_ids else ids


def whole_prompt(model: VisionLanguageModel, turns: Sequence[TurnAnswer], sample: Sample = SAMPLE) -> Any:
    """The prompt of the turn after `turns`, from one rendering of the chat template with the answers in it."""
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(QUESTIONS[: len(turns) + 1]):
        content = [{"type": "image"} for _ in sample.images] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if number < len(turns):
            text = model.tokenizer.decode(said(model, turns[number]))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    text = model.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    parts = text.split(model.processor.image_token)
    text = parts[0] + "".join(
        model.placeholders(model.total(image)) + part for image, part in zip(sample.images, parts[1:], strict=True)
    )
    return model.tokenizer(text, return_tensors="pt")["input_ids"]


def fresh_answer(model: VisionLanguageModel, ids: Tensor, sample: Sample = SAMPLE) -> tuple[Tensor, Tensor]:
    """The unreduced model's answer to a whole conversation that it reads at once, and the logits of its first token."""
    prompt = model.prepare([sample.question], [sample.images], [sample.image_ids], [None] * len(sample.images))
    prompt = replace(prompt, input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.inference_mode():
        vision = model.encode(prompt)
        inputs = model.assemble(prompt, vision, [Selection.everything(v) for v in vision], "keep")
        logits, cache = prefill(model, inputs)
        return decode(model, inputs, logits, cache, NEW)[0], logits


def test_reuse_gives_what_a_fresh_prefill_of_the_whole_conversation_gives(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def recording(behind: Continuation, logits: Tensor, most: int) -> Tensor:
        seen.append(logits)
        return decode_after(behind, logits, most)

    monkeypatch.setattr("mmtok_cli.conversation.decode_after", recording)
    turns = talk(vlm, make_method("full"), budget=None)
    for number, turn in enumerate(turns):
        ids = whole_prompt(vlm, turns[:number])
        assert turn.tokens.text + turn.tokens.total == ids.shape[1]
        tokens, logits = fresh_answer(vlm, ids)
        assert turn.token_ids.tolist() == tokens.tolist()
        torch.testing.assert_close(seen[number], logits, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(seen[1], seen[2], atol=1e-2)


def test_several_images_are_talked_about(vlm: VisionLanguageModel) -> None:
    two = replace(SAMPLE, images=(picture(84, 84, 1), picture(60, 90, 3)), image_ids=("one", "two"))
    turns = talk(vlm, make_method("full"), budget=None, sample=two)
    tokens, _ = fresh_answer(vlm, whole_prompt(vlm, turns[:-1], two), two)
    assert turns[-1].token_ids.tolist() == tokens.tolist()
    kept = talk(vlm, make_method("mmtok"), policy="union", sample=two)[-1].selections
    assert len(kept) == 2 and all(selection.kept >= 5 for selection in kept)


@pytest.mark.parametrize("policy", ["reselect", "union"])
def test_without_reduction_every_policy_says_the_same(vlm: VisionLanguageModel, policy: str) -> None:
    expected = [turn.token_ids.tolist() for turn in talk(vlm, make_method("full"), budget=None)]
    for method in ("full", "mmtok"):
        budget = None if method == "full" else Budget.parse("100%")
        turns = talk(vlm, make_method(method), budget=budget, policy=policy)
        assert [turn.token_ids.tolist() for turn in turns] == expected


@pytest.mark.parametrize("again", [False, True])
def test_reselection_is_that_of_the_new_question(vlm: VisionLanguageModel, again: bool) -> None:
    method = make_method("mmtok")
    turns = talk(vlm, method, policy="reselect", encode_again=again)
    for question, turn in zip(QUESTIONS, turns, strict=True):
        expected = reduce(vlm, method, [replace(SAMPLE, question=question)], BUDGET).selections[0]
        assert turn.selections[0].indices.tolist() == expected.indices.tolist()
        assert (turn.encoder_bytes > 0) is not again
    assert turns[0].selections[0].indices.tolist() != turns[1].selections[0].indices.tolist()


def test_reuse_keeps_the_first_selection_and_no_encoder_outputs(vlm: VisionLanguageModel) -> None:
    turns = talk(vlm, make_method("mmtok"))
    assert len({tuple(turn.selections[0].indices.tolist()) for turn in turns}) == 1
    assert [turn.encoder_bytes for turn in turns] == [0, 0, 0]
    assert turns[0].kv_cache_bytes < turns[1].kv_cache_bytes < turns[2].kv_cache_bytes


@pytest.mark.parametrize("method", ["visionzip", "divprune", "uniform", "resize", "resize:pool"])
def test_methods_that_do_not_read_the_question_do_not_depend_on_the_policy(
    vlm: VisionLanguageModel, method: str
) -> None:
    made = make_method(method)
    expected = talk(vlm, made)
    for policy in ("reselect", "union"):
        turns = talk(vlm, made, policy=policy)
        assert [turn.token_ids.tolist() for turn in turns] == [turn.token_ids.tolist() for turn in expected]
        assert [turn.tokens for turn in turns] == [turn.tokens for turn in expected]


@dataclass(frozen=True)
class ByQuestion(Method):
    """Keeps the tokens from a place on that the number of words of the question decides."""

    summary: ClassVar[str] = "by question"
    reads_question: ClassVar[bool] = True

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        start = (len(text.question.split()) - 5) * budget  # the questions have 5, 8 and 5 words
        return Selection(torch.arange(start, start + budget, device=vision.projected.device))


def test_union_adds_what_is_new(tiny_sdpa: VisionLanguageModel) -> None:
    square = replace(SAMPLE, images=(picture(84, 84, 1),))
    turns = talk(tiny_sdpa, ByQuestion(), policy="union", sample=square)
    assert [turn.tokens.kept for turn in turns] == [5, 10, 10]
    assert turns[1].selections[0].indices.tolist() == [*range(5), *range(15, 20)]
    assert turns[1].tokens.text == turns[0].tokens.text + len(said(tiny_sdpa, turns[0])) + len(
        tiny_sdpa.next_turn(QUESTIONS[:1], QUESTIONS[1], 1)
    )


def test_united_selections_keep_rows_of_their_own() -> None:
    vision = VisionTokens(
        torch.arange(12.0).view(6, 2), torch.zeros(6, 3), (2, 3), torch.ones(6, dtype=torch.bool), "", lambda x: x
    )
    one = Selection(
        torch.tensor([1, 4, 2]),
        tokens=torch.tensor([[1.0, 1], [4, 4], [2, 2]]),
        merged=torch.tensor([False, False, True]),
    )
    other = Selection(torch.tensor([0, -1, 4, 3]), tokens=torch.tensor([[0.0, 0], [9, 9], [5, 5], [3, 3]]))
    both = one.united(other, vision)
    assert both.indices.tolist() == [0, 1, 3, 4, -1, 2]
    assert both.tokens is not None and both.tokens[:, 0].tolist() == [0, 1, 3, 4, 9, 2]
    assert both.merged is not None and both.merged.tolist() == [False] * 5 + [True]
    assert both.united(other, vision) is both  # an equal token without a place is not added again
    plain = Selection(torch.tensor([5])).united(Selection(torch.tensor([2])), vision)
    assert plain.indices.tolist() == [2, 5] and plain.tokens is None and plain.merged is None


@pytest.mark.parametrize("method", INSIDE)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_text_behind_a_shortened_cache_is_read_as_token_by_token(
    tiny: VisionLanguageModel, method: str, positions: Positions
) -> None:
    with torch.inference_mode():
        reduced = reduce(tiny, INSIDE[method], [SAMPLE], BUDGET, rules=Rules(positions=positions))
        text = tiny.next_turn(QUESTIONS[:1], QUESTIONS[1], 1)
        found = []
        for pieces in ([text], text.split(1)):
            with inside(tiny, reduced):
                _, cache = prefill(tiny, reduced.inputs)
                behind = Continuation(tiny, reduced.inputs, cache)
                for piece in pieces:
                    logits = behind.read_text(piece[None])
                found.append([logits, behind.read(logits.argmax(-1))])
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", INSIDE)
def test_methods_inside_the_language_model_reuse_and_reselect(vlm: VisionLanguageModel, method: str) -> None:
    if vlm.first_cut and method.startswith("sparsevlm"):
        pytest.skip("DeepStack needs all vision tokens in the layer that it cuts before")
    for policy in ("reuse", "reselect"):
        turns = talk(vlm, INSIDE[method], policy=policy, budget=Budget.parse("6"))
        assert [turn.tokens.kept for turn in turns] == [6, 6, 6]
    with pytest.raises(MMTokError, match="union does not suit"):
        talk(vlm, INSIDE[method], policy="union")


def test_answers_that_are_cut_off_and_empty_ones_are_continued(
    tiny_sdpa: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last token that was not read is read with the next question; one that ends the answer never is."""
    full = make_method("full")
    cut_off = talk(tiny_sdpa, full, budget=None, max_new_tokens=1)
    assert int(cut_off[0].token_ids[-1]) not in tiny_sdpa.eos_token_ids
    assert cut_off[1].tokens.text == whole_prompt(tiny_sdpa, cut_off[:1]).shape[1] - cut_off[1].tokens.total
    first = int(cut_off[0].token_ids[0])
    monkeypatch.setattr(type(tiny_sdpa), "eos_token_ids", (first,))  # the first answer is empty
    silent = talk(tiny_sdpa, full, budget=None)
    assert silent[0].token_ids.tolist() == [first] and said(tiny_sdpa, silent[0]).tolist() == []
    assert silent[1].tokens.text == cut_off[1].tokens.text - 1
    again = talk(tiny_sdpa, full, budget=None, policy="reselect")
    assert [turn.token_ids.tolist() for turn in again] == [turn.token_ids.tolist() for turn in silent]


def test_the_appended_text_is_the_difference_of_two_renderings(vlm: VisionLanguageModel) -> None:
    ids = vlm.next_turn(QUESTIONS[:2], QUESTIONS[2], 1)
    assert vlm.tokenizer.decode(ids, skip_special_tokens=False) == vlm.tokenizer.decode(
        vlm.tokenizer(f"</s>USER: {QUESTIONS[2]} ASSISTANT:", add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }} turns {% for m in messages %}{{ m['content'][-1]['text'] }} {% endfor %}",
        "{{ messages[-1]['content'][-1]['text'] }}",
        "{% for m in messages %}{{ m['content'][-1]['text'] | upper }} {% endfor %}",
    ],
    ids=["counts", "last message only", "changes answers"],
)
def test_templates_that_change_earlier_turns_are_refused(
    template: str, tiny_sdpa: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_sdpa.processor, "chat_template", "<image>" + template)
    with pytest.raises(MMTokError, match="changes earlier turns"):
        tiny_sdpa.next_turn(QUESTIONS[:1], QUESTIONS[1], 1)


def test_questions_that_cannot_follow_are_refused(tiny_sdpa: VisionLanguageModel) -> None:
    with pytest.raises(MMTokError, match="marker"):
        tiny_sdpa.next_turn(QUESTIONS[:1], "<image> What is it?", 1)
    with Conversation(tiny_sdpa, make_method("full"), SAMPLE, None) as conversation:
        conversation.ask(QUESTIONS[0])
        with pytest.raises(MMTokError, match="do not fit into the"):
            conversation.ask("star " * 2040)


@pytest.mark.parametrize("place", [0, 1])  # the tokens of images and of videos
def test_an_answer_with_an_image_token_ends_the_conversation(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava_onevision"]("sdpa")
    said = torch.tensor([[model.placeholder_ids[place], 5]])
    monkeypatch.setattr("mmtok_cli.conversation.decode_after", lambda *_: said)
    with Conversation(model, make_method("full"), SAMPLE, None) as conversation:
        conversation.ask(QUESTIONS[0])
        with pytest.raises(MMTokError, match="stands for images"):
            conversation.ask(QUESTIONS[1])


def test_encoder_outputs_are_counted_once(tiny_sdpa: VisionLanguageModel) -> None:
    turns = talk(tiny_sdpa, make_method("mmtok"), policy="reselect")
    with torch.inference_mode():
        reduced = reduce(tiny_sdpa, make_method("mmtok"), [SAMPLE], BUDGET)
    (vision,) = reduced.vision
    least = vision.projected.nbytes + vision.features.nbytes
    assert least <= turns[0].encoder_bytes <= 2 * least
    assert len({turn.encoder_bytes for turn in turns}) == 1


@pytest.mark.parametrize("name", [name for name in known_profiles() if name != "demo"])
def test_the_chat_templates_of_all_profiles_hold_conversations(name: str) -> None:
    profile = known_profiles()[name]
    config = hf.make_config(profile.family, copy.deepcopy(profile.architecture or {}))
    family = family_class(profile.family)
    model: Any = object.__new__(family)  # its weights do not matter, and would not fit
    model.name, model.model = name, SimpleNamespace(config=config, device=torch.device("cpu"))
    model.processor = family.stand_in_processor(config, profile.chat_template)
    model.tokenizer = model.processor.tokenizer
    if profile.family == "llava_onevision":  # as on the hub: a space after "assistant" that the generation prompt lacks
        with pytest.raises(MMTokError, match="changes earlier turns"):
            model.next_turn(QUESTIONS[:2], QUESTIONS[2], 1)
        return
    appended = " ".join(map(str, model.next_turn(QUESTIONS[:2], QUESTIONS[2], 1).tolist()))
    asked = [" ".join(map(str, model.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in QUESTIONS]
    assert [appended.count(ids) for ids in asked] == [0, 0, 1] and not appended.startswith(asked[2])
