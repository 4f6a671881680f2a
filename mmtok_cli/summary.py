"""The summary of a run: times and memory of its complete rounds, and the quality of all predictions so far."""

from __future__ import annotations

from mmtok_cli.evaluation.metrics import METRICS
from mmtok_cli.evaluation.summary import (
    evaluated_samples,
    left_out,
    metric_remarks,
    summarise_evaluation,
    summarise_tasks,
    task_remarks,
    unevaluated_cases,
)
from mmtok_cli.precision import precision_remarks
from mmtok_cli.results.progress import is_finished, require_flops, whole_rounds
from mmtok_cli.results.records import TimedRun
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import CaseResult, Comparison, FailedCase, Schedule, equivalents_of
from mmtok_cli.stages import DECODE_VIDEO
from mmtok_cli.timing.summary import summarise_case, summarise_machine, with_slowdown
from mmtok_cli.turns import failed_conversations, held_conversations, left_out_conversations, summarise_turns


def summarise_run(store: RunDirectory) -> Comparison:
    """Everything that is known of a run, from its directory alone. Raises MMTokError where FLOPs are missing."""
    plan = store.plan
    require_flops(store)
    rounds = whole_rounds(store)
    columns = [[run for i in rounds if (run := store.runs.get((i, case)))] for case in range(len(plan.cases))]
    return Comparison(
        model=plan.model,
        rules=plan.rules,
        environment=plan.environment,
        schedule=_schedule(store, rounds, columns),
        interrupted=not is_finished(store),
        results=_results(store, columns),
        failures=[
            FailedCase(case=plan.cases[case].case, round=failure.round, reason=failure.reason, message=failure.message)
            for case, failure in sorted(store.failures.items())
        ],
        planned_rounds=plan.rounds,
        run_directory=str(store.path),
        unevaluated=unevaluated_cases(store),
        turns=summarise_turns(store),
        tasks=summarise_tasks(store),
        left_out=[*left_out(store), *left_out_conversations(store)],
        remarks=[
            *metric_remarks(store),
            *task_remarks(store),
            *failed_conversations(store),
            *precision_remarks(store),
        ],
        machine=summarise_machine([_measured(store, i) for i in rounds]),
        equivalents=equivalents_of([planned.case for planned in plan.cases]),
    )


def _measured(store: RunDirectory, number: int) -> list[TimedRun]:
    """The runs of one round, without those of cases that failed later."""
    return [run for (i, case), run in store.runs.items() if i == number and case not in store.failures]


def _results(store: RunDirectory, columns: list[list[TimedRun]]) -> list[CaseResult]:
    """Results of the cases that did not fail. columns: the runs of each case."""
    plan = store.plan
    summaries, exact = summarise_evaluation(store), plan.options.new_tokens is not None
    results = []
    for number, runs in enumerate(columns):
        if not runs or number in store.failures:
            continue
        first = plan.baseline_of(number)
        baseline = None if first == number or first in store.failures else columns[first]
        counted = store.counted[number]
        result = summarise_case(
            plan.cases[number].case,
            runs,
            baseline,
            counted.flops,
            counted.coverage,
            reserved=counted.reserved,
            exact_length=exact,
        )
        result = result.model_copy(update={"largest_batch": counted.largest_batch})
        if number in summaries:
            result = result.model_copy(update=summaries[number].result_fields(is_baseline=first == number))
        if (plain := plan.without_draft.get(number)) is not None and plain not in store.failures:
            result = with_slowdown(result, runs, columns[plain])
        results.append(result)
    return results


def _schedule(store: RunDirectory, rounds: list[int], columns: list[list[TimedRun]]) -> Schedule:
    plan = store.plan
    sizes = list(dict.fromkeys(planned.case.batch_size for planned in plan.cases))
    batches = {
        (planned.case.batch_size, run.batch) for planned, runs in zip(plan.cases, columns, strict=True) for run in runs
    }
    timed = max(size * sum(1 for other, _ in batches if other == size) for size in sizes)
    videos = any(DECODE_VIDEO in run.seconds for runs in columns for run in runs)
    return Schedule(
        data=plan.data,
        seed=plan.seed,
        max_new_tokens=plan.max_new_tokens,
        samples=evaluated_samples(store) or timed,
        batch_size=sizes[0] if len(sizes) == 1 else sizes,
        rounds=len(rounds),
        warmup=plan.warmup,
        order=plan.rotation().first(len(rounds)),
        runs=plan.runs,
        min_time=plan.min_time,
        data_digest=plan.data_digest,
        planned_samples=plan.samples,
        timed=timed,
        metric=plan.metric,
        new_tokens=plan.options.new_tokens,
        prompt_tokens=plan.options.prompt_tokens,
        metric_title=METRICS[plan.metric].title if plan.metric else None,
        conversations=len(held_conversations(store)) if plan.options.turns else None,
        sampling=plan.options.sampling.described if videos else None,
    )
