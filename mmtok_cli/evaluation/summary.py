"""From what all cases said about a dataset to one verdict for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample
from mmtok_cli.evaluation.metrics import is_yes, says_yes, yes_no
from mmtok_cli.evaluation.predictions import Outcome
from mmtok_cli.evaluation.retention import Retention, count_flips, f1_retention, mean_retention
from mmtok_cli.results.schema import Fidelity, Flips, YesNo

RIGHT = 0.5  # a soft accuracy of so much is right where an answer must be either right or wrong


@dataclass(frozen=True)
class Quality:
    """One case on a dataset.

    asked: samples with a known answer. score: F1 where answers are yes or no, as POPE is reported; else the mean.
    by_kind: mean of the samples' scores and how many they are, by kind of question. retention and flips are against the
    baseline, which has none itself; they and the scores are None where no answer is known.
    """

    asked: int
    score: float | None
    by_kind: dict[str, tuple[float, int]]
    yes_no: YesNo | None
    retention: Retention | None
    flips: Flips | None
    fidelity: Fidelity


def judge(dataset: Dataset, outcomes: Sequence[Outcome], cases: int, *, seed: int) -> list[Quality]:
    """One verdict for each case; the first is the baseline. outcomes: of the same samples for every case."""
    table: list[dict[int, Outcome]] = [{} for _ in range(cases)]
    for outcome in outcomes:
        table[outcome.case][outcome.number] = outcome
    known = [number for number, outcome in sorted(table[0].items()) if outcome.score is not None]
    samples = [dataset.samples[number] for number in known]
    columns = [[by_number[number] for number in known] for by_number in table]
    return [
        _verdict(dataset, samples, columns[0], mine, list(table[i].values()), seed, is_baseline=i == 0)
        for i, mine in enumerate(columns)
    ]


def _verdict(
    dataset: Dataset,
    samples: Sequence[Sample],
    baseline: Sequence[Outcome],
    mine: Sequence[Outcome],
    everything: Sequence[Outcome],
    seed: int,
    *,
    is_baseline: bool,
) -> Quality:
    closeness = [outcome.closeness for outcome in everything]
    fidelity = Fidelity(
        kl=fmean(close.kl for close in closeness),
        top1=fmean(close.top1 for close in closeness),
        same=fmean(close.same for close in closeness),
    )
    if not samples:
        return Quality(0, None, {}, None, None, None, fidelity)
    scores, base = _scores(mine), _scores(baseline)
    clusters = ["\n".join(sample.image_ids) for sample in samples]
    score, detail, retention = fmean(scores), None, None
    if dataset.metric == "yes-no":
        truth = [is_yes(sample.answer or "") for sample in samples]
        says, base_says = ([says_yes(outcome.answer) for outcome in outcomes] for outcomes in (mine, baseline))
        detail = yes_no(says, truth)
        score = detail.f1
        if not is_baseline:
            retention = f1_retention(truth, base_says, says, clusters, seed=seed)
    elif not is_baseline:
        retention = mean_retention(base, scores, clusters, seed=seed)
    by_kind = defaultdict(list)
    for sample, value in zip(samples, scores, strict=True):
        by_kind[sample.kind or "other"].append(value)
    return Quality(
        asked=len(samples),
        score=score,
        by_kind={kind: (fmean(values), len(values)) for kind, values in sorted(by_kind.items())},
        yes_no=detail,
        retention=retention,
        flips=None if is_baseline else count_flips(_right(base), _right(scores)),
        fidelity=fidelity,
    )


def _scores(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.score for outcome in outcomes if outcome.score is not None]


def _right(scores: Sequence[float]) -> list[bool]:
    return [score >= RIGHT for score in scores]
