"""Answers of many cases to the same samples, with the images encoded once for all cases that encode them alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import answer_mask
from mmtok_cli.encodings import SharedEncodings
from mmtok_cli.evaluation.predictions import logits_after
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Answers, Reduced, answer_reduced, reduce_encoded


class SharedBatch:
    """A batch of samples that several cases answer. Nested methods select once, at the first budget that is asked for,
    so begin with the largest."""

    def __init__(self, model: VisionLanguageModel, samples: Sequence[Sample]) -> None:
        self._model = model
        self._encodings = SharedEncodings(model, samples)

    def answer(self, case: Case, max_new_tokens: int) -> Answers:
        """What the case answers. Raises MMTokError for a sample that it refuses."""
        return answer_reduced(self._model, self._reduce(case), max_new_tokens)

    def agreement(self, case: Case, token_ids: Tensor) -> tuple[list[float], Reduced]:
        """For each sample, the share of the tokens of an answer that the case would have given as well, each after the
        ones before it; and the reduced prompt. token_ids: [batch, steps], the unreduced model's answers."""
        model, reduced = self._model, self._reduce(case)
        agrees = logits_after(model, reduced, token_ids).argmax(-1) == token_ids
        mask = answer_mask(token_ids, model.eos_token_ids)
        shares = (agrees & mask).sum(1) / mask.sum(1)
        return shares.tolist(), reduced

    def _reduce(self, case: Case) -> Reduced:
        encoded, plans = self._encodings.of(case)
        return reduce_encoded(self._model, case.method, encoded, plans, case.rules)
