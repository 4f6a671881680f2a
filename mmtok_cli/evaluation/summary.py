"""From the predictions of a run to the score, retention, flips and fidelity of each case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np

from mmtok_cli.data.layouts import MetricName
from mmtok_cli.evaluation.metrics import is_yes, paired_accuracy, paired_shares, says_yes, yes_no, yes_or_no
from mmtok_cli.results.progress import evaluated_batches, evaluated_cases, evaluation_failures
from mmtok_cli.results.records import Prediction, SampleLabel
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import (
    CONFIDENCE,
    DraftEffect,
    FailedCase,
    Fidelity,
    Flips,
    PairedAccuracy,
    ResizeGroups,
    Score,
    TaskResult,
    YesNo,
)

RIGHT = 0.5  # from this score on, an answer counts as right where it must be either right or wrong
RESAMPLES = 4000
CELLS = 4_000_000  # numbers resampled at a time
ROUNDING = 1e-6  # by which a mean may differ
TASK_FIELDS = ("score", "retention", "retention_low", "retention_high", "flips")

Ratio = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Retention:
    """Score / baseline score; low and high bound a 95 % interval, None where the samples do not determine it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class EvaluationSummary:
    """One case on a dataset.

    samples: how many have a reference answer. score: F1 for POPE, (accuracy + accuracy_plus) / 2 for MME, else the
    mean. by_kind: mean score and number of samples by kind of question. retention and flips are relative to the
    baseline and None for the baseline itself; they and the scores are None without reference answers. short: how many
    samples do not meet the budget. draft: what the case's draft is worth. groups: None without `resize`
    at the same budget.
    """

    samples: int
    score: float | None
    by_kind: dict[str, tuple[float, int]]
    yes_no: YesNo | None
    paired: PairedAccuracy | None
    retention: Retention | None
    flips: Flips | None
    fidelity: Fidelity | None
    short: int = 0
    draft: DraftEffect | None = None
    groups: ResizeGroups | None = None

    def result_fields(self, *, is_baseline: bool) -> dict[str, Any]:
        """The fields of a CaseResult that describe the quality of the answers."""
        retention = self.retention
        return {
            "short": self.short,
            "score": self.score,
            "score_counts": self._counts(),
            "retention": retention.value if retention else None,
            "retention_low": retention.low if retention else None,
            "retention_high": retention.high if retention else None,
            "flips": self.flips,
            "yes_no": self.yes_no,
            "paired": self.paired,
            "fidelity": None if is_baseline else self.fidelity,
            "draft": self.draft,
            "groups": self.groups,
        }

    def _counts(self) -> Score | None:
        if not self.samples:
            return None
        by_kind = {kind: (_whole(mean * count), count) for kind, (mean, count) in self.by_kind.items()}
        return Score(right=_whole(sum(right for right, _ in by_kind.values())), asked=self.samples, by_kind=by_kind)


def summarise_evaluation(store: RunDirectory) -> dict[int, EvaluationSummary]:
    """The summary of each case of the plan that was evaluated, by its number; empty without a baseline.

    A case is evaluated at one batch size. Its answers do not depend on it, so the summary holds at the others as well.
    """
    plan = store.plan
    size, cases = evaluated_cases(store)
    failed = evaluation_failures(store)
    compared = [case for case in cases if case not in failed]
    if not cases or cases[0] in failed:
        return {}
    batches = evaluated_batches(store)
    found = summarise_predictions(
        [prediction for batch in batches for prediction in batch.predictions if prediction.case in compared],
        {label.sample: label for batch in batches for label in batch.samples},
        baseline=cases[0],
        metric=plan.metric,
        seed=plan.seed,
        without_draft=plan.without_draft,
        with_resize=plan.with_resize,
    )
    summaries: dict[int, EvaluationSummary] = {}
    for number, planned in enumerate(plan.cases):
        same = planned.case.model_copy(update={"batch_size": size})
        for case, summary in found.items():
            if plan.cases[case].case == same:
                summaries[number] = summary
    return summaries


def summarise_tasks(store: RunDirectory) -> list[TaskResult]:
    """Each case on each task of lmms-eval, whose name is the kind of its samples; empty without --tasks.

    A case appears once, at the smallest batch size.
    """
    plan = store.plan
    _, cases = evaluated_cases(store)
    compared = [case for case in cases if case not in evaluation_failures(store)]
    if not plan.options.tasks or not compared or compared[0] != cases[0]:
        return []
    batches, official = evaluated_batches(store), store.task_scores
    labels = {label.sample: label for batch in batches for label in batch.samples}
    found = []
    for task in dict.fromkeys(label.kind or "" for label in labels.values()):
        summaries = summarise_predictions(
            [p for batch in batches for p in batch.predictions if p.case in compared and labels[p.sample].kind == task],
            labels,
            baseline=compared[0],
            metric=plan.metric,
            seed=plan.seed,
        )
        for case, summary in summaries.items():
            fields = summary.result_fields(is_baseline=case == compared[0])
            found.append(
                TaskResult(
                    case=plan.cases[case].case.model_copy(update={"batch_size": 1}),
                    task=task,
                    samples=summary.samples,
                    metric=official.paired.get(task) if official else None,
                    metrics=official.scores.get(case, {}).get(task, {}) if official else {},
                    **{name: fields[name] for name in TASK_FIELDS},
                )
            )
    return found


def task_remarks(store: RunDirectory) -> list[str]:
    """Points out tasks whose score is not the mean that retention and flips are of."""
    official = store.task_scores
    if official is None:
        return []
    lines = list(official.remarks)
    unpaired = [task for task, metric in official.paired.items() if metric is None]
    if unpaired:
        lines.append(
            f"{', '.join(unpaired)}: no metric is a mean over answers, so scores are of all answers together, without "
            "retention and flips"
        )
    for result in summarise_tasks(store):
        value = result.metrics.get(result.metric or "")
        if value is not None and result.score is not None and abs(value - result.score) > ROUNDING:
            lines.append(
                f"{result.task}: {result.metric} of {result} is {value:.4g} by the task and {result.score:.4g} as the "
                "mean over answers, which retention and flips are of"
            )
    return lines


def summarise_predictions(
    predictions: Iterable[Prediction],
    labels: Mapping[int, SampleLabel],
    *,
    baseline: int,
    metric: MetricName | None,
    seed: int,
    without_draft: Mapping[int, int] = MappingProxyType({}),
    with_resize: Mapping[int, int] = MappingProxyType({}),
) -> dict[int, EvaluationSummary]:
    """The summary of each case, by its number. Every case must have predictions for the same samples.

    labels: by the number of the sample. baseline: number of the case that the others are compared with. without_draft:
    the same case without its draft, by the number of the one with it. with_resize: `resize` at the same budget, by the
    number of the other case.
    """
    table: dict[int, dict[int, Prediction]] = defaultdict(dict)
    for prediction in predictions:
        table[prediction.case][prediction.sample] = prediction
    base = table.get(baseline, {})
    scored = [labels[sample] for sample, prediction in sorted(base.items()) if prediction.score is not None]
    return {
        case: _summary_of(
            mine,
            base,
            scored,
            metric,
            seed,
            is_baseline=case == baseline,
            plain=table.get(without_draft.get(case, -1)),
            resized=table.get(with_resize.get(case, -1)),
        )
        for case, mine in sorted(table.items())
    }


def _summary_of(
    predictions: Mapping[int, Prediction],
    baseline: Mapping[int, Prediction],
    scored: Sequence[SampleLabel],
    metric: MetricName | None,
    seed: int,
    *,
    is_baseline: bool,
    plain: Mapping[int, Prediction] | None = None,
    resized: Mapping[int, Prediction] | None = None,
) -> EvaluationSummary:
    """The summary of one case. predictions, baseline: by sample. scored: the samples with a reference answer. plain:
    the predictions of the same case without its draft. resized: those of `resize` at the same budget."""
    fidelity = _fidelity(predictions.values())
    short = sum(prediction.tokens.short for prediction in predictions.values() if prediction.tokens)
    if not scored:
        return EvaluationSummary(0, None, {}, None, None, None, None, fidelity, short)
    mine, theirs = ([column[label.sample] for label in scored] for column in (predictions, baseline))
    scores, base = _scores(mine), _scores(theirs)
    clusters = ["\n".join(label.images) for label in scored]  # questions about the same images
    kinds = [label.kind or "other" for label in scored]
    score, detail, paired = fmean(scores), None, None
    find_retention = partial(mean_retention, base, scores)
    if metric == "yes-no":
        truth = [is_yes(label.answer or "") for label in scored]
        says, base_says = ([says_yes(prediction.answer) for prediction in column] for column in (mine, theirs))
        detail = yes_no(says, truth)
        score = detail.f1
        find_retention = partial(f1_retention, truth, base_says, says)
    elif metric == "mme":
        paired = paired_accuracy(scores, kinds, clusters)
        score = (paired.accuracy + paired.accuracy_plus) / 2
        base_shares, shares = (paired_shares(column, kinds, clusters) for column in (base, scores))
        find_retention = partial(mean_retention, base_shares, shares)
    by_kind = defaultdict(list)
    for kind, value in zip(kinds, scores, strict=True):
        by_kind[kind].append(value)
    return EvaluationSummary(
        samples=len(scored),
        score=score,
        by_kind={kind: (fmean(values), len(values)) for kind, values in sorted(by_kind.items())},
        yes_no=detail,
        paired=paired,
        retention=None if is_baseline else find_retention(clusters, seed=seed),
        flips=None if is_baseline else count_flips(_right(base), _right(scores)),
        fidelity=fidelity,
        short=short,
        draft=None if plain is None else _draft_effect(plain, mine, scored, clusters, metric, seed),
        groups=None if resized is None else resize_groups(base, _scores([resized[s.sample] for s in scored]), scores),
    )


def resize_groups(baseline: Sequence[float], resized: Sequence[float], scores: Sequence[float]) -> ResizeGroups:
    """Correct answers in VTC-Bench's groups (`tools/analyze_results.py` of its repository), from scores of the same
    samples: of the unreduced model, of `resize` at the same budget, and of a method."""
    rows = [(small, mine) for full, small, mine in zip(*map(_right, (baseline, resized, scores)), strict=True) if full]
    group_a, group_b = ([mine for small, mine in rows if small is answered] for answered in (False, True))
    return ResizeGroups(a_right=sum(group_a), a_samples=len(group_a), b_right=sum(group_b), b_samples=len(group_b))


def _draft_effect(
    plain: Mapping[int, Prediction],
    drafted: Sequence[Prediction],
    scored: Sequence[SampleLabel],
    clusters: Sequence[str],
    metric: MetricName | None,
    seed: int,
) -> DraftEffect:
    """What a draft changes, in the mean score. plain: predictions of the case without it. drafted: of the samples."""
    before, after = _scores([plain[label.sample] for label in scored]), _scores(drafted)
    flips = count_flips(_right(before), _right(after))
    counted = DraftEffect(gained=flips.wrong_right, lost=flips.right_wrong)
    if metric in ("yes-no", "mme"):  # whose score is not a mean over samples
        return counted
    found = mean_difference(before, after, clusters, seed=seed)
    bounds = {"low": found.low and 100 * found.low, "high": found.high and 100 * found.high}
    return counted.model_copy(update={"points": 100 * found.value, **bounds})


def unevaluated_cases(store: RunDirectory) -> list[FailedCase]:
    """Cases that were timed and could not be evaluated."""
    return [
        FailedCase(case=store.plan.cases[case].case, round=None, reason=failure.reason, message=failure.message)
        for case, failure in sorted(evaluation_failures(store).items())
    ]


def evaluated_samples(store: RunDirectory) -> int:
    """How many samples were evaluated, without those that could not be read."""
    return sum(len(batch.readable) for batch in evaluated_batches(store))


def left_out(store: RunDirectory) -> list[str]:
    """The parts of the data that could not be used, a line each."""
    unreadable = [item for _, batch in sorted(store.predictions.items()) for item in batch.unreadable]
    return [*store.plan.left_out, *(f"left out: sample {item.sample + 1}: {item.problem}" for item in unreadable)]


def metric_remarks(store: RunDirectory) -> list[str]:
    """Points out answers that are all yes or no and were judged as any others, unless the user wanted that."""
    plan = store.plan
    answers = [label.answer for batch in store.predictions.values() for label in batch.samples if label.answer]
    if plan.metric != "exact" or plan.options.metric or not answers:
        return []
    if any(yes_or_no(answer) is None for answer in answers):
        return []
    return [f"the answers of {plan.data} are yes or no: --metric yes-no judges them as POPE does"]


def mean_retention(
    baseline: Sequence[float], found: Sequence[float], clusters: Sequence[str], *, seed: int
) -> Retention | None:
    """Mean score / mean baseline score, of the same samples in the same order. None where the baseline scores 0.

    clusters: samples of one cluster, such as all questions about an image, have correlated errors and are resampled
    together.
    """
    columns = _by_cluster([baseline, found], clusters)
    return _retention(columns, lambda base, mine: _divide(mine, base), seed)


def mean_difference(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[str], *, seed: int
) -> Retention:
    """Mean score - mean score before, of the same samples in the same order; the interval as in `mean_retention`."""
    columns = _by_cluster([before, after, np.ones(len(before))], clusters)
    found = _retention(columns, lambda old, new, count: (new - old) / count, seed)
    assert found is not None  # a difference is finite
    return found


def f1_retention(
    known: Sequence[bool], baseline: Sequence[bool], found: Sequence[bool], clusters: Sequence[str], *, seed: int
) -> Retention | None:
    """The same for F1, from answers that are yes (True) or no, and the reference answers."""
    truth, base, mine = (np.asarray(values, dtype=float) for values in (known, baseline, found))
    columns = _by_cluster([truth, base, mine, truth * base, truth * mine], clusters)

    def ratio(
        truth: np.ndarray, base: np.ndarray, mine: np.ndarray, base_hits: np.ndarray, my_hits: np.ndarray
    ) -> np.ndarray:
        return _divide(my_hits * (base + truth), base_hits * (mine + truth))

    return _retention(columns, ratio, seed)


def count_flips(baseline: Sequence[bool], found: Sequence[bool]) -> Flips:
    """Compare right (True) and wrong answers to the same samples."""
    from scipy.stats import binomtest

    pairs = list(zip(baseline, found, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return Flips(
        right_right=pairs.count((True, True)),
        right_wrong=lost,
        wrong_right=gained,
        wrong_wrong=pairs.count((False, False)),
        p_value=float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
    )


def _fidelity(predictions: Iterable[Prediction]) -> Fidelity | None:
    """None for answers of a serving engine, which gives no logits."""
    closeness = [prediction.closeness for prediction in predictions]
    divergences = [close.kl for close in closeness if close.kl is not None]
    agreements = [close.top1 for close in closeness if close.top1 is not None]
    if not divergences or not agreements:
        return None
    return Fidelity(kl=fmean(divergences), top1=fmean(agreements), same=fmean(close.same for close in closeness))


def _scores(predictions: Sequence[Prediction]) -> list[float]:
    return [prediction.score for prediction in predictions if prediction.score is not None]


def _right(scores: Sequence[float]) -> list[bool]:
    return [score >= RIGHT for score in scores]


def _whole(value: float) -> int | float:
    """A sum of scores, as a whole number where it is one except for rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 else value


def _by_cluster(columns: Sequence[Sequence[float] | np.ndarray], clusters: Sequence[str]) -> list[np.ndarray]:
    """Sums over each cluster: ratios of means are ratios of such sums."""
    _, members = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return [np.bincount(members, weights=np.asarray(column, dtype=float)) for column in columns]


def _retention(columns: list[np.ndarray], ratio: Ratio, seed: int) -> Retention | None:
    """The ratio of column sums, and its interval by the percentile bootstrap over clusters.

    There is no interval where the samples do not determine its width: with one cluster, where every resample gives the
    same ratio (no answer changed, or all are wrong), and where the baseline scores 0 in so many that a bound is
    infinite.
    """
    from scipy.stats import bootstrap

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return ratio(*(column.sum(axis=axis) for column in drawn))

    value = float(statistic(*columns))
    if not np.isfinite(value):
        return None
    if len(columns[0]) < 2:
        return Retention(value, None, None)
    with np.errstate(invalid="ignore"):  # percentiles between a finite and an infinite ratio
        found = bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=RESAMPLES,
            batch=max(1, CELLS // len(columns[0])),
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    if not (np.isfinite(low) and np.isfinite(high)) or low == high:
        return Retention(value, None, None)
    return Retention(value, low, high)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio, infinite where the denominator is 0: a resample in which the baseline scores 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full_like(above, np.inf), where=below > 0)
