"""Searching for budgets: which cases are run on which samples next, their scores, and what follows from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence

from mmtok_cli.cases import Case, failure_of, release_memory
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import Sample, batches
from mmtok_cli.errors import MethodFaultError, MMTokError
from mmtok_cli.evaluation.metrics import METRICS, score_of
from mmtok_cli.evaluation.processes import Processes
from mmtok_cli.evaluation.sequential import BudgetSearch, PairedTest
from mmtok_cli.evaluation.shared import SharedBatch
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.results.records import CaseFailure, UnreadableSample
from mmtok_cli.results.retention import Decision, Retention, SearchDirectory, SearchPlan, SearchScore, SearchStep, Tried
from mmtok_cli.results.schema import CaseId

HOPELESS = 100  # samples after which a model that answers none right is given up


class Searches:
    """The searches of all methods in all groups, and what the steps so far have said."""

    def __init__(self, plan: SearchPlan) -> None:
        self.plan = plan
        self.count = 0
        self.reference: dict[int, SearchScore] = {}  # the unreduced model's, by sample
        self.unreadable: set[int] = set()
        self.failures: dict[int, CaseFailure] = {}
        target = plan.options.retained
        self.found = {
            (group, method): BudgetSearch(
                [plan.cases[number].coarse for number in numbers], len(plan.batches(group)), target
            )
            for group in plan.groups
            for method, numbers in plan.methods().items()
        }
        self.scores: dict[str, dict[int, list[SearchScore]]] = {group: defaultdict(list) for group in plan.groups}

    @property
    def baseline_score(self) -> float | None:
        """The mean score of the unreduced model."""
        return fmean(score.score for score in self.reference.values()) if self.reference else None

    @property
    def budgets(self) -> int:
        return sum(sum(search.coarse) for search in self.found.values())

    @property
    def decided(self) -> int:
        """How many budgets of those that are tried at once need no more samples."""
        return sum(search.settled for search in self.found.values())

    def next(self) -> tuple[str, int, list[int]] | None:
        """A group, one of its batches and the cases to be tried on it; None when all searches have ended."""
        if self.plan.metric and len(self.reference) >= HOPELESS and not self.baseline_score:
            return None
        for group in self.plan.groups:
            steps: dict[int, list[int]] = {}
            for method, numbers in self.plan.methods().items():
                if wanted := self.found[group, method].wanted():
                    batch, places = wanted
                    steps.setdefault(batch, []).extend(numbers[place] for place in places)
            if steps:
                return group, min(steps), steps[min(steps)]
        return None

    def add(self, step: SearchStep) -> None:
        """Take in the scores of a step."""
        self.count += 1
        self.unreadable |= {item.sample for item in step.unreadable}
        self.reference |= {score.sample: score for score in step.scores if score.case == 0}
        for failure in step.failures:
            self.failures.setdefault(failure.case, failure)
        images = self.plan.batches(step.group)[step.batch]
        by_case: dict[int, dict[int, SearchScore]] = defaultdict(dict)
        for score in step.scores:
            by_case[score.case][score.sample] = score
            self.scores[step.group][score.case].append(score)
        for method, numbers in self.plan.methods().items():
            search = self.found[step.group, method]
            for place, number in enumerate(numbers):
                if number not in step.cases:
                    continue
                if 0 in self.failures or number in self.failures:
                    search.give_up()
                else:
                    search.add(place, _images(by_case[number], self.reference, images))


def _images(
    mine: Mapping[int, SearchScore], reference: Mapping[int, SearchScore], images: Sequence[Sequence[int]]
) -> list[tuple[int, float, float]]:
    """Each image's number of questions, and the sums of its scores, reduced and unreduced."""
    answered = [[sample for sample in image if sample in mine] for image in images]
    return [
        (len(image), sum(mine[sample].score for sample in image), sum(reference[sample].score for sample in image))
        for image in answered
        if image
    ]


@dataclass
class Scored:
    """What a batch gave: scores of the cases, samples that were left out, and cases that failed."""

    scores: list[SearchScore] = field(default_factory=list)
    unreadable: list[UnreadableSample] = field(default_factory=list)
    failures: list[CaseFailure] = field(default_factory=list)

    def add(self, other: Scored) -> None:
        self.scores += other.scores
        self.unreadable += other.unreadable
        self.failures += other.failures


def run_step(
    model: VisionLanguageModel,
    dataset: Dataset,
    cases: Mapping[int, Case],
    searches: Searches,
    samples: Sequence[int],
    processes: Processes,
) -> Scored:
    """The scores of some cases, and of the baseline where they are not known; shared by all processes."""
    done, interrupted = Scored(), False
    chunks = list(batches(samples, searches.plan.options.batch_size[0]))
    try:
        for chunk in chunks[processes.index :: processes.count]:
            done.add(_score_chunk(model, dataset, cases, searches, chunk))
    except KeyboardInterrupt:
        interrupted = True
    whole = Scored()
    for part, stopped in processes.gather([(done, interrupted)]):
        whole.add(part)
        interrupted = interrupted or stopped
    if interrupted:
        raise KeyboardInterrupt
    return whole


def _score_chunk(
    model: VisionLanguageModel, dataset: Dataset, cases: Mapping[int, Case], searches: Searches, samples: Sequence[int]
) -> Scored:
    """The scores of samples that are run at once. One that cannot be read, or that a case refuses, is left out."""
    done, opened = Scored(), dict[int, Sample]()
    for number in samples:
        try:
            opened[number] = dataset.samples[number].open()
        except MMTokError as error:
            done.unreadable.append(UnreadableSample(sample=number, problem=error.message))
    if not opened:
        return done
    try:
        done.add(_score_cases(model, cases, searches, opened))
    except MMTokError as error:
        if len(opened) == 1:
            done.unreadable += [UnreadableSample(sample=number, problem=error.message) for number in opened]
        else:  # alone, each sample shows whether it is the one that was refused
            for number in opened:
                done.add(_score_chunk(model, dataset, cases, searches, [number]))
    return done


def _score_cases(
    model: VisionLanguageModel, cases: Mapping[int, Case], searches: Searches, opened: Mapping[int, Sample]
) -> Scored:
    """The scores of the cases, and before them of the baseline where they are not known.

    cases: the baseline first. A case that fails is in `failures`. Raises MMTokError for a sample that is refused.
    """
    done, plan = Scored(), searches.plan
    reference = {number: searches.reference[number] for number in opened if number in searches.reference}
    batch = SharedBatch(model, list(opened.values()))
    for number in cases:
        if number == 0 and len(reference) == len(opened):
            continue
        try:
            if plan.metric or number == 0:
                found = _answered(batch, number, cases[number], plan, opened)
            else:
                found = _agreed(batch, number, cases[number], model, reference, opened)
        except MethodFaultError as error:
            done.failures.append(CaseFailure(case=number, **failure_of(error)))
            continue
        except MMTokError as error:
            raise MMTokError(f"{cases[number]}: {error.message}", error.hint) from error
        except Exception as error:
            done.failures.append(CaseFailure(case=number, **failure_of(error)))
        else:
            done.scores += found
            reference |= {score.sample: score for score in found if number == 0}
            continue
        release_memory(model.device)  # only here, since the error holds on to the memory of the failed run
        if number == 0:
            break
    return done


def _answered(
    batch: SharedBatch, number: int, case: Case, plan: SearchPlan, opened: Mapping[int, Sample]
) -> list[SearchScore]:
    """The scores of a case by the metric; 1 for the unreduced model where there is none."""
    answers = batch.answer(case, plan.options.max_new_tokens)
    scores = []
    rows = zip(opened.items(), answers.texts, answers.reduced.tokens, answers.token_ids.tolist(), strict=True)
    for (sample, opened_sample), text, tokens, ids in rows:
        score = score_of(opened_sample, text, plan.metric) if plan.metric else 1.0
        if score is None:
            raise MMTokError("it has no reference answer", "give one, or leave the sample out")
        scores.append(
            SearchScore(
                case=number,
                sample=sample,
                answer=text,
                score=score,
                tokens=tokens,
                token_ids=[] if plan.metric else ids,
            )
        )
    return scores


def _agreed(
    batch: SharedBatch,
    number: int,
    case: Case,
    model: VisionLanguageModel,
    reference: Mapping[int, SearchScore],
    opened: Mapping[int, Sample],
) -> list[SearchScore]:
    """The agreement of a case with the unreduced model's answers."""
    answers = [torch.tensor(reference[sample].token_ids) for sample in opened]
    token_ids = pad_sequence(answers, batch_first=True, padding_value=model.tokenizer.pad_token_id)
    shares, reduced = batch.agreement(case, token_ids.to(model.device))
    return [
        SearchScore(case=number, sample=sample, answer="", score=share, tokens=tokens)
        for sample, share, tokens in zip(opened, shares, reduced.tokens, strict=True)
    ]


def summarise_search(store: SearchDirectory, *, interrupted: bool = False) -> Retention:
    """The result of a search, as far as it has come, from its directory alone, without times."""
    plan, searches = store.plan, Searches(store.plan)
    for step in store.steps:
        searches.add(step)
    decisions = [
        _decision(searches, group, method, numbers)
        for method, numbers in plan.methods().items()
        for group in plan.groups
    ]
    most = sum(
        max((len(scores) for case, scores in searches.scores[group].items()), default=0) for group in plan.groups
    )
    reference = [score.score for score in searches.reference.values()]
    unreadable = [item for step in store.steps for item in step.unreadable]
    return Retention(
        model=plan.model,
        rules=plan.rules,
        environment=plan.environment,
        data=plan.data,
        target=plan.options.retained,
        measure=measure_of(plan),
        metric=plan.metric,
        baseline_score=fmean(reference) if reference and plan.metric else None,
        decisions=decisions,
        samples=len(searches.reference),
        available=plan.samples,
        seed=plan.options.seed,
        runs=sum(len(step.scores) for step in store.steps),
        grid_runs=most * len(plan.cases),
        seconds=sum(step.seconds for step in store.steps),
        interrupted=interrupted or (searches.next() is not None),
        command=plan.options.command_line(),
        run_directory=str(store.path),
        left_out=[
            *plan.left_out,
            *(f"left out: sample {item.sample + 1}: {item.problem}" for item in unreadable),
        ],
    )


def _decision(searches: Searches, group: str, method: str, numbers: Sequence[int]) -> Decision:
    plan, search = searches.plan, searches.found[group, method]
    tried = []
    for place, number in enumerate(numbers):
        if scores := searches.scores[group].get(number):
            tried.append(_tried(plan.cases[number].case, search.tests[place], scores))
    answer = search.answer
    failed = [searches.failures[number] for number in (0, *numbers) if number in searches.failures]
    return Decision(
        method=method,
        group=group if plan.options.by else None,
        budget=None if answer is None or failed else plan.cases[numbers[answer]].case.budget,
        tried=tried,
        failure=f"{failed[0].reason}: {failed[0].message}" if failed else None,
    )


def _tried(case: CaseId, test: PairedTest, scores: Sequence[SearchScore]) -> Tried:
    low, high = test.interval()
    counts = [score.tokens for score in scores if score.tokens]
    more = test.images_needed() if test.verdict == "open" else None
    return Tried(
        case=case,
        kept=fmean(tokens.kept for tokens in counts),
        total=fmean(tokens.total for tokens in counts),
        layer_average=fmean(tokens.layer_average for tokens in counts),
        samples=len(scores),
        retention=test.retention(),
        low=low,
        high=high,
        verdict=test.verdict,
        samples_needed=more and round(more * len(scores) / test.sums.images),
    )


def measure_of(plan: SearchPlan) -> str:
    """What is kept, in words."""
    if plan.metric is None:
        return "agreement with the unreduced model"
    if plan.metric in ("yes-no", "mme"):
        return "accuracy"  # F1 and the paired accuracy are no means over samples
    return METRICS[plan.metric].title
