"""Clock, FLOPs, memory, summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode

from mmtok_cli import hooks
from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import is_out_of_memory
from mmtok_cli.methods import make_method
from mmtok_cli.models.foreign_errors import errors_as
from mmtok_cli.models.llava import Llava
from mmtok_cli.results.records import TimedRun
from mmtok_cli.results.run_directory import RunDirectory
from mmtok_cli.results.schedule import Turn, interleaved
from mmtok_cli.results.schema import Comparison, Environment, Schedule
from mmtok_cli.rules import Rules
from mmtok_cli.stages import STAGES
from mmtok_cli.timing import rounds, runner
from mmtok_cli.timing.clock import Clock
from mmtok_cli.timing.flops import SeenOperators, count_flops, coverage, formulas, measure_flops
from mmtok_cli.timing.runner import run_case, run_round
from mmtok_cli.timing.summary import summarise_case


def test_clock_sums_what_passes_in_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made; encode ends; select begins and ends; prefill ends; encode ends; read.
    readings = iter([1.0, 1.05, 1.06, 1.08, 1.15, 1.18, 1.2])
    monkeypatch.setattr("mmtok_cli.timing.clock.time", SimpleNamespace(perf_counter=lambda: next(readings)))
    clock = Clock(torch.device("cpu"))
    with clock.stage("encode"):
        pass
    with clock.stage("prefill"), clock.stage("select"):  # the inner stage interrupts the outer one
        pass
    with clock.stage("encode"):
        pass
    seconds = clock.seconds()
    assert seconds == pytest.approx({"encode": 0.1, "prefill": 0.08, "select": 0.02, "ttft": 0.2, "total": 0.2})


def test_clock_counts_at_least_what_was_slept() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.stage("select"):
        time.sleep(0.02)
    assert clock.seconds()["select"] >= 0.02


@pytest.mark.gpu
def test_clock_times_the_gpu_and_not_the_launch() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    _ = a @ a
    clock = Clock(device)
    with clock.stage("prefill"):
        for _ in range(10):
            _ = a @ a
    assert clock.seconds()["prefill"] > 10 * 2 * 8192**3 / 2e15


@pytest.fixture()
def cases() -> list[Case]:
    return [
        Case("full", make_method("full"), None),
        Case("mmtok", make_method("mmtok"), Budget(count=4)),
        Case("none", make_method("none"), None),
    ]


def test_flops_equal_the_formula(tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]) -> None:
    """Matrix products and attention of the tiny decoder, counted by hand (attention in full, as torch does)."""
    reduced = run_case(tiny_sdpa, cases[1], samples[:1], 1)
    s = reduced.tokens[0].kept + reduced.tokens[0].text
    d, kv, mlp, layers, vocabulary = 48, 24, 64, tiny_sdpa.layer_count, len(tiny_sdpa.tokenizer)
    per_layer = 2 * s * (2 * d * d + 2 * d * kv + 3 * d * mlp) + 2 * 2 * s * s * d
    expected = layers * per_layer + 2 * d * vocabulary
    flops = count_flops(tiny_sdpa, cases[1], samples[:1], 1)
    assert flops["prefill"] == pytest.approx(expected, rel=0.01)
    assert flops["total"] == sum(value for stage, value in flops.items() if stage != "total")


def test_flops_say_what_they_are_made_of(tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]) -> None:
    flops = measure_flops(tiny_sdpa, cases[1], samples[:1], 2)
    assert flops.stages == count_flops(tiny_sdpa, cases[1], samples[:1], 2)
    seen = flops.coverage
    assert {"mm", "addmm", "convolution"} <= seen.counted.keys() and seen.missed == {}
    assert any("attention" in name for name in seen.counted)
    assert 0 < sum(seen.counted.values()) < seen.calls and 0 < seen.share < 0.5
    full = measure_flops(tiny_sdpa, cases[0], samples[:1], 2).coverage
    assert seen.calls > full.calls  # MMTok's loop is element-wise


def test_products_that_no_formula_counts_are_named() -> None:
    aten = torch.ops.aten
    calls = Counter({aten.mm: 3, aten.mv: 2, aten.add: 7, aten.cummax: 1, aten._int_mm: 4, aten.linear: 1})
    formulas = {aten.mm: None}
    seen = coverage(calls, formulas)
    assert seen.calls == 18 and seen.counted == {"mm": 3} and seen.missed == {"_int_mm": 4, "mv": 2, "linear": 1}
    with SeenOperators() as counter:
        torch.ones(2, 2) @ torch.ones(2)
    assert coverage(counter.calls, formulas).missed == {"mv": 1}


@pytest.fixture()
def flash_attn() -> Iterator[None]:
    """Operators with the names and arguments that flash-attn 2.7 and later registers, which compute nothing."""
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p) -> Tensor")
        library.define(
            "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
            "SymInt max_seqlen_q, SymInt max_seqlen_k) -> Tensor"
        )
        library.define("fwd(Tensor q) -> Tensor")
        for name in ("_flash_attn_forward", "_flash_attn_varlen_forward", "fwd"):
            library.impl(name, lambda q, *_: q.clone(), "CPU")
        yield


def test_flash_attention_is_counted_like_torchs_own(flash_attn: None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 4, 8, generator=generator), torch.randn(2, 7, 2, 8, generator=generator)
    packed, bounds = torch.randn(10, 4, 8, generator=generator), torch.tensor([0, 3, 10])

    def flops(run: Callable[[], Any], **custom: Any) -> int:
        counter = FlopCounterMode(display=False, custom_mapping=formulas())
        with torch.inference_mode(), SeenOperators() as seen, counter:
            run()
        covered = coverage(seen.calls, counter.flop_registry, "flash_attention_2")
        assert covered.missed == {} and "attn" in next(iter(covered.counted))
        return counter.get_total_flops()

    ops = torch.ops.flash_attn
    assert flops(lambda: ops._flash_attn_forward(q, k, k, 0.0)) == 2 * 2 * (2 * 4) * 5 * 7 * 8
    expected = 2 * 2 * 4 * (3**2 + 7**2) * 8
    assert flops(lambda: ops._flash_attn_varlen_forward(packed, packed, packed, bounds, bounds, 7, 7)) == expected


def test_attention_that_no_formula_counts_is_named(flash_attn: None) -> None:
    aten, ops = torch.ops.aten, torch.ops.flash_attn
    known = {aten.mm, *formulas()}
    named = {str(ops._flash_attn_forward), str(aten._scaled_dot_product_flash_attention_for_cpu)}
    assert named <= set(map(str, known))
    calls = Counter({aten.mm: 3, ops.fwd: 2, aten._cudnn_attention_forward: 1, aten.add: 1})
    seen = coverage(calls, known, "flash_attention_2")
    assert seen.missed == {"flash_attn.fwd": 2, "_cudnn_attention_forward": 1}
    # What an older release runs is not seen at all, and must not be taken for counted.
    assert coverage(Counter({aten.mm: 3}), known, "flash_attention_2").missed == {"flash_attention_2": 0}
    assert coverage(Counter({aten.mm: 3}), known, "sdpa").missed == {}


def test_running_out_of_memory_has_many_faces() -> None:
    gone = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
    errors = [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        SafetensorError("Error while memory-mapping: Cannot allocate memory (os error 12)"),
        *map(
            RuntimeError,
            (
                gone,
                "DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.",
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
                "MPS backend out of memory (MPS allocated: 1 GB, other allocations: 2 GB, max allowed: 3 GB).",
            ),
        ),
    ]
    for error in errors:
        assert is_out_of_memory(error), error
        with pytest.raises(type(error)), errors_as("the weights cannot be loaded", ""):  # it is no damage of files
            raise error
    for error in (RuntimeError("shapes do not fit"), ValueError(gone), KeyboardInterrupt()):
        assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_rounds_and_their_summary(tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]) -> None:
    groups = {1: [[sample] for sample in samples]}
    order = interleaved(3, 4, seed=0)
    rounds = []
    for number, permutation in enumerate(order):
        turns = [Turn(case, number % 3) for case in permutation]
        runs = list(run_round(tiny_sdpa, cases, groups, number, turns, max_new_tokens=2))
        assert [run.case for run in runs] == permutation and {run.round for run in runs} == {number}
        rounds.append(sorted(runs, key=lambda run: run.case))
    flops = [count_flops(tiny_sdpa, case, groups[1][0], 2) for case in cases]
    of_case = [[runs[i] for runs in rounds] for i in range(3)]
    full, mmtok, none = results = [
        summarise_case(case.id, of_case[i], of_case[0] if i else None, flops[i]) for i, case in enumerate(cases)
    ]
    assert full.speedup == {} and mmtok.speedup.keys() >= {"encode", "prefill", "ttft", "total"}
    assert all(result.score is result.retention is result.fidelity is None for result in results)  # times alone
    assert mmtok.tokens.kept == mmtok.tokens.layer_average == 4 and none.tokens.kept == 0
    assert full.tokens.new == 2 and full.seconds["ttft"].median < full.seconds["total"].median
    assert full.memory.kv_cache > mmtok.memory.kv_cache > none.memory.kv_cache
    assert full.memory.peak is None and full.memory.host > 0
    assert {result.positions for result in results} == {"renumber"}
    shares = [runs[1].seconds["select"] / (runs[1].seconds["encode"] + runs[1].seconds["prefill"]) for runs in rounds]
    assert mmtok.overhead == pytest.approx(np.median(shares))

    comparison = Comparison(
        model="tiny",
        rules=Rules(),
        environment=environment_of(tiny_sdpa),
        schedule=Schedule(
            data="demo", max_new_tokens=2, seed=0, samples=3, batch_size=1, rounds=4, warmup=0, order=order
        ),
        interrupted=False,
        results=results,
    )
    assert Comparison.model_validate_json(comparison.model_dump_json(by_alias=True)) == comparison


def test_results_say_the_positions_that_were_in_force(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    def positions(name: str, rules: Rules) -> str:
        case = Case(name, make_method(name), Budget(count=4), rules)
        runs = [run_case(tiny_sdpa, case, samples[:1], 1)]
        return summarise_case(case.id, runs, None, {}).positions

    assert positions("fastv", Rules()) == "keep" and positions("mmtok", Rules()) == "renumber"
    assert positions("fastv", Rules(track="harmonised")) == tiny_sdpa.positions[0]
    assert positions("fastv", Rules(positions="renumber")) == "renumber"
    assert positions("mmtok", Rules(track="harmonised", positions="keep")) == "keep"


def test_a_round_runs_its_turns_in_their_order(tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]) -> None:
    """On batches that are opened once each; a case that is given up leaves the others alone."""
    opened: list[int] = []

    class Counting(Sample):
        def open(self) -> Sample:
            opened.append(1)
            return super().open()

    counting = [Counting(s.images, s.question, s.image_ids) for s in samples]
    cases = [cases[0], cases[1], replace(cases[0], batch_size=2)]
    batches = {1: [[counting[0]], [counting[1]]], 2: [counting[:2]]}
    given_up: list[tuple[int, int]] = []

    def attempt(case: int, number: int, work: Callable[[], TimedRun]) -> TimedRun | None:
        if case == 1:
            given_up.append((case, number))
            return None
        return work()

    turns = [Turn(2, 0), Turn(0, 1), Turn(1, 1)]
    runs = list(run_round(tiny_sdpa, cases, batches, 5, turns, max_new_tokens=1, runs=2))
    assert [(run.case, run.round, run.batch, len(run.samples)) for run in runs] == [
        (2, 5, 0, 2),
        (0, 5, 1, 1),
        (1, 5, 1, 1),
    ]
    assert len(opened) == 3 and all(len(run.repetitions["total"]) == 2 for run in runs)
    again = run_round(tiny_sdpa, cases, batches, 5, turns, max_new_tokens=1, attempt=attempt)
    assert [run.case for run in again] == [2, 0] and given_up == [(1, 5)]


def test_environment_names_what_was_measured_on(tiny_sdpa: Llava) -> None:
    environment: Environment = environment_of(tiny_sdpa)
    assert environment.torch == torch.__version__ and environment.attention == "sdpa"
    assert environment.dtype == "float32" and environment.device == "cpu" and environment.threads > 0


def test_checks_of_what_a_method_returns_count_in_no_stage(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither between encoder and language model nor inside, where they interrupt `select` and `prefill`."""
    values = hooks._check_values

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        values(*arguments)

    monkeypatch.setattr(hooks, "_check_values", slow)
    for method in (make_method("random"), make_method("fastv", layer=1)):
        timed = run_case(tiny_sdpa, Case("x", method, Budget(count=8)), samples[:1], 1)
        assert set(timed.seconds) == {*STAGES, "ttft", "total"} and timed.seconds["total"] < 0.2


def test_a_gpu_warms_up_with_every_shape(
    tiny_sdpa: Llava, samples: list[Sample], cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses kernels and allocates memory by shapes; the shape of a second batch must not be new in a timed run."""
    asked: list[str] = []
    monkeypatch.setattr(rounds, "run_case", lambda model, case, batch, **length: asked.append(batch[0].image_ids[0]))
    plan = SimpleNamespace(warmup=2, options=SimpleNamespace(timed_length={}, find_batch=False))
    store = SimpleNamespace(plan=plan, counted={0: None}, failures={})
    twin = replace(samples[0], image_ids=("twin",))
    batches = {1: [[sample] for sample in (samples[0], samples[1], twin, samples[2])]}
    measurement = rounds.Measurement(tiny_sdpa, cases[:1], batches, cast(RunDirectory, store))
    list(measurement.warm_up())
    assert asked == ["picture-0", "picture-0"]
    asked.clear()
    monkeypatch.setattr(type(tiny_sdpa), "device", torch.device("cuda"))
    list(measurement.warm_up())
    assert asked == ["picture-0", "picture-0", "picture-1", "picture-2"]
    asked.clear()
    plan.warmup = 0
    list(measurement.warm_up())
    assert asked == []


def test_reserved_memory_is_that_of_the_case_alone(
    tiny_sdpa: Llava, samples: list[Sample], cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocator that keeps what it ever held until its caches are emptied."""
    held = [700]
    monkeypatch.setattr(runner, "release_memory", lambda device: held.__setitem__(0, 0))

    def allocating(model: Llava, case: Case, *_: Any, **__: Any) -> SimpleNamespace:
        held[0] = max(held[0], {"full": 500, "mmtok": 90, "none": 80}[case.name])
        return SimpleNamespace(reserved=held[0])

    monkeypatch.setattr(runner, "run_case", allocating)
    assert runner.reserved_memory(tiny_sdpa, cases[1], samples[:1], 1) is None and held == [700]
    monkeypatch.setattr(type(tiny_sdpa), "device", torch.device("cuda"))
    assert [runner.reserved_memory(tiny_sdpa, case, samples[:1], 1) for case in cases] == [500, 90, 80]


def test_the_result_has_the_reserved_memory_of_the_case_alone(
    tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]
) -> None:
    runs = [run_case(tiny_sdpa, cases[1], samples[:1], 1).model_copy(update={"reserved": 10**9}) for _ in range(2)]
    assert summarise_case(cases[1].id, runs, None, {}, reserved=123).memory.reserved == 123
