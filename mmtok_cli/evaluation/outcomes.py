"""From the records of the quality half to what each case's result says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtok_cli.evaluation.records import common_outcomes, dataset_of, refusals_of
from mmtok_cli.evaluation.remaining import asked_cases
from mmtok_cli.evaluation.summary import Quality, judge
from mmtok_cli.results.records import digest
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import CaseId, FailedCase, Score


def qualities(store: RunDirectory) -> dict[str, Quality]:
    """The verdict on each case that was asked about every sample so far, by its identity; none without a baseline."""
    plan = store.plan
    size, cases = asked_cases(store)
    batches = [batch for batch in store.asked.values() if batch.batch_size == size]
    refused = refusals_of(batches)
    asked = [case for case in cases if case not in refused]
    if not cases or cases[0] in refused:
        return {}
    outcomes = common_outcomes(batches, asked)
    if not outcomes:
        return {}
    dataset = dataset_of(plan.data, plan.metric, batches, plan.samples)
    verdicts = judge(dataset, outcomes, len(asked), seed=plan.seed)
    return {identity(plan.cases[case].case): verdict for case, verdict in zip(asked, verdicts, strict=True)}


def identity(case: CaseId) -> str:
    """What a case shares with itself at another batch size, where it answers the same."""
    return digest(case.model_dump(exclude={"batch_size"}))


def unasked(store: RunDirectory) -> list[FailedCase]:
    """Cases that were timed and could not be asked."""
    return [
        FailedCase(
            case=store.plan.cases[case].case,
            round=None,
            reason=refusal.reason,
            message=refusal.message,
        )
        for case, refusal in sorted(refusals_of(store.asked.values()).items())
    ]


def asked_samples(store: RunDirectory) -> int:
    """How many samples were asked, those that could not be read aside."""
    return sum(len(batch.subjects) - len(batch.unread) for batch in store.asked.values())


def left_out(store: RunDirectory) -> list[str]:
    """What of the data could not be used: a line for each part of it."""
    unread = [item for _, batch in sorted(store.asked.items()) for item in batch.unread]
    return [*store.plan.left_out, *(f"left out: sample {item.number + 1}: {item.problem}" for item in unread)]


def result_fields(quality: Quality | None, *, is_baseline: bool) -> Mapping[str, Any]:
    """The fields of a result that say what its answers are worth."""
    if quality is None:
        return {}
    retention = quality.retention
    return {
        "score": quality.score,
        "score_counts": _counts(quality),
        "retention": retention.value if retention else None,
        "retention_low": retention.low if retention else None,
        "retention_high": retention.high if retention else None,
        "flips": quality.flips,
        "yes_no": quality.yes_no,
        "fidelity": None if is_baseline else quality.fidelity,
    }


def _counts(quality: Quality) -> Score | None:
    if not quality.asked:
        return None
    by_kind = {kind: (_whole(mean * asked), asked) for kind, (mean, asked) in quality.by_kind.items()}
    return Score(right=_whole(sum(right for right, _ in by_kind.values())), asked=quality.asked, by_kind=by_kind)


def _whole(value: float) -> int | float:
    """A sum of scores, as a whole number where it is one but for rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 else value
