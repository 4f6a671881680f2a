"""Evaluation: predictions, their summary, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import parallel_quality
import pytest
from conftest import picture

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.samples import ClosedImages, Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation import predictions
from mmtok_cli.evaluation.metrics import score_of
from mmtok_cli.evaluation.predictions import predict
from mmtok_cli.evaluation.processes import Processes, join_processes
from mmtok_cli.evaluation.summary import EvaluationSummary, f1_retention, summarise_predictions
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.mmtok import MMTok
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import answer
from mmtok_cli.results.progress import Remaining
from mmtok_cli.results.records import (
    CaseFailure,
    Closeness,
    Prediction,
    PredictionBatch,
    SampleLabel,
    UnreadableSample,
)

CASES = [
    Case("full", make_method("full"), None),
    Case("mmtok", make_method("mmtok"), Budget(count=8)),
    Case("fastv", make_method("fastv", layer=1), Budget(count=8)),
]
STEPS = 3


@dataclass(frozen=True)
class Evaluated:
    batches: list[PredictionBatch]

    @property
    def predictions(self) -> list[Prediction]:
        return sorted((p for b in self.batches for p in b.predictions), key=lambda p: (p.sample, p.case))

    @property
    def unreadable(self) -> list[UnreadableSample]:
        return [sample for batch in self.batches for sample in batch.unreadable]

    @property
    def failures(self) -> list[CaseFailure]:
        return [failure for batch in self.batches for failure in batch.failures]

    def summary(self, metric: MetricName | None) -> list[EvaluationSummary]:
        labels = {label.sample: label for batch in self.batches for label in batch.samples}
        return list(summarise_predictions(self.predictions, labels, baseline=0, metric=metric, seed=0).values())


def everything(dataset: Dataset, batch_size: int, cases: int) -> Remaining:
    return Remaining(batch_size, list(range(cases)), list(range(-(-len(dataset.samples) // batch_size))))


def run(model: Llava, dataset: Dataset, cases: list[Case] = CASES, batch_size: int = 2) -> Evaluated:
    remaining = everything(dataset, batch_size, len(cases))
    steps = predict(model, cases, dataset, remaining, processes=Processes(), max_new_tokens=STEPS)
    return Evaluated([batch for step in steps for batch in step])


def test_every_case_says_what_it_says_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    answered = [
        replace(s, answer=answer(tiny_sdpa, CASES[0].method, [s], None, max_new_tokens=STEPS).texts[0]) for s in samples
    ]
    found = run(tiny_sdpa, Dataset("three", answered, "exact"))
    assert not found.failures and not found.unreadable
    assert [(p.sample, p.case) for p in found.predictions] == [(n, c) for n in range(3) for c in range(3)]
    for prediction in found.predictions:
        case, sample = CASES[prediction.case], answered[prediction.sample]
        alone = answer(tiny_sdpa, case.method, [sample], case.budget, max_new_tokens=STEPS).texts[0]
        assert prediction.answer == alone and prediction.score == score_of(sample, alone, "exact")
        assert prediction.closeness.same == (alone == sample.answer)
    full, mmtok, _ = found.summary("exact")
    assert full.score == 1 and full.fidelity.kl == 0 and full.fidelity.top1 == full.fidelity.same == 1
    assert mmtok.fidelity.kl > 0 and mmtok.retention and mmtok.retention.value == mmtok.score == mmtok.fidelity.same


def test_images_without_answers_have_fidelity_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    summaries = run(tiny_sdpa, Dataset("three", samples, None)).summary(None)
    assert len(summaries) == 3
    for summary in summaries:
        assert summary.samples == 0 and summary.score is summary.retention is summary.flips is None
        assert 0 <= summary.fidelity.top1 <= 1


def test_cases_keep_the_numbers_of_the_plan(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    """Those that were given up while they were timed are left out, without renumbering the others."""
    dataset = Dataset("three", samples, None)
    remaining = Remaining(2, cases=[1, 3], batches=[1], key="run")
    cases = [CASES[2], CASES[0], CASES[2], CASES[1]]
    steps = predict(tiny_sdpa, cases, dataset, remaining, processes=Processes(), max_new_tokens=STEPS)
    ((batch,),) = list(steps)
    assert (batch.batch, batch.batch_size, batch.key) == (1, 2, "run")
    assert [label.sample for label in batch.samples] == [2]
    assert [(p.sample, p.case) for p in batch.predictions] == [(2, 1), (2, 3)]
    usual = [p for p in run(tiny_sdpa, dataset).predictions if p.sample == 2]
    assert [p.answer for p in batch.predictions] == [usual[0].answer, usual[1].answer]
    found = summarise_predictions(batch.predictions, {2: batch.samples[0]}, baseline=1, metric=None, seed=0)
    assert list(found) == [1, 3] and found[1].fidelity.kl == 0 < found[3].fidelity.kl


def damaged() -> NoReturn:
    raise MMTokError("damaged.png is damaged")


def test_an_unreadable_image_costs_its_sample_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    bad = replace(samples[1], images=ClosedImages((damaged,)))
    found = run(tiny_sdpa, Dataset("three", [samples[0], bad, samples[2]], None))
    assert [(u.sample, u.problem) for u in found.unreadable] == [(1, "damaged.png is damaged")]
    assert {p.sample for p in found.predictions} == {0, 2}
    assert not run(tiny_sdpa, Dataset("three", [bad] * 3, None)).predictions


def test_images_are_opened_once_for_all_cases_and_let_go(tiny_sdpa: Llava) -> None:
    opened: list[int] = []

    def opener(seed: int) -> Callable[[], object]:
        def read() -> object:
            opened.append(seed)
            return picture(84, 84, seed)

        return read

    closed = [Sample(ClosedImages((opener(i),)), "Is there a star?", (f"p{i}",)) for i in range(4)]  # type: ignore[arg-type]
    run(tiny_sdpa, Dataset("four", closed, None))
    assert opened == [0, 1, 2, 3]


@dataclass(frozen=True)
class Fails(MMTok):
    """Does not work on one image."""

    def select_batch(self, vision: Any, text: Any, budgets: Any) -> Any:
        return [None] if vision[0].image_id == "picture-1" else super().select_batch(vision, text, budgets)


def test_a_method_that_fails_ends_its_case_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    cases = [CASES[0], Case("fails", Fails(), Budget(count=6)), CASES[1]]
    found = run(tiny_sdpa, Dataset("three", samples, None), cases, batch_size=1)
    (failure,) = found.failures  # and the case is not tried on the third sample
    assert (failure.case, failure.reason) == (1, "error")
    assert "Fails.select must return a Selection" in failure.message
    assert [p.sample for p in found.predictions if p.case == 1] == [0]
    assert [p.sample for p in found.predictions if p.case == 2] == [0, 1, 2]


@dataclass(frozen=True)
class Refuses(MMTok):
    """Refuses one image, with an error for the user."""

    def select_batch(self, vision: Any, text: Any, budgets: Any) -> Any:
        if any(tokens.image_id == "picture-1" for tokens in vision):
            raise MMTokError("picture-1 is too plain")
        return super().select_batch(vision, text, budgets)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_sample_that_a_method_refuses_is_left_out_of_every_case(
    batch_size: int, tiny_sdpa: Llava, samples: list[Sample]
) -> None:
    cases = [CASES[0], Case("refuses", Refuses(), Budget(count=6)), CASES[1]]
    found = run(tiny_sdpa, Dataset("three", samples, None), cases, batch_size=batch_size)
    assert not found.failures and [item.sample for item in found.unreadable] == [1]
    assert found.unreadable[0].problem == "refuses @ 6: picture-1 is too plain"
    assert {(p.case, p.sample) for p in found.predictions} == {(case, sample) for case in range(3) for sample in (0, 2)}


def test_samples_that_keep_fewer_tokens_are_counted(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    cases = [CASES[0], Case("mmtok", make_method("mmtok"), Budget(count=30))]
    found = run(tiny_sdpa, Dataset("three", samples, None), cases, batch_size=1)
    kept = {p.sample: (p.tokens.kept, p.tokens.short) for p in found.predictions if p.case == 1 and p.tokens}
    assert kept[0] == (30, False) and kept[1] == (24, True)
    assert all(not p.tokens.short for p in found.predictions if p.case == 0 and p.tokens)


def test_a_question_that_is_too_long_costs_its_sample_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    endless = replace(samples[1], question="word " * 3000)
    found = run(tiny_sdpa, Dataset("three", [samples[0], endless, samples[2]], None), batch_size=3)
    assert [u.sample for u in found.unreadable] == [1] and {p.sample for p in found.predictions} == {0, 2}


@pytest.mark.parametrize("name", ["full", "mmtok"])
def test_memory_that_runs_out(
    name: str, tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = predictions.forced_logits

    def forced(model: Llava, method: Method, *arguments: Any, **options: Any) -> Any:
        if isinstance(method, type(make_method(name))):
            raise MemoryError
        return usual(model, method, *arguments, **options)

    monkeypatch.setattr(predictions, "forced_logits", forced)
    found = run(tiny_sdpa, Dataset("three", samples, None), batch_size=1)
    assert [(f.case, f.reason, f.message) for f in found.failures] == [
        (["full", "mmtok"].index(name), "out of memory", "MemoryError")
    ]
    assert {p.case for p in found.predictions} == (set() if name == "full" else {0, 2})


def test_an_interrupt_keeps_what_was_predicted(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_batch = predictions.predict_batch

    def stop(model: Llava, cases: dict[int, Case], dataset: Dataset, numbers: list[int], *rest: Any) -> object:
        if 2 in numbers:
            raise KeyboardInterrupt
        return predict_batch(model, cases, dataset, numbers, *rest)

    monkeypatch.setattr(predictions, "predict_batch", stop)
    dataset = Dataset("three", samples, None)
    batches: list[PredictionBatch] = []
    with pytest.raises(KeyboardInterrupt):
        for step in predict(
            tiny_sdpa, CASES, dataset, everything(dataset, 2, 3), processes=Processes(), max_new_tokens=STEPS
        ):
            batches += step
    assert {p.sample for p in Evaluated(batches).predictions} == {0, 1}


def test_a_summary_by_hand() -> None:
    """POPE: F1 is the score; two questions about each image; one flip each way and one more lost."""
    truth = ["yes", "no", "yes", "no", "yes", "no"]
    said = {0: ["Yes", "No", "Yes", "Yes", "Yes", "No"], 1: ["No", "No", "No", "No", "Yes", "No"]}
    kinds = ["random", "popular"] * 3
    labels = {
        i: SampleLabel(sample=i, images=(f"image-{i // 2}",), answer=known, kind=kind)
        for i, (known, kind) in enumerate(zip(truth, kinds, strict=True))
    }
    predicted = [
        Prediction(
            case=case,
            sample=i,
            answer=text,
            score=float(text.lower() == truth[i]),
            closeness=Closeness(kl=0.5 * case, top1=1 - 0.25 * case, same=case == 0),
        )
        for case, texts in said.items()
        for i, text in enumerate(texts)
    ]
    baseline, method = summarise_predictions(predicted, labels, baseline=0, metric="yes-no", seed=0).values()
    assert baseline.yes_no and baseline.score == baseline.yes_no.f1 == pytest.approx(6 / 7)
    assert baseline.retention is None and baseline.flips is None
    assert method.yes_no and method.score == pytest.approx(0.5) and method.yes_no.accuracy == pytest.approx(4 / 6)
    assert method.retention and method.retention.value == pytest.approx(0.5 / (6 / 7))
    yes = [[text == "yes" for text in truth], *[[text == "Yes" for text in texts] for texts in said.values()]]
    assert method.retention == f1_retention(*yes, [f"image-{i // 2}" for i in range(6)], seed=0)
    assert method.retention != f1_retention(*yes, [f"q{i}" for i in range(6)], seed=0)
    assert method.flips and (method.flips.right_wrong, method.flips.wrong_right) == (2, 1)
    assert (method.flips.right_right, method.flips.wrong_wrong) == (3, 0)
    assert method.by_kind == {"popular": (1.0, 3), "random": (pytest.approx(1 / 3), 3)}
    assert (method.fidelity.kl, method.fidelity.top1, method.fidelity.same) == (0.5, 0.75, 0)
    assert method.samples == 6


def test_soft_accuracies_are_averaged_and_split_in_the_middle() -> None:
    labels = {i: SampleLabel(sample=i, images=(str(i),), answer=None, kind=None) for i in range(2)}
    scores = {0: [2 / 3, 2 / 3], 1: [2 / 3, 1 / 3]}
    close = Closeness(kl=0, top1=1, same=True)
    predicted = [
        Prediction(case=case, sample=i, answer="a", score=score, closeness=close)
        for case, row in scores.items()
        for i, score in enumerate(row)
    ]
    _, method = summarise_predictions(predicted, labels, baseline=0, metric="textvqa", seed=0).values()
    assert method.score == pytest.approx(0.5) and method.retention and method.retention.value == pytest.approx(0.75)
    assert method.flips and (method.flips.right_right, method.flips.right_wrong) == (1, 1)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = Path(parallel_quality.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(script), str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    alone = parallel_quality.evaluate(Processes())
    assert not [name for name in found["threads"] if "gloo" in name]  # they could abort the process on its way out
    assert (found["count"], found["batches"]) == (2, [[0, 1], [2, 3], [4]])
    assert (alone["count"], alone["batches"]) == (1, [[0], [1], [2], [3], [4]])
    assert found["predictions"] == [
        [*o[:4], pytest.approx(o[4], rel=1e-4, abs=1e-6), o[5]] for o in alone["predictions"]
    ]
    full = {number: text for number, case, text, *_ in found["predictions"] if case == 0}
    assert all(same == (text == full[number]) for number, _, text, _, _, same in found["predictions"])
    mixed = [{o[5] for o in found["predictions"] if o[1] == 1 and o[0] // 3 == batch} for batch in range(5)]
    assert {True, False} in mixed  # what one sample of a batch says does not hang on the others


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MMTokError, match="need the accelerate library") as error, join_processes():
        pass
    assert error.value.hint == "pip install 'mmtok[accelerate]'"
