"""Asking all cases about a dataset: what each answers, what that is worth, how close it is to the unreduced model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.fidelity import Closeness, Reference, compare_logits, forced_logits, reference_of
from mmtok_cli.evaluation.metrics import score_of
from mmtok_cli.methods.full import Full
from mmtok_cli.models.base import VisionLanguageModel, unwatched
from mmtok_cli.timing.memory import first_line, is_out_of_memory, release_memory
from mmtok_cli.timing.runner import Case


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


@dataclass(frozen=True)
class Refusal:
    """A case that could not be asked, and why; it is not asked again."""

    case: int
    reason: Literal["out of memory", "refused"]
    message: str


Item = Outcome | Unread | Refusal


def ask_batch(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    numbers: Sequence[int],
    max_new_tokens: int,
    without: Collection[int] = (),
) -> list[Item]:
    """Ask all cases, those in `without` aside, about some samples of a dataset, as one batch.

    The first case is the baseline. Samples that cannot be read, or that even the baseline cannot be asked about, are
    left out; a case that runs out of memory, or whose budget a sample does not allow, is told in a Refusal.
    """
    found: list[Item] = []
    opened: dict[int, Sample] = {}
    for number in numbers:
        try:
            opened[number] = dataset.samples[number].open()
        except MMTokError as error:
            found.append(Unread(number, error.message))
    if not opened:
        return found
    samples = list(opened.values())
    try:
        reference = reference_of(model, samples, max_new_tokens=max_new_tokens)
    except MMTokError as error:
        if len(opened) == 1:
            return [*found, *(Unread(number, error.message) for number in opened)]
        for number in opened:
            found += ask_batch(model, cases, dataset, [number], max_new_tokens, without)
        return found
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        refusal = Refusal(0, "out of memory", first_line(error))
    else:
        for index, case in enumerate(cases):
            if index not in without:
                found += _outcomes(model, index, case, opened, dataset, reference, max_new_tokens)
        return found
    release_memory(model.device)  # here, where the error no longer holds what it failed with
    return [*found, refusal]


def _outcomes(
    model: VisionLanguageModel,
    index: int,
    case: Case,
    opened: Mapping[int, Sample],
    dataset: Dataset,
    reference: Reference,
    max_new_tokens: int,
) -> list[Item]:
    try:
        texts, closeness = _ask(model, case, list(opened.values()), reference, max_new_tokens)
    except Exception as error:
        exhausted = is_out_of_memory(error)
        if not exhausted and not isinstance(error, MMTokError):
            raise
        said = error.message if isinstance(error, MMTokError) else first_line(error)
        refusal = Refusal(index, "out of memory" if exhausted else "refused", said)
    else:
        return [
            Outcome(index, number, text, score_of(sample, text, dataset.metric) if dataset.metric else None, close)
            for (number, sample), text, close in zip(opened.items(), texts, closeness, strict=True)
        ]
    release_memory(model.device)
    return [refusal]


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
