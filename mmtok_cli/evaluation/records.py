"""What is written down of the quality half of a comparison: one record for each batch of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmtok_cli.data.datasets import Dataset, Metric
from mmtok_cli.data.samples import Sample
from mmtok_cli.evaluation.predictions import Outcome, Refusal, Unread
from mmtok_cli.results.schema import Record


class Subject(Record):
    """What a verdict has to know of a sample, the number-th of its dataset: its images' names, and what is right."""

    number: int
    images: tuple[str, ...]
    answer: str | None
    kind: str | None


class AskedBatch(Record):
    """What all cases said to one batch of samples.

    key: a digest of the plan's cases. Cases in outcomes and refusals are places in the plan.
    """

    batch: int
    batch_size: int
    key: str
    subjects: list[Subject]
    outcomes: list[Outcome]
    unread: list[Unread]
    refusals: list[Refusal]


def subjects_of(dataset: Dataset, numbers: Iterable[int]) -> list[Subject]:
    """The samples of these numbers, without their images."""
    return [
        Subject(number=number, images=sample.image_ids, answer=sample.answer, kind=sample.kind)
        for number in numbers
        for sample in [dataset.samples[number]]
    ]


def dataset_of(name: str, metric: Metric | None, batches: Iterable[AskedBatch], samples: int) -> Dataset:
    """A dataset of so many samples that a verdict can be given on: without images, and blank where none was asked."""
    known: list[Sample] = [Sample((), "", ())] * samples
    for batch in batches:
        for subject in batch.subjects:
            known[subject.number] = Sample((), "", subject.images, subject.answer, subject.kind)
    return Dataset(name, known, metric)


def refusals_of(batches: Iterable[AskedBatch]) -> dict[int, Refusal]:
    """The first refusal of each case that had one."""
    found: dict[int, Refusal] = {}
    for batch in sorted(batches, key=lambda batch: batch.batch):
        for refusal in batch.refusals:
            found.setdefault(refusal.case, refusal)
    return found


def common_outcomes(batches: Sequence[AskedBatch], cases: Sequence[int]) -> list[Outcome]:
    """The outcomes of these cases, by their places among them."""
    place = {case: i for i, case in enumerate(cases)}
    return [
        Outcome(place[outcome.case], outcome.number, outcome.answer, outcome.score, outcome.closeness)
        for batch in batches
        for outcome in batch.outcomes
        if outcome.case in place
    ]
