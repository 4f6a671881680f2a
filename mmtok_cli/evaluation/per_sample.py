"""The predictions of a run, sample by sample, each beside that of the unreduced model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mmtok_cli.evaluation.summary import RIGHT
from mmtok_cli.results.progress import evaluated_batches, evaluated_cases, evaluation_failures
from mmtok_cli.results.records import Prediction, SampleLabel
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import CaseId, SamplePrediction


def sample_predictions(store: RunDirectory, run: str | None = None) -> Iterator[SamplePrediction]:
    """The predictions that the summary of a run is made of: sample by sample, all cases of each, the baseline first.

    run: the label of the run, if several are reported together. Nothing without a baseline or an evaluation.
    """
    _, cases = evaluated_cases(store)
    failed = evaluation_failures(store)
    if not cases or cases[0] in failed:
        return
    for batch in evaluated_batches(store):
        found = {(prediction.sample, prediction.case): prediction for prediction in batch.predictions}
        for label in batch.samples:
            for number in cases:
                if number not in failed and label.sample in batch.readable:
                    case = store.plan.cases[number].case.model_copy(update={"run": run})
                    yield sample_row(label, case, found[label.sample, number], found[label.sample, cases[0]])


def sample_row(label: SampleLabel, case: CaseId, mine: Prediction, baseline: Prediction) -> SamplePrediction:
    """The prediction of a case for a sample, beside that of the unreduced model."""
    return SamplePrediction(
        run=case.run,
        sample=label.sample,
        id=label.id,
        images=label.images,
        kind=label.kind,
        question=label.question,
        references=label.references,
        method=case.method,
        parameters=case.parameters,
        budget=case.budget,
        batch_size=case.batch_size,
        again=case.again,
        draft=case.draft,
        draft_tokens=case.draft_tokens,
        image_scale=case.image_scale,
        encoded=list(mine.tokens.encoded) if mine.tokens and mine.tokens.encoded else None,
        prediction=mine.answer,
        baseline_prediction=baseline.answer,
        kept=mine.tokens.kept if mine.tokens else None,
        total=mine.tokens.total if mine.tokens else None,
        score=mine.score,
        baseline_score=baseline.score,
        flip=_flip(mine.score, baseline.score),
        kl=mine.closeness.kl,
        top1=mine.closeness.top1,
        same=mine.closeness.same,
    )


def _flip(score: float | None, baseline: float | None) -> Literal["lost", "gained", ""]:
    if score is None or baseline is None or (score >= RIGHT) == (baseline >= RIGHT):
        return ""
    return "gained" if score >= RIGHT else "lost"
