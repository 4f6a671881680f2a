"""The summary of the conversations of a run: what each turn costs, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mmtok_cli.evaluation.summary import mean_retention
from mmtok_cli.results.progress import ConversationCase, conversation_failures, conversing_cases
from mmtok_cli.results.records import ConversationRecord, TurnRun
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schema import Tokens, TurnResult
from mmtok_cli.timing.statistics import paired_speedup, summarise
from mmtok_cli.timing.summary import mean_encoded

COMPARED = ("prefill", "ttft", "total")  # stages with a speedup

Talk = list[TurnRun]  # the turns of one conversation that count


def summarise_turns(store: RunDirectory) -> list[TurnResult]:
    """For each case and policy its turns, one by one and all together, over the conversations with all cases."""
    cases = conversing_cases(store)
    whole = [record for record in held_conversations(store) if set(cases) <= record.by_case.keys()]
    if not cases or not whole:
        return []
    longest = max(len(record.runs[0].turns) for record in whole)
    return [_summary(store, whole, case, cases[0], turn) for case in cases for turn in (*range(1, longest + 1), None)]


def held_conversations(store: RunDirectory) -> list[ConversationRecord]:
    """The conversations that were not left out."""
    return [record for _, record in sorted(store.conversations.items()) if record.problem is None]


def left_out_conversations(store: RunDirectory) -> list[str]:
    """The conversations that were left out, a line each, but for those whose first question was."""
    unreadable = {item.sample for batch in store.predictions.values() for item in batch.unreadable}
    return [
        f"left out: conversation {number + 1}: {record.problem}"
        for number, record in sorted(store.conversations.items())
        if record.problem is not None and number not in unreadable
    ]


def failed_conversations(store: RunDirectory) -> list[str]:
    """The cases that failed in a conversation, a line each."""
    lines = []
    for (case, policy), failure in sorted(conversation_failures(store).items(), key=lambda item: item[0][0]):
        name = f"{store.plan.cases[case].case}{f' with --turns {policy}' if policy else ''}"
        where = f"; the traceback is in {store.path}/conversations" if failure.traceback else ""
        lines.append(f"{name} failed in a conversation and has no turns: {failure.reason}: {failure.message}{where}")
    return lines


def _summary(
    store: RunDirectory,
    records: Sequence[ConversationRecord],
    case: ConversationCase,
    baseline: ConversationCase,
    turn: int | None,
) -> TurnResult:
    """One turn, or all of them, in the conversations that have it."""
    having = [record for record in records if turn is None or len(record.runs[0].turns) >= turn]
    mine, theirs = (_talks(having, which, turn) for which in (case, baseline))
    images = ["\n".join(record.images) for record in having]
    last = [talk[-1] for talk in mine]
    seconds, before = _seconds(mine), _seconds(theirs)
    is_baseline = case == baseline
    scores, base, clusters = _scores(mine, theirs, images)
    retention = None if is_baseline or not scores else mean_retention(base, scores, clusters, seed=store.plan.seed)
    pairs = [
        (a.answer, b.answer) for one, other in zip(mine, theirs, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return TurnResult(
        case=store.plan.cases[case[0]].case.model_copy(update={"batch_size": 1}),
        policy=case[1],
        turn=turn,
        conversations=len(having),
        tokens=Tokens(
            total=fmean(run.tokens.total for run in last),
            kept=fmean(run.tokens.kept for run in last),
            text=fmean(run.tokens.text for run in last),
            layer_average=fmean(run.tokens.layer_average for run in last),
            new=fmean(sum(run.steps for run in talk) for talk in mine),
            encoded=mean_encoded([run.tokens for run in last]),
        ),
        seconds={stage: summarise(values) for stage, values in seconds.items()},
        speedup={}
        if is_baseline
        else {stage: paired_speedup(before[stage], seconds[stage]) for stage in COMPARED if min(seconds[stage]) > 0},
        kv_cache=fmean(run.kv_cache for run in last),
        encoder_outputs=fmean(run.encoder_outputs for run in last),
        score=fmean(scores) if scores else None,
        retention=retention.value if retention else None,
        retention_low=retention.low if retention else None,
        retention_high=retention.high if retention else None,
        same=None if is_baseline else fmean(a == b for a, b in pairs),
    )


def _talks(records: Sequence[ConversationRecord], case: ConversationCase, turn: int | None) -> list[Talk]:
    runs = [record.by_case[case].turns for record in records]
    return runs if turn is None else [turns[turn - 1 : turn] for turns in runs]


def _seconds(talks: Sequence[Talk]) -> dict[str, list[float]]:
    """Seconds of each conversation, by stage."""
    return {stage: [sum(run.seconds[stage] for run in talk) for talk in talks] for stage in talks[0][0].seconds}


def _scores(
    mine: Sequence[Talk], theirs: Sequence[Talk], images: Sequence[str]
) -> tuple[list[float], list[float], list[str]]:
    """The scores of all questions with reference answers, the baseline's, and the images that they are about."""
    rows = [
        (one.score, other.score, name)
        for talk, base, name in zip(mine, theirs, images, strict=True)
        for one, other in zip(talk, base, strict=True)
        if one.score is not None and other.score is not None
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
