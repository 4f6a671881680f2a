"""How close a method stays to the unreduced model, on any images: no known answers are needed.

The unreduced model's answer is read back to the reduced one token by token (teacher forcing), so that the distributions
of the next token are compared at the same words, however early the answers would part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import Continuation, prefill
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Answers, answer, inside, reduce
from mmtok_cli.rules import Rules


@dataclass(frozen=True)
class Reference:
    """What the unreduced model said to a batch, and the logits that made it say so.

    logits: [batch, steps, vocabulary]. mask: [batch, steps], the tokens of each answer, the one that ends it included.
    """

    answers: Answers
    logits: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Closeness:
    """How close the logits of one sample's answer are to the reference.

    kl: divergence of the next token's distribution in nats, mean over the answer's tokens. top1: share of its tokens
    that are the likeliest here too. same: whether all are, so that greedy decoding says the same: each token follows
    from those before it.
    """

    kl: float
    top1: float
    same: bool


def reference_of(
    model: VisionLanguageModel, samples: Sequence[Sample], *, max_new_tokens: int, rules: Rules = RELEASED
) -> Reference:
    """Answer a batch greedily from all vision tokens. Raises MMTokError where prompt and answer are too long."""
    full = make_method("full")
    said = answer(model, full, samples, None, rules=rules, max_new_tokens=max_new_tokens)
    logits = forced_logits(model, full, samples, None, said.token_ids, rules=rules)
    return Reference(said, logits, answer_mask(said.token_ids, model.eos_token_ids))


@torch.inference_mode()
def forced_logits(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    token_ids: Tensor,
    *,
    rules: Rules = RELEASED,
) -> Tensor:
    """Logits of each token of a given answer, [batch, steps, vocabulary], from the reduced prompt and what precedes it.

    token_ids: [batch, steps]. They are read one by one through the cache, as decoding does, so that it holds for
    methods inside the language model too. Raises MMTokError where a budget cannot be met.
    """
    reduced = reduce(model, method, samples, budget, rules=rules)
    with inside(model, reduced):
        first, cache = prefill(model, reduced.inputs)
        behind = Continuation(model, reduced.inputs, cache)
        logits = [first, *(behind.read(token) for token in token_ids[:, :-1].unbind(1))]
    return torch.stack(logits, dim=1)


def answer_mask(token_ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """True for the tokens [batch, steps] of each answer up to the first that ends it; what follows is padding."""
    ends = torch.isin(token_ids, torch.tensor(eos_token_ids, dtype=token_ids.dtype, device=token_ids.device))
    return ends.cumsum(1) - ends.long() == 0


def compare_logits(reference: Tensor, found: Tensor, mask: Tensor) -> list[Closeness]:
    """One for each sample. reference, found: [batch, steps, vocabulary]; mask: [batch, steps], what counts."""
    expected, log_probabilities = reference.float().log_softmax(-1), found.float().log_softmax(-1)
    kl = kl_div(log_probabilities, expected, reduction="none", log_target=True).sum(-1).clamp(min=0)
    agrees = reference.argmax(-1) == found.argmax(-1)
    count = mask.sum(1)
    means = (kl * mask).sum(1) / count
    shares = (agrees & mask).sum(1) / count
    same = (agrees | ~mask).all(1)
    return [Closeness(*parts) for parts in zip(means.tolist(), shares.tolist(), same.tolist(), strict=True)]
