"""Answers of many cases to the same samples, with the images encoded once for all cases that encode them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import answer_mask
from mmtok_cli.evaluation.predictions import logits_after
from mmtok_cli.image_plan import plan_images
from mmtok_cli.image_scale import encoded_grids
from mmtok_cli.models.base import Grid, VisionLanguageModel
from mmtok_cli.pipeline import Answers, Encoded, Reduced, answer_reduced, images_of, prepare, reduce_encoded


class SharedBatch:
    """A batch of samples that several cases answer. Nested methods select once, at the first budget that is asked for,
    so begin with the largest."""

    def __init__(self, model: VisionLanguageModel, samples: Sequence[Sample]) -> None:
        self._model = model
        self._samples = samples
        self._encoded: dict[Any, Encoded] = {}
        self._smaller: dict[Any, list[Grid | None]] = {}

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
        model, images = self._model, images_of(self._samples)
        if case.image_scale not in self._smaller:
            self._smaller[case.image_scale] = encoded_grids(model, images, case.image_scale)
        smaller = self._smaller[case.image_scale]
        plans = plan_images(model, case.method, images, case.budget, case.rules, smaller=smaller)
        signals = case.method.signals_among(model.signals)
        key = (tuple(plan.grid for plan in plans), signals, case.rules)
        if key not in self._encoded:
            with torch.inference_mode():
                prompt = prepare(model, self._samples, plans)
                self._encoded[key] = Encoded(prompt, model.encode(prompt, signals), picks={})
        return reduce_encoded(model, case.method, self._encoded[key], plans, case.rules)
