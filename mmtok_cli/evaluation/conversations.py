"""Conversations of a dataset with all cases, one at a time, each written to the run directory as soon as it is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmtok_cli.cases import Case, failure_of, release_memory
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample, batches
from mmtok_cli.errors import MethodFaultError, MMTokError
from mmtok_cli.evaluation.metrics import score_of
from mmtok_cli.evaluation.processes import Processes
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.progress import ConversationCase, RemainingConversations
from mmtok_cli.results.records import ConversationFailure, ConversationRecord, ConversationRun, TurnRun
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.rules import TurnPolicy

Hold = Callable[[Case, TurnPolicy, Sample], list[TurnRun]]


def hold_conversations(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    remaining: RemainingConversations | None,
    hold: Hold,
    *,
    processes: Processes,
    store: RunDirectory | None,
    seed: int,
) -> Iterator[int]:
    """Hold the remaining conversations with all cases; yields the number done in each step of all processes.

    hold: runs one conversation with a case. As in `predictions.evaluate`: remaining and store are those of the writer,
    and a case that fails takes no part in later steps; after a failure of the baseline nothing does. Within a
    conversation, cases run in random order. One conversation is held before the first, to warm up.
    """
    (agreed,) = processes.tell([remaining])
    if agreed is None:
        return
    left, warm = list(agreed.cases), False
    for step in batches(agreed.samples, processes.count):
        done, interrupted = [], False
        try:
            for number in step[processes.index : processes.index + 1]:
                order = [left[place] for place in np.random.default_rng((seed, number)).permutation(len(left))]
                for _ in range(1 if warm else 2):
                    record = _record(model, cases, dataset, number, order, hold)
                warm = True
                done.append(record.model_copy(update={"key": agreed.key}))
        except KeyboardInterrupt:
            interrupted = True
        parts = processes.gather([(done, interrupted)])
        found = [record for records, _ in parts for record in records]
        for record in found:
            if store is not None:
                store.add_conversation(record)
        yield len(found)
        if any(stopped for _, stopped in parts):
            raise KeyboardInterrupt
        failed = {(failure.case, failure.policy) for record in found for failure in record.failures}
        if agreed.cases[0] in failed:
            return
        left = [case for case in left if case not in failed]


def _record(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    number: int,
    order: Sequence[ConversationCase],
    hold: Hold,
) -> ConversationRecord:
    """One conversation with the cases, or why it is left out of all of them: one case refuses it."""
    closed = dataset.samples[number]
    runs, failures, problem = [], [], None
    try:
        sample = closed.open()
        for place, policy in order:
            found = _attempt(model, cases[place], place, policy, sample, hold)
            if isinstance(found, ConversationFailure):
                failures.append(found)
            else:
                runs.append(_scored(found, sample, dataset))
    except MMTokError as error:
        runs, problem = [], error.message
    return ConversationRecord(
        conversation=number, key="", images=closed.image_ids, runs=runs, problem=problem, failures=failures
    )


def _attempt(
    model: VisionLanguageModel, case: Case, place: int, policy: TurnPolicy | None, sample: Sample, hold: Hold
) -> ConversationRun | ConversationFailure:
    """The conversation with one case, or its failure. Raises MMTokError for a sample that it refuses."""
    try:
        return ConversationRun(case=place, policy=policy, turns=hold(case, policy or "reuse", sample))
    except MMTokError as error:
        if not isinstance(error, MethodFaultError):
            raise MMTokError(f"{case}: {error.message}", error.hint) from error
        failure = ConversationFailure(case=place, policy=policy, **failure_of(error))
    except Exception as error:
        failure = ConversationFailure(case=place, policy=policy, **failure_of(error))
    release_memory(model.device)  # only here, since the error holds on to the memory of the failed run
    return failure


def _scored(run: ConversationRun, sample: Sample, dataset: Dataset) -> ConversationRun:
    metric = dataset.metric
    if metric is None:
        return run
    turns = [
        turn.model_copy(update={"score": score_of(asked, turn.answer, metric)})
        for turn, asked in zip(run.turns, sample.turns, strict=True)
    ]
    return run.model_copy(update={"turns": turns})
