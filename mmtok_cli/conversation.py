"""Conversations: several questions about the images of one sample, and what becomes of its vision tokens in between."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mmtok_cli.budget import Budget, TokenCounts
from mmtok_cli.data.samples import Sample, decoded_videos
from mmtok_cli.decoding import Continuation, cache_bytes, decode_after, prefill, require_finite
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import ImagePlan
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Prompt, VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Encoded, Reduced, inside, prepare, reduce, reduce_encoded, require_room
from mmtok_cli.rules import ImageScale, Rules, TurnPolicy
from mmtok_cli.stages import CHECK, Stage, unwatched
from mmtok_cli.tokens import Selection, VisionTokens


@dataclass(frozen=True)
class TurnAnswer:
    """The answer to one question of a conversation.

    token_ids: [new tokens]. tokens: counts of the whole conversation up to this answer. kv_cache_bytes: after this
    answer. encoder_bytes: outputs of the vision encoder that are kept in memory for later turns. selections: what
    entered the language model of each image.
    """

    text: str
    token_ids: Tensor
    tokens: TokenCounts
    kv_cache_bytes: int
    encoder_bytes: int
    selections: list[Selection]


@dataclass(frozen=True)
class History:
    """A conversation up to its last answer, as far as later turns need it.

    prompt: with placeholders for all vision tokens, and without pixels. plans, selections: of each image. vision: the
    encoder's outputs, None where they are not kept. tokens: of the reduced prompt. continuation: reads on after it.
    questions: asked so far. said: [new tokens] of the last answer.
    """

    prompt: Prompt
    plans: list[ImagePlan]
    selections: list[Selection]
    vision: list[VisionTokens] | None
    tokens: TokenCounts
    continuation: Continuation
    questions: tuple[str, ...]
    said: Tensor


class Conversation:
    """A conversation about the images of a sample: a context, within which `ask` answers one question after another.

    policy: what becomes of the vision tokens when another question follows.
        reuse     the KV cache is kept, with the tokens selected for the first question; only new text is read
        reselect  tokens are selected for the new question alone, and the whole conversation is read again
        union     the tokens selected for the new question join those kept before; the whole is read again
    encode_again: whether the vision encoder runs again before a new selection; otherwise its outputs are kept.
    image_scale: as in `reduce`; images keep the size that they have in the first turn.

    The history holds the tokens of the conversation's own answers. Raises MMTokError for a policy that does not suit
    the method.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        method: Method,
        sample: Sample,
        budget: Budget | None,
        policy: TurnPolicy = "reuse",
        *,
        rules: Rules = RELEASED,
        max_new_tokens: int = 32,
        encode_again: bool = False,
        image_scale: ImageScale = 1,
    ) -> None:
        require_policy(method, policy)
        self._model = model
        self._method = method
        self._sample = sample
        self._budget = budget
        self._policy = policy
        self._rules = rules
        self._max_new_tokens = max_new_tokens
        self._image_scale = image_scale
        self._keeps_encoded = policy != "reuse" and not encode_again
        self._history: History | None = None
        self._inside = ExitStack()  # the context inside the language model, which lives as long as the cache

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    @torch.inference_mode()
    def ask(self, question: str, stage: Stage = unwatched) -> TurnAnswer:
        """Answer the next question greedily. Raises MMTokError where the conversation becomes too long."""
        before = self._history
        if before is None:
            (sample,) = decoded_videos([replace(self._sample, question=question)], stage)
            reduced = reduce(
                self._model,
                self._method,
                [sample],
                self._budget,
                rules=self._rules,
                stage=stage,
                image_scale=self._image_scale,
            )
            return self._read(reduced, (question,), stage)
        with stage("prepare"):
            between = self._model.next_turn(before.questions, question, len(self._sample.images))
            said = _without_end(before.said, self._model).to(between.device)  # on the host
            self._require_text(said)
        if self._policy == "reuse":
            return self._read_on(before, torch.cat([said[len(before.said) - 1 :], between]), question, stage)
        reduced = self._reduce_again(before, torch.cat([said, between]), question, stage)
        questions = (*before.questions, question)
        del before  # so that `_read` frees its cache
        return self._read(reduced, questions, stage)

    def _reduce_again(self, before: History, text: Tensor, question: str, stage: Stage) -> Reduced:
        """Select from the whole conversation, which `text` [tokens] continues."""
        vision, ids = before.vision, before.prompt.input_ids
        with stage("prepare"):
            prompt = replace(
                before.prompt,
                input_ids=torch.cat([ids, text[None]], dim=1),
                attention_mask=torch.ones(1, ids.shape[1] + len(text), dtype=torch.long, device=ids.device),
                questions=(question,),
            )
            if vision is None:
                again = prepare(self._model, [replace(self._sample, question=before.questions[0])], before.plans)
                prompt = replace(prompt, pixel_values=again.pixel_values)
        if vision is None:
            with stage("encode"):
                vision = self._model.encode(prompt, self._method.signals_among(self._model.signals), stage=stage)
        earlier = before.selections if self._policy == "union" else ()
        encoded = Encoded(prompt, vision)
        return reduce_encoded(self._model, self._method, encoded, before.plans, self._rules, stage, earlier)

    def _read(self, reduced: Reduced, questions: tuple[str, ...], stage: Stage) -> TurnAnswer:
        """Read a whole conversation and answer its last question."""
        require_room(self._model, reduced.inputs["input_ids"].shape[1], self._max_new_tokens)
        self._history = None
        self._inside.close()
        with stage("select"):
            self._inside.enter_context(inside(self._model, reduced, stage=stage))
        with stage("prefill"):
            logits, cache = prefill(self._model, reduced.inputs)
        history = History(
            prompt=replace(reduced.prompt, pixel_values=()),
            plans=[image.plan for image in reduced.images],
            selections=reduced.selections,
            vision=reduced.vision if self._keeps_encoded else None,
            tokens=reduced.tokens[0],
            continuation=Continuation(self._model, reduced.inputs, cache),
            questions=questions,
            said=logits.new_empty(0, dtype=torch.long),
        )
        return self._answer(history, logits, stage)

    def _read_on(self, before: History, text: Tensor, question: str, stage: Stage) -> TurnAnswer:
        """Read further text [tokens] after what is in the cache, and answer its question."""
        require_room(self._model, before.continuation.length + len(text), self._max_new_tokens)
        with stage("prefill"):
            logits = before.continuation.read_text(text[None].to(self._model.device))
        entered = sum(selection.kept for selection in before.selections)
        tokens = replace(before.tokens, text=before.continuation.length - entered)
        return self._answer(replace(before, tokens=tokens, questions=(*before.questions, question)), logits, stage)

    def _answer(self, history: History, logits: Tensor, stage: Stage) -> TurnAnswer:
        """Decode the answer to the last question, of whose first token these are the logits."""
        model = self._model
        with stage("prefill"), stage(CHECK):
            require_finite(model, logits)
        with stage("decode"):
            (said,) = decode_after(history.continuation, logits, self._max_new_tokens)
        self._history = replace(history, said=said)
        return TurnAnswer(
            text=model.tokenizer.decode(said, skip_special_tokens=True).strip(),
            token_ids=said,
            tokens=history.tokens,
            kv_cache_bytes=cache_bytes(
                history.continuation.cache, model.layer_count - model.loaded_layers, model.layer_group
            ),
            encoder_bytes=_stored_bytes(history.vision or ()),
            selections=history.selections,
        )

    def _require_text(self, said: Tensor) -> None:
        marks = torch.tensor(self._model.placeholder_ids, device=said.device)
        if bool(torch.isin(said, marks).any()):
            raise MMTokError(
                "an answer contains a token that stands for images, so that no question can follow it",
                "ask this question last",
            )


def require_policy(method: Method, policy: TurnPolicy) -> None:
    """Raises MMTokError for a policy that does not exist or does not suit the method."""
    if policy not in get_args(TurnPolicy):
        raise MMTokError(
            f"{policy!r} is not a policy for later turns", f"choose among {', '.join(get_args(TurnPolicy))}"
        )
    if policy == "union" and "inside the language model" in method.acts():
        raise MMTokError(
            f"--turns union does not suit {type(method).__name__}: it drops tokens inside the language model, other "
            "ones for each prompt, so there is no set of kept tokens to add to",
            "use --turns reuse or reselect for it",
        )


def check_conversation(model: VisionLanguageModel, sample: Sample) -> None:
    """Refuse a conversation whose questions cannot follow each other. Raises MMTokError."""
    questions = [turn.question for turn in sample.turns]
    for number in range(1, len(questions)):
        model.next_turn(questions[:number], questions[number], len(sample.images))


def _without_end(said: Tensor, model: VisionLanguageModel) -> Tensor:
    """The tokens of an answer without the one that ended it, which the chat template writes itself."""
    ended = len(said) > 0 and int(said[-1]) in model.eos_token_ids
    return said[:-1] if ended else said


def _stored_bytes(vision: Sequence[VisionTokens]) -> int:
    """Bytes of memory that the tensors of encoded images hold, each once, however many views there are of it."""
    found: dict[tuple[torch.device, int], int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[value.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, VisionTokens):
            for part in (value.projected, value.features, value.eligible, *value.signals.values(), *value.deepstack):
                add(part)
            for crop in value.crops.tokens if value.crops else ():
                add(crop)

    for each in vision:
        add(each)
    return sum(found.values())
