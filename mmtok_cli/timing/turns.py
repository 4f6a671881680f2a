"""Timing a conversation, turn by turn."""

from __future__ import annotations

from mmtok_cli.cases import Case
from mmtok_cli.conversation import Conversation
from mmtok_cli.data.samples import Sample
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.records import TurnRun
from mmtok_cli.rules import AUTO, TurnPolicy
from mmtok_cli.stages import DECODE_VIDEO, PREVIEW, STAGES
from mmtok_cli.timing.clock import Clock, with_sums


def run_conversation(
    model: VisionLanguageModel,
    case: Case,
    policy: TurnPolicy,
    sample: Sample,
    max_new_tokens: int,
    *,
    encode_again: bool = False,
) -> list[TurnRun]:
    """Ask the questions of a sample one after another, each under a clock of its own. The answers have no scores."""
    runs = []
    with Conversation(
        model,
        case.method,
        sample,
        case.budget,
        policy,
        rules=case.rules,
        max_new_tokens=max_new_tokens,
        encode_again=encode_again,
        image_scale=case.image_scale,
    ) as conversation:
        rare = {PREVIEW: case.image_scale == AUTO, DECODE_VIDEO: sample.has_video}
        stages = (*STAGES, *(stage for stage, occurs in rare.items() if occurs))
        for turn in sample.turns:
            clock = Clock(*model.devices)
            answer = conversation.ask(turn.question, clock.stage)
            runs.append(
                TurnRun(
                    answer=answer.text,
                    score=None,
                    seconds=with_sums(dict.fromkeys(stages, 0.0) | clock.stages()),
                    tokens=answer.tokens,
                    steps=len(answer.token_ids),
                    kv_cache=answer.kv_cache_bytes,
                    encoder_outputs=answer.encoder_bytes,
                )
            )
    return runs
