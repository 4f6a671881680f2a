"""Cases that can be run, and what it means when one fails."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.drafts import Draft
from mmtok_cli.errors import MethodFaultError, MMTokError, first_line, is_out_of_memory
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Answers, Reduced, answer, check_budget, reduce
from mmtok_cli.results.records import parameters_of
from mmtok_cli.results.schema import CaseId
from mmtok_cli.rules import ImageScale, Rules
from mmtok_cli.stages import DRAFT, Stage, unwatched


@dataclass(frozen=True)
class Case:
    """A method at a budget and a batch size, under the rules of the comparison.

    name: what the user called the method. again: a second measurement of the baseline, which shows the noise. draft:
    the first answer that the method reads as well. repeat: which of several draws it is, from 1, of a method that is
    drawn several times. image_scale: see `pipeline.reduce`.
    """

    name: str
    method: Method
    budget: Budget | None
    rules: Rules = RELEASED
    batch_size: int = 1
    again: bool = False
    draft: Draft | None = None
    repeat: int | None = None
    image_scale: ImageScale = 1

    def __str__(self) -> str:
        return str(self.id)

    @property
    def id(self) -> CaseId:
        """The case as plain data."""
        return CaseId(
            method=self.name,
            parameters=parameters_of(self.method),
            budget=None if self.budget is None else str(self.budget),
            batch_size=self.batch_size,
            again=self.again,
            draft=self.draft.source if self.draft else None,
            draft_tokens=self.draft.tokens if self.draft else None,
            repeat=self.repeat,
            image_scale=None if self.image_scale == 1 else self.image_scale,
        )

    def check(self, model: VisionLanguageModel, samples: Iterable[Sample]) -> None:
        """Refuse a budget that none of the samples can meet. Raises MMTokError that names the case."""
        try:
            check_budget(model, self.method, samples, self.budget, self.rules, image_scale=self.image_scale)
        except MethodFaultError:
            raise
        except MMTokError as error:
            raise MMTokError(f"{self}: {error.message}", error.hint) from error

    def drafts(self, model: VisionLanguageModel, samples: Sequence[Sample], stage: Stage = unwatched) -> list[str]:
        """The draft of each sample, written in a stage of its own; nothing for a case without."""
        if self.draft is None:
            return []
        with stage(DRAFT):
            return self.draft.write(model, self.method, samples, self.budget, self.rules, self.image_scale)

    def reduce(self, model: VisionLanguageModel, samples: Sequence[Sample], stage: Stage = unwatched) -> Reduced:
        """Reduce one batch, with `stage` around each stage of the pipeline."""
        return reduce(
            model,
            self.method,
            samples,
            self.budget,
            rules=self.rules,
            stage=stage,
            drafts=self.drafts(model, samples, stage),
            image_scale=self.image_scale,
        )

    def answer(
        self,
        model: VisionLanguageModel,
        samples: Sequence[Sample],
        max_new_tokens: int,
        stage: Stage,
        *,
        ignore_eos: bool = False,
        encodings: bool = False,
    ) -> Answers:
        """Answer one batch, with `stage` around each stage of the pipeline. encodings: see `pipeline.answer`."""
        return answer(
            model,
            self.method,
            samples,
            self.budget,
            rules=self.rules,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            stage=stage,
            drafts=self.drafts(model, samples, stage),
            image_scale=self.image_scale,
            encodings=encodings,
        )


def failure_of(error: Exception) -> dict[str, Any]:
    """Why a case cannot be run: the fields `reason`, `message` and `traceback` of a CaseFailure."""
    if is_out_of_memory(error):
        return {"reason": "out of memory", "message": _line(error)}
    if isinstance(error, MethodFaultError):
        return {"reason": "error", "message": error.message, "traceback": _traceback(error)}
    if isinstance(error, MMTokError):
        return {"reason": "refused", "message": error.message}
    return {
        "reason": "error",
        "message": f"{type(error).__name__}: {_line(error)}",
        "traceback": _traceback(error),
    }


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _line(error: Exception) -> str:
    """The line of an error that says what happened: the first, but the last in TorchScript, below its own traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines and "TorchScript" in lines[0] else first_line(error)


def release_memory(device: torch.device) -> None:
    """Free the memory that a failed run still holds.

    Raises MMTokError where the failure left the GPU unusable for this process, as after an illegal access.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise MMTokError(
                f"{device} cannot be used any more by this process: {first_line(error)}", "start the command again"
            ) from error
