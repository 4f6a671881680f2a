"""What can be shown of GPUs without one, on pretend CUDA devices (see pretend_cuda.py)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pretend_counts
import pytest
import torch
from pretend_cuda import KERNEL, OUTSIDE, Counts, PretendTensor, counting, in_process, on_gpu, pretend
from test_matrix import BUDGET, INSIDE, tiny_method
from tiny_models import FAMILIES, LAYERS

from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Answers, answer
from mmtok_cli.stages import CHECK
from mmtok_cli.timing.clock import Clock


def counts_of_operators() -> dict[str, Any]:
    counts = Counts()
    values = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    with counting(counts), torch.inference_mode():
        with counts.stage("copies"):
            here = values.to("cuda")
            there = here.to("cuda:1")
            torch.zeros(2).to("cuda", non_blocking=True)
            back = there.cpu()
            torch.tensor([1, 2], device="cuda")
        with counts.stage("views"):
            column = here[:, 1]
            column.view(2, 1).expand(2, 3).T.unsqueeze(0)
        with counts.stage("work"):
            product = here @ here
            column.add_(1)
            order = here.argsort()
        with counts.stage("waits"):
            read = (float(product[0, 0]), here.tolist(), bool((here > 0).all()))
            chosen = here[here > 2]
            here[[0]]
    assert isinstance(here, PretendTensor) and str(here.device) == "cuda:0" and str(there.device) == "cuda:1"
    return {
        "table": counts.table(),
        "copies": dict(counts.copies),
        "back": back.tolist(),
        "read": read,
        "chosen": chosen.held.tolist(),
        "order": order.held.tolist(),
    }


def test_operators_are_counted_and_compute() -> None:
    found = in_process(counts_of_operators)
    assert found["table"] == {"copies": (3, 5), "work": (0, 7), "waits": (5, 14)}
    assert found["copies"] == {"copies": 5, "waits": 2}
    assert found["back"] == [[3.0, 1.0], [2.0, 4.0]]
    assert found["read"] == (11.0, [[3.0, 2.0], [2.0, 5.0]], True)
    assert found["chosen"] == [3.0, 5.0] and found["order"] == [[1, 0], [0, 1]]


def errors_of_mixed_devices() -> list[str]:
    found = []
    with counting():
        here, there, host = pretend(torch.ones(3)), pretend(torch.ones(3), 1), torch.ones(3)
        here + torch.tensor(1.0)  # a single value
        here[torch.tensor([0])]  # indices
        operators = (lambda: here + there, lambda: here * host, lambda: torch.cat([here, host]), lambda: host[here > 0])
        for mixed in operators:
            try:
                mixed()
            except RuntimeError as error:
                found.append(str(error))
    return found


def test_operators_that_mix_devices_fail() -> None:
    found = in_process(errors_of_mixed_devices)
    assert len(found) == 4 and all("on the same device" in error for error in found)


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs

# Gemma 3 runs nothing inside its language model, and experts are chosen on a GPU by an operator that a CPU lacks.
SPREAD = [family for family in FAMILIES if family not in ("gemma3", "qwen3_vl_moe")]


def spread(model: Any) -> Any:
    """Put the second half of the decoder layers on a second GPU with accelerate's hooks, as `--device-map` does."""
    from accelerate import dispatch_model, hooks

    language = "model.language_model"
    places = {f"model.{name}": 0 for name, _ in model.model.named_children() if name != "language_model"}
    places |= {f"model.{name}": 0 for name, _ in model.model.named_parameters(recurse=False)}
    places |= {f"{language}.{name}": 1 for name, _ in model.model.language_model.named_children() if name != "layers"}
    layers = range(len(model.model.language_model.layers))
    places |= {f"{language}.layers.{layer}": int(layer >= LAYERS // 2) for layer in layers}
    places |= {f"{language}.embed_tokens": 0, "lm_head": 1}
    on_gpu(model, lambda name: places[max((part for part in places if name.startswith(part)), key=len)])
    hooks.set_module_tensor_to_device = lambda *_, **__: None  # they are where they belong
    return dispatch_model(model, {name: torch.device("cuda", number) for name, number in places.items()})


def answers_on_two_gpus(family: str, names: list[str], samples: list[Sample]) -> dict[str, Any]:
    """For each method, what a model answers on the CPU and spread over two GPUs, by what is compared."""
    alone, two = FAMILIES[family]("sdpa"), FAMILIES[family]("sdpa")
    spread(two.model)
    methods = {name: tiny_method(name, family) for name in names}
    late = ("fastv", "random:inside") if not two.linear_layers else ()
    methods |= {f"{name} behind the border": make_method(name, layer=LAYERS - 1) for name in late}
    found = {}
    for name, method in methods.items():
        with counting():
            given = answer(two, method, samples, BUDGET, max_new_tokens=2)
        found[name] = compared(answer(alone, method, samples, BUDGET, max_new_tokens=2)), compared(given)
    return found


def compared(answers: Answers) -> tuple[list[list[int]], list[str], Any]:
    """Kept tokens, texts and logits."""
    kept = [selection.indices.tolist() for selection in answers.selections]
    return kept, answers.texts, answers.first_logits.tolist()


@pytest.mark.parametrize("family", SPREAD)
def test_methods_inside_a_model_that_is_spread_over_gpus(family: str, samples: list[Sample]) -> None:
    names = INSIDE if family in ("llava", "qwen2_5_vl") else ["sparsevlm", "pace"]  # by text, and by the encoder
    for case, (expected, given) in in_process(answers_on_two_gpus, family, names, samples[:2]).items():
        assert given[:2] == expected[:2], case
        assert given[2] == [pytest.approx(row, abs=5e-5, rel=1e-4) for row in expected[2]], case


def timed(model: VisionLanguageModel, method: Method, samples: list[Sample]) -> tuple[dict[str, float], Counts, float]:
    """By stage, milliseconds under the clock; what was counted; and the milliseconds of the whole run."""
    counts = Counts()
    with counting(counts):
        clock = Clock(*model.devices)
        first = clock.now()

        @contextmanager
        def stage(name: str) -> Iterator[None]:
            with counts.stage(name), clock.stage(name):
                yield

        answer(model, method, samples, BUDGET if method.takes_budget else None, max_new_tokens=2, stage=stage)
        last = clock.now()
        seconds = clock.stages()
    return {name: 1000 * value for name, value in seconds.items()}, counts, first.elapsed_time(last)


def stages_on_two_gpus(samples: list[Sample]) -> tuple[dict[str, float], dict[str, int]]:
    model = FAMILIES["llava"]("sdpa")
    spread(model.model)
    # The cut is made on the second GPU.
    milliseconds, counts, _ = timed(model, make_method("fastv", layer=LAYERS - 1), samples)
    return milliseconds, dict(counts.launches)


def test_the_clock_times_all_gpus(samples: list[Sample]) -> None:
    milliseconds, kernels = in_process(stages_on_two_gpus, samples[:1])
    for stage, found in milliseconds.items():
        assert found == pytest.approx(kernels[stage] * KERNEL, rel=0.1), stage


# ---------------------------------------------------------------------------------------------------------------------
# One GPU


def sums_of_stages(names: list[str], samples: list[Sample]) -> dict[str, tuple[float, float, tuple[int, int]]]:
    """For each method, the sum of its stages and the whole run in milliseconds, and what was counted in no stage."""
    model, found = FAMILIES["llava"]("sdpa"), {}
    on_gpu(model.model)
    for name in names:
        milliseconds, counts, whole = timed(model, tiny_method(name), samples)
        checks = counts.launches[CHECK] * KERNEL
        found[name] = sum(milliseconds.values()) + checks, whole, counts.table().get(OUTSIDE, (0, 0))
    return found


def test_every_moment_of_a_run_belongs_to_a_stage(samples: list[Sample]) -> None:
    for name, (stages, whole, outside) in in_process(sums_of_stages, ["full", "mmtok", "fastv"], samples[:2]).items():
        assert stages == pytest.approx(whole, rel=0.01), name
        assert outside == (0, 0), name


@pytest.mark.parametrize("batch", pretend_counts.BATCHES)
@pytest.mark.parametrize("name", pretend_counts.MODELS)
def test_no_method_waits_or_launches_more_than_before(name: str, batch: int) -> None:
    known = pretend_counts.table()[name, batch]
    most = 1000 if batch == 1 else 600  # what runs more kernels takes long
    methods = tuple(method for method in pretend_counts.METHODS if known.get(method, (0, 0))[1] < most)
    found = in_process(pretend_counts.rows_of, name, batch, methods)
    assert set(found) == {*known} & {*methods}
    grown = {key: (row, known[key]) for key, row in found.items() if any(map(operator.gt, row, known[key]))}
    assert not grown, "more than in pretend_counts.txt: see pretend_counts.py"


def test_selection_does_not_wait_for_the_device() -> None:
    for case, rows in pretend_counts.table().items():
        waits = {method: row[0] for method, row in rows.items()}
        assert {waits[name] for name in ("full", "random", "uniform", "mmtok", "divprune", "visionzip")} == {0}, case
        assert max(found for method, found in waits.items() if method != "mmtok:stack") <= 2, case
        assert waits["mmtok:stack"] <= case[1], case
