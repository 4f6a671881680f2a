"""The quality half of a comparison: what is left of it is asked, by all processes, and written down batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.evaluation.predictions import Outcome, Refusal, Unread
from mmtok_cli.evaluation.processes import Found, Processes, ask_all
from mmtok_cli.evaluation.records import AskedBatch, refusals_of, subjects_of
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.timing.runner import Case


@dataclass(frozen=True)
class Questions:
    """What is left to be asked. cases: places in the plan, the baseline first. batches: numbers of batches."""

    batch_size: int
    cases: list[int]
    batches: list[int]


def questions_left(store: RunDirectory) -> Questions | None:
    """What the plan asks for and the directory does not hold; None for nothing.

    Batches are of the largest size at which the baseline could be timed. Cases that failed at that size, or were
    refused an answer, are not asked; without a baseline nobody is.
    """
    size, cases = asked_cases(store)
    refused = refusals_of(store.asked.values())
    if not store.plan.quality or not cases or cases[0] in refused:
        return None
    done = {batch.batch for batch in store.asked.values() if batch.batch_size == size}
    left = [number for number in range(-(-store.plan.samples // size)) if number not in done]
    return Questions(size, [case for case in cases if case not in refused], left) if left else None


def asked_cases(store: RunDirectory) -> tuple[int, list[int]]:
    """The size of the batches that are asked, and the cases that are, the baseline first; 0 and none if nobody is."""
    plan = store.plan
    for size in sorted({planned.case.batch_size for planned in plan.cases}, reverse=True):
        cases = [i for i, planned in enumerate(plan.cases) if planned.case.batch_size == size]
        if cases[0] not in store.failures:
            return size, [case for case in cases if case not in store.failures]
    return 0, []


def ask_questions(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    questions: Questions | None,
    *,
    processes: Processes,
    store: RunDirectory | None,
    max_new_tokens: int,
) -> Iterator[int]:
    """Ask what is left; yields the number of samples done after each step of all processes.

    questions and store: the writer's; the other processes are told what is left, and write nothing. cases: all of the
    plan. Raises NotWrittenError, in the writer alone, and KeyboardInterrupt in all when one was interrupted.
    """
    (agreed,) = processes.tell([questions])
    if agreed is None:
        return
    asked = ask_all(
        model,
        [cases[case] for case in agreed.cases],
        dataset,
        processes=processes,
        batch_size=agreed.batch_size,
        max_new_tokens=max_new_tokens,
        only=agreed.batches,
    )
    for found in asked:
        for batch in found:
            if store is not None:
                store.keep(_record(batch, agreed, dataset, store))
        yield sum(len(batch.numbers) for batch in found)


def _record(found: Found, questions: Questions, dataset: Dataset, store: RunDirectory) -> AskedBatch:
    places = questions.cases
    return AskedBatch(
        batch=found.batch,
        batch_size=questions.batch_size,
        key=store.key,
        subjects=subjects_of(dataset, found.numbers),
        outcomes=[replace(item, case=places[item.case]) for item in found.items if isinstance(item, Outcome)],
        unread=[item for item in found.items if isinstance(item, Unread)],
        refusals=[replace(item, case=places[item.case]) for item in found.items if isinstance(item, Refusal)],
    )
