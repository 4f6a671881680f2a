"""How far a run is: which rounds are complete, and what is left to be timed and evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from mmtok_cli.errors import MMTokError
from mmtok_cli.results.records import CaseFailure, ConversationFailure, PredictionBatch
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.rules import TurnPolicy

ConversationCase = tuple[int, TurnPolicy | None]  # number in the plan, policy


@dataclass(frozen=True)
class Remaining:
    """What is left to be evaluated. cases: numbers in the plan, the baseline first. batches: numbers of batches.

    key: of the run, which its records carry.
    """

    batch_size: int
    cases: list[int]
    batches: list[int]
    key: str = ""


@dataclass(frozen=True)
class RemainingConversations:
    """What is left of the conversations. cases: numbers in the plan and policies. samples: their numbers."""

    cases: list[ConversationCase]
    samples: list[int]
    key: str = ""


def whole_rounds(store: RunDirectory) -> list[int]:
    """The rounds, from the first on, in which every case that has a turn was measured. None are where the FLOPs of a
    case are missing."""
    plan = store.plan
    whole: list[int] = []
    most = max((number for number, _ in store.runs), default=-1) + 1
    for number, turns in enumerate(islice(plan.rotation().turns(), most)):
        for turn in turns:
            if turn.case in store.failures:
                continue
            if (number, turn.case) not in store.runs or turn.case not in store.counted:
                return whole
        whole.append(number)
    return whole


def require_flops(store: RunDirectory) -> None:
    """Raises MMTokError where a case was timed and its FLOPs, which are counted before, are missing."""
    missing = {case for _, case in store.runs} - store.counted.keys() - store.failures.keys()
    if missing:
        raise MMTokError(
            f"{store.path / 'cases' / f'{min(missing):03d}.json'} is missing",
            f"count them again with: mmtok compare --run-dir {store.path} --resume",
        )


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
    return is_timed(store) and is_evaluated(store) and left_to_converse(store) is None


def is_evaluated(store: RunDirectory) -> bool:
    """Whether nothing is left to be evaluated.

    Without a baseline there is nothing to compare with, and no case is evaluated.
    """
    size, cases = evaluated_cases(store)
    if not store.plan.quality or not cases or cases[0] in evaluation_failures(store):
        return True
    return len(evaluated_batches(store)) == -(-store.plan.samples // size)


def left_to_evaluate(store: RunDirectory) -> Remaining | None:
    """The cases and batches of the plan without predictions in the directory; None where there are none.

    Batches have the largest size at which the baseline could be timed. Cases that failed at that size are not
    evaluated, nor are those that failed during evaluation.
    """
    if is_evaluated(store):
        return None
    size, cases = evaluated_cases(store)
    failed = evaluation_failures(store)
    done = {batch.batch for batch in evaluated_batches(store)}
    left = [number for number in range(-(-store.plan.samples // size)) if number not in done]
    return Remaining(size, [case for case in cases if case not in failed], left, store.key)


def evaluated_batches(store: RunDirectory) -> list[PredictionBatch]:
    """The batches with predictions of all cases that take part in the evaluation and did not fail in it."""
    size, cases = evaluated_cases(store)
    failed = evaluation_failures(store)
    expected = [case for case in cases if case not in failed]
    return [
        batch
        for _, batch in sorted(store.predictions.items())
        if batch.batch_size == size and all(batch.predicted_by(case) == batch.readable for case in expected)
    ]


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


def left_to_converse(store: RunDirectory) -> RemainingConversations | None:
    """The conversations of the plan that are not in the directory; None where there are none, or no baseline."""
    cases = conversing_cases(store)
    left = [number for number in range(store.plan.samples) if number not in store.conversations]
    return RemainingConversations(cases, left, store.key) if cases and left else None


def conversing_cases(store: RunDirectory) -> list[ConversationCase]:
    """The cases that can be compared in conversations, the baseline first; none without a baseline."""
    planned, failed = store.plan.conversation_cases, conversation_failures(store)
    if not planned or planned[0] in failed or planned[0][0] in store.failures:
        return []
    return [each for each in planned if each not in failed and each[0] not in store.failures]


def conversation_failures(store: RunDirectory) -> dict[ConversationCase, ConversationFailure]:
    """The first failure of each case that failed in a conversation, by its number and policy."""
    found: dict[ConversationCase, ConversationFailure] = {}
    for _, record in sorted(store.conversations.items()):
        for failure in record.failures:
            found.setdefault((failure.case, failure.policy), failure)
    return found
