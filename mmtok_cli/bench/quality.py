"""Asking all cases about a dataset: what each answers, what that is worth, how close it is to the unreduced model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmtok_cli.bench.fidelity import Closeness, Reference, compare_logits, forced_logits, reference_of
from mmtok_cli.bench.runner import Case
from mmtok_cli.bench.scores import score_of
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.full import Full
from mmtok_cli.models.base import VisionLanguageModel, unwatched


@dataclass(frozen=True)
class Outcome:
    """What one case said to one sample, the number-th of its dataset. score: None where no right answer is known."""

    case: int
    number: int
    answer: str
    score: float | None
    closeness: Closeness


@dataclass(frozen=True)
class Unread:
    """A sample whose images could not be read, so that no case was asked about it."""

    number: int
    problem: str


def ask_batch(
    model: VisionLanguageModel, cases: Sequence[Case], dataset: Dataset, numbers: Sequence[int], max_new_tokens: int
) -> list[Outcome | Unread]:
    """Ask all cases about some samples of a dataset, as one batch.

    Raises MMTokError naming the case where a budget cannot be met.
    """
    found: list[Outcome | Unread] = []
    opened: dict[int, Sample] = {}
    for number in numbers:
        try:
            opened[number] = dataset.samples[number].open()
        except MMTokError as error:
            found.append(Unread(number, error.message))
    if not opened:
        return found
    samples = list(opened.values())
    reference = reference_of(model, samples, max_new_tokens=max_new_tokens)
    for index, case in enumerate(cases):
        try:
            texts, closeness = _ask(model, case, samples, reference, max_new_tokens)
        except MMTokError as error:
            raise MMTokError(f"{case}: {error.message}", error.hint) from error
        for (number, sample), text, close in zip(opened.items(), texts, closeness, strict=True):
            score = score_of(sample, text, dataset.metric) if dataset.metric else None
            found.append(Outcome(index, number, text, score, close))
    return found


def _ask(
    model: VisionLanguageModel, case: Case, samples: Sequence[Sample], reference: Reference, max_new_tokens: int
) -> tuple[list[str], list[Closeness]]:
    """Texts and their closeness. A batch of which every token agrees is not asked again: it would say the same."""
    if isinstance(case.method, Full):
        return reference.answers.texts, [Closeness(0.0, 1.0, True)] * len(samples)
    token_ids = reference.answers.token_ids
    found = forced_logits(model, case.method, samples, case.budget, token_ids, rules=case.rules)
    closeness = compare_logits(reference.logits, found, reference.mask)
    if all(close.same for close in closeness):
        return reference.answers.texts, closeness
    return case.answer(model, samples, max_new_tokens, unwatched).texts, closeness
