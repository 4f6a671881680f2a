"""The quality run: outcomes, verdicts, several processes."""

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
from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.samples import ClosedImages, Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation import fidelity
from mmtok_cli.evaluation import predictions as quality
from mmtok_cli.evaluation import processes as parallel
from mmtok_cli.evaluation.fidelity import Closeness
from mmtok_cli.evaluation.predictions import Item, Outcome, Refusal, Unread
from mmtok_cli.evaluation.processes import Processes, ask_all, join_processes
from mmtok_cli.evaluation.retention import f1_retention
from mmtok_cli.evaluation.summary import judge
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import answer
from mmtok_cli.timing.runner import Case

CASES = [
    Case("full", make_method("full"), None),
    Case("mmtok", make_method("mmtok"), Budget(count=8)),
    Case("fastv", make_method("fastv", layer=1), Budget(count=8)),
]
STEPS = 3


@dataclass(frozen=True)
class Asked:
    outcomes: list[Outcome]
    unread: list[Unread]
    refusals: list[Refusal]


def run(model: Llava, dataset: Dataset, cases: list[Case] = CASES, batch_size: int = 2) -> Asked:
    steps = ask_all(model, cases, dataset, processes=Processes(), batch_size=batch_size, max_new_tokens=STEPS)
    return asked_of([item for found in steps for batch in found for item in batch.items])


def asked_of(items: list[Item]) -> Asked:
    outcomes = sorted((i for i in items if isinstance(i, Outcome)), key=lambda o: (o.number, o.case))
    return Asked(outcomes, [i for i in items if isinstance(i, Unread)], [i for i in items if isinstance(i, Refusal)])


def test_every_case_says_what_it_says_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    answered = [
        replace(s, answer=answer(tiny_sdpa, CASES[0].method, [s], None, max_new_tokens=STEPS).texts[0]) for s in samples
    ]
    asked = run(tiny_sdpa, Dataset("three", answered, "exact"))
    assert not asked.refusals and not asked.unread
    assert [(o.number, o.case) for o in asked.outcomes] == [(n, c) for n in range(3) for c in range(3)]
    for outcome in asked.outcomes:
        case = CASES[outcome.case]
        alone = answer(tiny_sdpa, case.method, [answered[outcome.number]], case.budget, max_new_tokens=STEPS).texts[0]
        assert outcome.answer == alone and outcome.score == answered[outcome.number].is_right(alone)
        assert outcome.closeness.same == (alone == answered[outcome.number].answer)
    full, mmtok, _ = judge(Dataset("three", answered, "exact"), asked.outcomes, 3, seed=0)
    assert full.score == 1 and full.fidelity.kl == 0 and full.fidelity.top1 == full.fidelity.same == 1
    assert mmtok.fidelity.kl > 0 and mmtok.retention and mmtok.retention.value == mmtok.score == mmtok.fidelity.same


def test_images_without_answers_have_fidelity_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    dataset = Dataset("three", samples, None)
    for verdict in judge(dataset, run(tiny_sdpa, dataset).outcomes, 3, seed=0):
        assert verdict.asked == 0 and verdict.score is verdict.retention is verdict.flips is None
        assert 0 <= verdict.fidelity.top1 <= 1


def damaged() -> NoReturn:
    raise MMTokError("damaged.png is damaged")


def test_an_unreadable_image_costs_its_sample_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    bad = replace(samples[1], images=ClosedImages((damaged,)))
    asked = run(tiny_sdpa, Dataset("three", [samples[0], bad, samples[2]], None))
    assert [(u.number, u.problem) for u in asked.unread] == [(1, "damaged.png is damaged")]
    assert {o.number for o in asked.outcomes} == {0, 2}
    assert not run(tiny_sdpa, Dataset("three", [bad] * 3, None)).outcomes


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


def test_a_budget_that_cannot_be_met_ends_its_case_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    cases = [CASES[0], Case("mmtok", make_method("mmtok"), Budget(count=30)), CASES[1]]
    asked = run(tiny_sdpa, Dataset("three", samples, None), cases, batch_size=1)
    (refusal,) = asked.refusals  # and it is not asked about the third
    assert (refusal.case, refusal.reason) == (1, "refused")
    assert "more than the 24 vision tokens of picture-1" in refusal.message
    assert [o.number for o in asked.outcomes if o.case == 1] == [0]
    assert [o.number for o in asked.outcomes if o.case == 2] == [0, 1, 2]


def test_a_question_that_is_too_long_costs_its_sample_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    endless = replace(samples[1], question="word " * 3000)
    asked = run(tiny_sdpa, Dataset("three", [samples[0], endless, samples[2]], None), batch_size=3)
    assert [u.number for u in asked.unread] == [1] and {o.number for o in asked.outcomes} == {0, 2}


@pytest.mark.parametrize("name", ["full", "mmtok"])
def test_memory_that_runs_out(
    name: str, tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = quality.forced_logits

    def forced(model: Llava, method: Method, *arguments: Any, **options: Any) -> Any:
        if isinstance(method, type(make_method(name))):
            raise MemoryError
        return usual(model, method, *arguments, **options)

    monkeypatch.setattr(quality, "forced_logits", forced)
    monkeypatch.setattr(fidelity, "forced_logits", forced)
    asked = run(tiny_sdpa, Dataset("three", samples, None), batch_size=1)
    assert [(r.case, r.reason, r.message) for r in asked.refusals] == [
        (["full", "mmtok"].index(name), "out of memory", "MemoryError")
    ]
    assert {o.case for o in asked.outcomes} == (set() if name == "full" else {0, 2})


def test_an_interrupt_keeps_what_was_asked(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_batch = parallel.ask_batch

    def stop(model: Llava, cases: list[Case], dataset: Dataset, numbers: list[int], *rest: Any) -> object:
        if 2 in numbers:
            raise KeyboardInterrupt
        return ask_batch(model, cases, dataset, numbers, *rest)

    monkeypatch.setattr(parallel, "ask_batch", stop)
    items: list[Item] = []
    with pytest.raises(KeyboardInterrupt):
        for found in ask_all(
            tiny_sdpa, CASES, Dataset("three", samples, None), processes=Processes(), batch_size=2, max_new_tokens=STEPS
        ):
            items += [item for batch in found for item in batch.items]
    assert {o.number for o in asked_of(items).outcomes} == {0, 1}


def test_verdicts_by_hand() -> None:
    """POPE: F1 is the score; two questions about each image; one flip each way and one more lost."""
    truth = ["yes", "no", "yes", "no", "yes", "no"]
    said = {0: ["Yes", "No", "Yes", "Yes", "Yes", "No"], 1: ["No", "No", "No", "No", "Yes", "No"]}
    kinds = ["random", "popular"] * 3
    asked = [
        Sample((), f"q{i}", (f"image-{i // 2}",), answer=known, kind=kind)
        for i, (known, kind) in enumerate(zip(truth, kinds, strict=True))
    ]
    outcomes = [
        Outcome(case, i, text, float(text.lower() == truth[i]), Closeness(0.5 * case, 1 - 0.25 * case, case == 0))
        for case, texts in said.items()
        for i, text in enumerate(texts)
    ]
    baseline, method = judge(Dataset("pope", asked, "yes-no"), outcomes, 2, seed=0)
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
    assert method.asked == 6


def test_soft_accuracies_are_averaged_and_split_in_the_middle() -> None:
    asked = [Sample((), "?", (str(i),), answers=("a", "a", "b")) for i in range(2)]
    scores = {0: [2 / 3, 2 / 3], 1: [2 / 3, 1 / 3]}
    outcomes = [
        Outcome(case, i, "a", score, Closeness(0, 1, True))
        for case, row in scores.items()
        for i, score in enumerate(row)
    ]
    _, method = judge(Dataset("vqa", asked, "vqa"), outcomes, 2, seed=0)
    assert method.score == pytest.approx(0.5) and method.retention and method.retention.value == pytest.approx(0.75)
    assert method.flips and (method.flips.right_right, method.flips.right_wrong) == (1, 1)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = Path(parallel_quality.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(script), str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    alone = parallel_quality.ask(Processes())
    assert not [name for name in found["threads"] if "gloo" in name]  # they could abort the process on its way out
    assert (found["count"], found["batches"]) == (2, [[0, 1], [2, 3], [4]])
    assert (alone["count"], alone["batches"]) == (1, [[0], [1], [2], [3], [4]])
    assert found["outcomes"] == [[*o[:4], pytest.approx(o[4], rel=1e-4, abs=1e-6), o[5]] for o in alone["outcomes"]]
    full = {number: text for number, case, text, *_ in found["outcomes"] if case == 0}
    assert all(same == (text == full[number]) for number, _, text, _, _, same in found["outcomes"])
    mixed = [{o[5] for o in found["outcomes"] if o[1] == 1 and o[0] // 3 == batch} for batch in range(5)]
    assert {True, False} in mixed  # what one sample of a batch says does not hang on the others


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MMTokError, match="need the accelerate library") as error, join_processes():
        pass
    assert error.value.hint == "pip install 'mmtok[accelerate]'"
