"""How far a run is: which rounds are complete, and what is left to be timed and evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from mmtok_cli.results.records import CaseFailure
from mmtok_cli.results.run_directory import RunDirectory


@dataclass(frozen=True)
class Remaining:
    """What is left to be evaluated. cases: numbers in the plan, the baseline first. batches: numbers of batches.

    key: of the run, which its records carry.
    """

    batch_size: int
    cases: list[int]
    batches: list[int]
    key: str = ""


def whole_rounds(store: RunDirectory) -> list[int]:
    """The rounds, from the first on, in which every case that has a turn was measured."""
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


def is_timed(store: RunDirectory) -> bool:
    """Whether nothing is left to be timed."""
    if not all(case in store.counted or case in store.failures for case in range(len(store.plan.cases))):
        return False
    if len(store.failures) == len(store.plan.cases):
        return True
    measured = sum(sum(run.repetitions["total"]) for run in store.runs.values())
    return len(whole_rounds(store)) >= store.plan.rounds and measured >= (store.plan.min_time or 0.0)


def is_finished(store: RunDirectory) -> bool:
    """Whether nothing is left to be timed or evaluated."""
    return is_timed(store) and left_to_evaluate(store) is None


def left_to_evaluate(store: RunDirectory) -> Remaining | None:
    """The cases and batches of the plan without predictions in the directory; None where there are none.

    Batches have the largest size at which the baseline could be timed. Cases that failed at that size are not
    evaluated, nor are those that failed during evaluation. Without a baseline there is nothing to compare with, and
    no case is evaluated.
    """
    size, cases = evaluated_cases(store)
    failed = evaluation_failures(store)
    if not store.plan.quality or not cases or cases[0] in failed:
        return None
    done = {batch.batch for batch in store.predictions.values() if batch.batch_size == size}
    left = [number for number in range(-(-store.plan.samples // size)) if number not in done]
    return Remaining(size, [case for case in cases if case not in failed], left, store.key) if left else None


def evaluated_cases(store: RunDirectory) -> tuple[int, list[int]]:
    """The batch size of the evaluation and the cases that take part, the baseline first; 0 and none without one."""
    plan = store.plan
    for size in sorted({planned.case.batch_size for planned in plan.cases}, reverse=True):
        cases = [i for i, planned in enumerate(plan.cases) if planned.case.batch_size == size]
        if cases[0] not in store.failures:
            return size, [case for case in cases if case not in store.failures]
    return 0, []


def evaluation_failures(store: RunDirectory) -> dict[int, CaseFailure]:
    """The first failure of each case that failed during evaluation, by the case's number."""
    found: dict[int, CaseFailure] = {}
    for _, batch in sorted(store.predictions.items()):
        for failure in batch.failures:
            found.setdefault(failure.case, failure)
    return found
