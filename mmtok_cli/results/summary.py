"""From the records of all rounds to one result for each case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import Any

from mmtok_cli.evaluation.outcomes import (
    asked_samples,
    identity,
    left_out,
    qualities,
    result_fields,
    unasked,
)
from mmtok_cli.evaluation.remaining import questions_left
from mmtok_cli.results.records import Run
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import (
    CaseId,
    CaseResult,
    Comparison,
    FailedCase,
    Fidelity,
    FlopCoverage,
    Memory,
    Schedule,
    Score,
    Tokens,
)
from mmtok_cli.timing.gpu import summarise_states
from mmtok_cli.timing.runner import Case
from mmtok_cli.timing.statistics import drift, outliers, paired_speedup, summarise


def summarise_run(store: RunDirectory) -> Comparison:
    """The result of what a directory holds: times of its whole rounds, quality of all samples that were asked.

    Nothing else is needed for it.
    """
    plan = store.plan
    rounds = whole_rounds(store)
    columns = [[run for i in rounds if (run := store.runs.get((i, case)))] for case in range(len(plan.cases))]
    found = qualities(store)
    results = []
    for i, runs in enumerate(columns):
        if runs and i not in store.failures:
            first = plan.baseline_of(i)
            baseline = None if first in store.failures else columns[first]
            counted = store.counted[i]
            column = Column(plan.cases[i].case, runs, None if first == i else baseline, counted.flops, counted.coverage)
            said = result_fields(found.get(identity(plan.cases[i].case)), is_baseline=first == i)
            results.append(column.result().model_copy(update=said))
    sizes = list(dict.fromkeys(planned.case.batch_size for planned in plan.cases))
    asked = {
        (planned.case.batch_size, run.batch) for planned, runs in zip(plan.cases, columns, strict=True) for run in runs
    }
    timed = max(size * sum(1 for other, _ in asked if other == size) for size in sizes)
    return Comparison(
        model=plan.model,
        rules=plan.rules,
        environment=plan.environment,
        schedule=Schedule(
            data=plan.data,
            seed=plan.seed,
            max_new_tokens=plan.max_new_tokens,
            samples=asked_samples(store) or timed,
            batch_size=sizes[0] if len(sizes) == 1 else sizes,
            rounds=len(rounds),
            warmup=plan.warmup,
            order=plan.rotation().first(len(rounds)),
            runs=plan.runs,
            min_time=plan.min_time,
            data_digest=plan.data_digest,
            planned_samples=plan.samples,
            timed=timed,
        ),
        interrupted=not is_finished(store),
        results=results,
        failures=[
            FailedCase(case=plan.cases[failure.case].case, **failure.model_dump(include={"round", "reason", "message"}))
            for _, failure in sorted(store.failures.items())
        ],
        planned_rounds=plan.rounds,
        run_directory=str(store.path),
        unasked=unasked(store),
        left_out=left_out(store),
    )


def whole_rounds(store: RunDirectory) -> list[int]:
    """The rounds, from the first on, in which every case that has its turn was measured."""
    plan = store.plan
    whole: list[int] = []
    most = max((number for number, _ in store.runs), default=-1) + 1
    for number, turns in enumerate(islice(plan.rotation().turns(), most)):
        for turn in turns:
            if turn.case in store.failures:
                continue
            if (number, turn.case) not in store.runs:
                return whole
        whole.append(number)
    return whole


def is_finished(store: RunDirectory) -> bool:
    """Whether nothing is left to be measured or asked."""
    return is_timed(store) and questions_left(store) is None


def is_timed(store: RunDirectory) -> bool:
    """Whether nothing is left to be timed."""
    if not all(case in store.counted or case in store.failures for case in range(len(store.plan.cases))):
        return False
    if len(store.failures) == len(store.plan.cases):
        return True
    measured = sum(sum(run.repetitions["total"]) for run in store.runs.values())
    return len(whole_rounds(store)) >= store.plan.rounds and measured >= (store.plan.min_time or 0.0)


def summarise_cases(
    cases: Sequence[Case], rounds: Sequence[Sequence[Run]], flops: Sequence[Mapping[str, float]]
) -> list[CaseResult]:
    """Results of cases that all ran in each round; the first is the baseline of speedup and retention.

    rounds: for each round the runs of all cases, in the order of cases. flops: for each case, by stage.
    """
    columns = [[runs[i] for runs in rounds] for i in range(len(cases))]
    return [
        Column(case.id, columns[i], columns[0] if i else None, flops[i])
        .result()
        .model_copy(update=_answered(columns[i], columns[0] if i else None))
        for i, case in enumerate(cases)
    ]


def _answered(runs: Sequence[Run], baseline: Sequence[Run] | None) -> dict[str, Any]:
    """What the answers that were timed are worth, each sample counting once."""
    once = _first_of_each_batch(runs)
    score, before = _score(once), _score(_first_of_each_batch(baseline)) if baseline else None
    return {
        "score": score.share if score else None,
        "score_counts": score,
        "retention": score.share / before.share if score and before and before.right else None,
        "fidelity": _fidelity(once) if baseline else None,
    }


@dataclass(frozen=True)
class Column:
    """All runs of one case, and those of the baseline in the same rounds; None for the baseline itself or for none."""

    case: CaseId
    runs: Sequence[Run]
    baseline: Sequence[Run] | None
    flops: Mapping[str, float]
    coverage: FlopCoverage | None = None

    def result(self) -> CaseResult:
        case, runs = self.case, self.runs
        once = _first_of_each_batch(runs)
        seconds = {stage: [run.seconds[stage] for run in runs] for stage in runs[0].seconds}
        repeated = any(len(run.repetitions["total"]) > 1 for run in runs)
        counts = [tokens for run in once for tokens in run.tokens]
        return CaseResult(
            case=case,
            positions=runs[0].positions,
            tokens=Tokens(
                total=fmean(c.total for c in counts),
                kept=fmean(c.kept for c in counts),
                text=fmean(c.text for c in counts),
                layer_average=fmean(c.layer_average for c in counts),
                new=fmean(run.steps for run in once),
            ),
            seconds={
                stage: summarise(values, [run.repetitions[stage] for run in runs] if repeated else ())
                for stage, values in seconds.items()
            },
            speedup={
                stage: paired_speedup(before, values)
                for stage, values in seconds.items()
                if (before := [run.seconds[stage] for run in self.baseline or ()]) and min(*before, *values) > 0
            },
            overhead=median(map(_overhead, runs)),
            decode_tokens_per_second=_decode_speed(runs),
            memory=Memory(
                peak=_most(run.peak for run in runs),
                kv_cache=int(fmean(run.kv_cache / len(run.samples) for run in once)),
                host=max(run.host for run in runs),
                reserved=_most(run.reserved for run in runs),
            ),
            flops=dict(self.flops),
            flop_coverage=self.coverage,
            gpu=summarise_states([run.gpu for run in runs if run.gpu], case.batch_size),
            outliers=outliers(seconds["ttft"]),
            drift=drift(seconds["ttft"]),
        )


def _first_of_each_batch(runs: Sequence[Run]) -> list[Run]:
    """Answers do not change from round to round, so each sample counts once however often it was timed."""
    return list({run.batch: run for run in reversed(runs)}.values())[::-1]


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _overhead(run: Run) -> float:
    """What choosing tokens costs, as a share of the work that it is to save."""
    return run.seconds["select"] / (run.seconds["encode"] + run.seconds["prefill"])


def _decode_speed(runs: Sequence[Run]) -> float | None:
    """Tokens per second of a sequence while decoding; the first token comes from prefill."""
    speeds = [(run.steps - 1) / run.seconds["decode"] for run in runs if run.steps > 1 and run.seconds["decode"] > 0]
    return median(speeds) if speeds else None


def _score(runs: Sequence[Run]) -> Score | None:
    right: list[bool] = []
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for run in runs:
        for is_right, kind in zip(run.right, run.kinds, strict=True):
            if is_right is not None:
                right.append(is_right)
                by_kind[kind or "other"].append(is_right)
    if not right:
        return None
    return Score(
        right=sum(right),
        asked=len(right),
        by_kind={kind: (sum(values), len(values)) for kind, values in sorted(by_kind.items())},
    )


def _fidelity(runs: Sequence[Run]) -> Fidelity:
    return Fidelity(kl=fmean(kl for run in runs for kl in run.kl), top1=fmean(t for run in runs for t in run.top1))
