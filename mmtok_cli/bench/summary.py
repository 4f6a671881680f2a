"""From the runs of all rounds to one result for each case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median

from mmtok_cli.bench.results import CaseResult, Fidelity, Memory, Score, Tokens
from mmtok_cli.bench.runner import Case, Run
from mmtok_cli.bench.statistics import paired_speedup, summarise


def summarise_cases(
    cases: Sequence[Case], rounds: Sequence[Sequence[Run]], flops: Sequence[Mapping[str, float]]
) -> list[CaseResult]:
    """Results of all cases; the first is the baseline of speedup and retention.

    rounds: for each round the runs of all cases, in the order of cases. flops: for each case, by stage.
    """
    columns = [[runs[i] for runs in rounds] for i in range(len(cases))]
    baseline = _score(_first_of_each_batch(columns[0]))
    results = []
    for i, (case, runs) in enumerate(zip(cases, columns, strict=True)):
        once = _first_of_each_batch(runs)
        score = _score(once)
        seconds = {stage: [run.seconds[stage] for run in runs] for stage in runs[0].seconds}
        counts = [tokens for run in once for tokens in run.tokens]
        results.append(
            CaseResult(
                method=case.name,
                parameters=asdict(case.method),
                budget=None if case.budget is None else str(case.budget),
                positions=runs[0].positions,
                tokens=Tokens(
                    total=fmean(c.total for c in counts),
                    kept=fmean(c.kept for c in counts),
                    text=fmean(c.text for c in counts),
                    layer_average=fmean(c.layer_average for c in counts),
                    new=fmean(run.steps for run in once),
                ),
                seconds={stage: summarise(values) for stage, values in seconds.items()},
                speedup={
                    stage: paired_speedup([run.seconds[stage] for run in columns[0]], values)
                    for stage, values in seconds.items()
                    if i > 0 and min(values) > 0
                },
                overhead=median(map(_overhead, runs)),
                memory=Memory(
                    peak=max((run.peak for run in runs if run.peak is not None), default=None),
                    kv_cache=int(fmean(run.kv_cache / len(run.samples) for run in once)),
                    host=max(run.host for run in runs),
                ),
                flops=dict(flops[i]),
                score=score.share if score else None,
                score_counts=score,
                retention=score.share / baseline.share if i > 0 and score and baseline and baseline.right else None,
                fidelity=_fidelity(once) if i > 0 else None,
            )
        )
    return results


def _first_of_each_batch(runs: Sequence[Run]) -> list[Run]:
    """Answers do not change from round to round, so each sample counts once however often it was timed."""
    return list({id(run.samples[0]): run for run in reversed(runs)}.values())[::-1]


def _overhead(run: Run) -> float:
    """What choosing tokens costs, as a share of the work that it is to save."""
    return run.seconds["select"] / (run.seconds["encode"] + run.seconds["prefill"])


def _score(runs: Sequence[Run]) -> Score | None:
    right: list[bool] = []
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for run in runs:
        for sample, answer in zip(run.samples, run.answers, strict=True):
            if sample.answer is not None:
                right.append(sample.is_right(answer))
                by_kind[sample.kind or "other"].append(right[-1])
    if not right:
        return None
    return Score(
        right=sum(right),
        asked=len(right),
        by_kind={kind: (sum(values), len(values)) for kind, values in sorted(by_kind.items())},
    )


def _fidelity(runs: Sequence[Run]) -> Fidelity:
    return Fidelity(kl=fmean(kl for run in runs for kl in run.kl), top1=fmean(t for run in runs for t in run.top1))
