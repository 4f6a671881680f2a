"""Predictions of all cases for a dataset, by one process or several, written to the run directory batch by batch.

How close a method stays to the unreduced model is measured on any images, without reference answers: the unreduced
model's answer is fed to the reduced one token by token (teacher forcing). So the distributions of the next token are
compared after the same words, even where the two answers would differ early on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from mmtok_cli.budget import Budget, TokenCounts
from mmtok_cli.cases import Case, failure_of, release_memory
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample, batches
from mmtok_cli.decoding import Continuation, answer_mask, prefill, require_finite
from mmtok_cli.errors import MethodFaultError, MMTokError
from mmtok_cli.evaluation.metrics import score_of
from mmtok_cli.evaluation.processes import Processes
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.full import Full
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Answers, Reduced, answer, inside, reduce
from mmtok_cli.results.progress import Remaining
from mmtok_cli.results.records import (
    CaseFailure,
    Closeness,
    Prediction,
    PredictionBatch,
    SampleLabel,
    UnreadableSample,
)
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.rules import ImageScale, Rules
from mmtok_cli.stages import unwatched


@dataclass(frozen=True)
class Reference:
    """The unreduced model's answers to a batch, and the logits that they were decoded from.

    logits: [batch, steps, vocabulary]. mask: [batch, steps], True for the tokens of each answer up to the one that
    ends it.
    """

    answers: Answers
    logits: Tensor
    mask: Tensor


BatchItem = Prediction | UnreadableSample | CaseFailure


def evaluate(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    remaining: Remaining | None,
    *,
    processes: Processes,
    store: RunDirectory | None,
    max_new_tokens: int,
) -> Iterator[int]:
    """Predict what is left and write it down; yields the number of samples done after each step of all processes.

    cases: all of the plan. remaining and store: those of the writer; the other processes receive what is left from the
    writer, and write nothing. Raises NotWrittenError in the writer, and KeyboardInterrupt in all processes when one was
    interrupted.
    """
    (agreed,) = processes.tell([remaining])
    if agreed is None:
        return
    for step in predict(model, cases, dataset, agreed, processes=processes, max_new_tokens=max_new_tokens):
        for batch in step:
            if store is not None:
                store.add_predictions(batch)
        yield sum(len(batch.samples) for batch in step)


def predict(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    dataset: Dataset,
    remaining: Remaining,
    *,
    processes: Processes,
    max_new_tokens: int,
) -> Iterator[list[PredictionBatch]]:
    """Predict the remaining batches, one for each process at a time.

    The batches do not depend on the number of processes. Yields the batches of each step, the same in every process,
    so that one of them can write them down at once. A case that fails takes no part in the steps that follow; after a
    failure of the baseline nothing does. Raises KeyboardInterrupt in all processes after a step in which one was
    interrupted.
    """
    numbers = list(batches(range(len(dataset.samples)), remaining.batch_size))
    failed: set[int] = set()
    for step in batches(remaining.batches, processes.count):
        done, interrupted = [], False
        taking_part = {number: cases[number] for number in remaining.cases if number not in failed}
        try:
            for batch in step[processes.index : processes.index + 1]:
                items = predict_batch(model, taking_part, dataset, numbers[batch], max_new_tokens)
                done.append(_batch_record(batch, remaining, dataset, numbers[batch], items))
        except KeyboardInterrupt:
            interrupted = True
        parts = processes.gather([(done, interrupted)])
        found = [each for part, _ in parts for each in part]
        if found:
            yield found
        if any(stopped for _, stopped in parts):
            raise KeyboardInterrupt
        failed |= {failure.case for batch in found for failure in batch.failures}
        if remaining.cases[0] in failed:
            return


def predict_batch(
    model: VisionLanguageModel,
    cases: Mapping[int, Case],
    dataset: Dataset,
    numbers: Sequence[int],
    max_new_tokens: int,
) -> list[BatchItem]:
    """The predictions of all cases for some samples of a dataset, as one batch.

    cases: by their numbers in the plan, the baseline first. max_new_tokens: of samples whose task does not set it.
    Samples that cannot be read, or that a case refuses, as the
    baseline does if they are too long, are left out of all cases. A case that fails on one of the samples for any other
    reason has failed.
    """
    by_length: dict[int | None, list[int]] = {}
    for number in numbers:
        by_length.setdefault(dataset.samples[number].max_new_tokens, []).append(number)
    if len(by_length) > 1:  # only answers of one length are decoded together
        groups = (predict_batch(model, cases, dataset, group, max_new_tokens) for group in by_length.values())
        return [item for group in groups for item in group]
    found: list[BatchItem] = []
    opened: dict[int, Sample] = {}
    for number in numbers:
        try:
            opened[number] = dataset.samples[number].open()
        except MMTokError as error:
            found.append(UnreadableSample(sample=number, problem=error.message))
    if not opened:
        return found
    try:
        return [*found, *_predictions_of_all(model, cases, opened, dataset, max_new_tokens)]
    except MMTokError as error:
        if len(opened) == 1:
            return [*found, *(UnreadableSample(sample=number, problem=error.message) for number in opened)]
    # Alone, each sample shows whether it is the one that was refused.
    for number in opened:
        found += predict_batch(model, cases, dataset, [number], max_new_tokens)
    return found


def _predictions_of_all(
    model: VisionLanguageModel,
    cases: Mapping[int, Case],
    opened: Mapping[int, Sample],
    dataset: Dataset,
    max_new_tokens: int,
) -> list[Prediction | CaseFailure]:
    """The predictions of all cases for one batch, or their failures. Raises MMTokError for a sample that is refused."""
    max_new_tokens = _answer_length(model, list(opened.values()), max_new_tokens)
    try:
        reference = reference_of(model, list(opened.values()), max_new_tokens=max_new_tokens)
    except MMTokError:
        raise
    except Exception as error:
        failure = CaseFailure(case=next(iter(cases)), **failure_of(error))
    else:
        found: list[Prediction | CaseFailure] = []
        for number, case in cases.items():
            found += _predictions_of(model, number, case, opened, dataset, reference, max_new_tokens)
        return found
    release_memory(model.device)  # only here, since the error holds on to the memory of the failed run
    return [failure]


def _answer_length(model: VisionLanguageModel, samples: Sequence[Sample], usual: int) -> int:
    """The most new tokens of the answers to a batch: as many as its task allows and the context has room for, where
    the samples have a task that says so. Raises MMTokError for a sample that the model cannot read."""
    longest = samples[0].max_new_tokens
    if longest is None:
        return usual
    images = [sample.images for sample in samples]
    prompts = model.tokenize([sample.question for sample in samples], images, [None] * sum(map(len, images)))
    return max(1, min(longest, model.context_length - prompts["input_ids"].shape[1]))


def _predictions_of(
    model: VisionLanguageModel,
    number: int,
    case: Case,
    opened: Mapping[int, Sample],
    dataset: Dataset,
    reference: Reference,
    max_new_tokens: int,
) -> list[Prediction] | list[CaseFailure]:
    """The predictions of one case for one batch, or its failure. Raises MMTokError for a sample that it refuses."""
    try:
        texts, closeness, tokens = _answers_of(model, case, list(opened.values()), reference, max_new_tokens)
    except MMTokError as error:
        if not isinstance(error, MethodFaultError):
            raise MMTokError(f"{case}: {error.message}", error.hint) from error
        failure = CaseFailure(case=number, **failure_of(error))
    except Exception as error:
        failure = CaseFailure(case=number, **failure_of(error))
    else:
        return [
            Prediction(
                case=number,
                sample=place,
                answer=text,
                score=score_of(sample, text, dataset.metric) if dataset.metric else None,
                closeness=close,
                tokens=counts,
            )
            for (place, sample), text, close, counts in zip(opened.items(), texts, closeness, tokens, strict=True)
        ]
    release_memory(model.device)
    return [failure]


def _answers_of(
    model: VisionLanguageModel, case: Case, samples: Sequence[Sample], reference: Reference, max_new_tokens: int
) -> tuple[list[str], list[Closeness], list[TokenCounts]]:
    """Answers, their closeness and token counts. Where every token of a batch agrees, its answers are the reference."""
    answers, token_ids = reference.answers, reference.answers.token_ids
    if isinstance(case.method, Full) and case.image_scale == 1:
        return answers.texts, [Closeness(kl=0.0, top1=1.0, same=True)] * len(samples), answers.reduced.tokens
    drafts = case.drafts(model, samples)
    logits, tokens = forced_logits(
        model,
        case.method,
        samples,
        case.budget,
        token_ids,
        rules=case.rules,
        drafts=drafts,
        image_scale=case.image_scale,
    )
    closeness = closeness_of(reference.logits, logits, reference.mask)
    if all(close.same for close in closeness):
        return answers.texts, closeness, tokens
    return case.answer(model, samples, max_new_tokens, unwatched).texts, closeness, tokens


def reference_of(
    model: VisionLanguageModel, samples: Sequence[Sample], *, max_new_tokens: int, rules: Rules = RELEASED
) -> Reference:
    """Answer a batch greedily from all vision tokens. Raises MMTokError where prompt and answer are too long."""
    full = make_method("full")
    answers = answer(model, full, samples, None, rules=rules, max_new_tokens=max_new_tokens)
    logits, _ = forced_logits(model, full, samples, None, answers.token_ids, rules=rules)
    return Reference(answers, logits, answer_mask(answers.token_ids, model.eos_token_ids))


@torch.inference_mode()
def forced_logits(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    token_ids: Tensor,
    *,
    rules: Rules = RELEASED,
    drafts: Sequence[str] = (),
    image_scale: ImageScale = 1,
) -> tuple[Tensor, list[TokenCounts]]:
    """Logits of each token of a given answer, [batch, steps, vocabulary], after the reduced prompt and the ones before;
    and the token counts of each sample.

    token_ids: [batch, steps]. They are read one by one through the cache, as in decoding, so that this also works for
    methods inside the language model.
    """
    reduced = reduce(model, method, samples, budget, rules=rules, drafts=drafts, image_scale=image_scale)
    return logits_after(model, reduced, token_ids), reduced.tokens


@torch.inference_mode()
def logits_after(model: VisionLanguageModel, reduced: Reduced, token_ids: Tensor) -> Tensor:
    """`forced_logits` for a prompt that is reduced already: [batch, steps, vocabulary]."""
    with inside(model, reduced):
        first, cache = prefill(model, reduced.inputs)
        require_finite(model, first)
        behind = Continuation(model, reduced.inputs, cache)
        logits = [first, *(behind.read(token) for token in token_ids[:, :-1].unbind(1))]
    return torch.stack(logits, dim=1)


def closeness_of(reference: Tensor, logits: Tensor, mask: Tensor) -> list[Closeness]:
    """Fidelity of each sample of a batch: its logits compared with those of the unreduced model.

    reference, logits: [batch, steps, vocabulary]. mask: [batch, steps], True for the tokens that count.
    """
    expected, log_probabilities = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = kl_div(log_probabilities, expected, reduction="none", log_target=True).sum(-1).clamp(min=0)
    agrees = reference.argmax(-1) == logits.argmax(-1)
    count = mask.sum(1)
    means = (kl * mask).sum(1) / count
    shares = (agrees & mask).sum(1) / count
    same = (agrees | ~mask).all(1)
    return [
        Closeness(kl=kl, top1=top1, same=all_agree)
        for kl, top1, all_agree in zip(means.tolist(), shares.tolist(), same.tolist(), strict=True)
    ]


def _batch_record(
    batch: int, remaining: Remaining, dataset: Dataset, numbers: Sequence[int], items: Sequence[BatchItem]
) -> PredictionBatch:
    labels = [label_of(number, dataset.samples[number]) for number in numbers]
    return PredictionBatch(
        batch=batch,
        batch_size=remaining.batch_size,
        key=remaining.key,
        samples=labels,
        predictions=[item for item in items if isinstance(item, Prediction)],
        unreadable=[item for item in items if isinstance(item, UnreadableSample)],
        failures=[item for item in items if isinstance(item, CaseFailure)],
    )


def label_of(number: int, sample: Sample) -> SampleLabel:
    """What the summary needs to know of a sample. number: in its dataset."""
    return SampleLabel(
        sample=number,
        images=sample.image_ids,
        answer=next(iter(sample.references), None),
        kind=sample.kind,
        question=sample.question,
        references=sample.references,
        id=sample.id or None,
    )
