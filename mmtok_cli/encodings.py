"""Encoder outputs of some samples, made once for all cases that encode their images alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.image_plan import ImagePlan, plan_images
from mmtok_cli.image_scale import encoded_grids
from mmtok_cli.models.base import Grid, VisionLanguageModel
from mmtok_cli.pipeline import Encoded, images_of, prepare


class SharedEncodings:
    """The samples' images as cases encode them. grids: one for each image, in place of the model's own choice."""

    def __init__(
        self, model: VisionLanguageModel, samples: Sequence[Sample], grids: Sequence[Grid] | None = None
    ) -> None:
        self._model = model
        self._samples = samples
        self._grids = grids
        self._encoded: dict[Any, Encoded] = {}
        self._smaller: dict[Any, list[Grid | None]] = {}

    @torch.inference_mode()
    def of(self, case: Case) -> tuple[Encoded, list[ImagePlan]]:
        """What a case selects from, and how it reduces each image. Raises MMTokError for a sample that it refuses."""
        model, images = self._model, images_of(self._samples)
        if case.image_scale not in self._smaller:
            self._smaller[case.image_scale] = encoded_grids(model, images, case.image_scale)
        smaller = self._smaller[case.image_scale]
        plans = plan_images(model, case.method, images, case.budget, case.rules, self._grids, smaller=smaller)
        signals = case.method.signals_among(model.signals)
        # The rules, since selections of nested methods are kept beside the outputs.
        key = (tuple((plan.grid, plan.slices) for plan in plans), signals, case.rules)
        if key not in self._encoded:
            prompt = prepare(model, self._samples, plans)
            self._encoded[key] = Encoded(prompt, model.encode(prompt, signals), picks={})
        return self._encoded[key], plans
