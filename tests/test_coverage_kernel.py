"""The kernel's picks are those of the torch form: run by Triton's interpreter, and compiled for a GPU without one."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import golden_cases, golden_tensors
from torch import Tensor

from mmtok_cli.methods import coverage
from mmtok_cli.methods.coverage import coverage_matrix, greedy, greedy_exhaustive

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def in_kernel(arguments: list[Any], options: dict[str, Any]) -> tuple[Any, Any]:
    from mmtok_cli.methods.coverage_kernel import greedy_in_kernel

    torch.set_num_threads(1)
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arguments]
    more = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    order, gains = greedy_in_kernel(*tensors, **more)
    return order.numpy(), gains.numpy()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
    """`greedy_in_kernel` in a process where Triton interprets kernels, which is settled when it is imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            process.submit(int).result()  # starts it

        def run(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            plain = [x.numpy() if isinstance(x, Tensor) else x for x in arguments]
            more = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in options.items()}
            order, gains = process.submit(in_kernel, plain, more).result()
            return torch.from_numpy(order), torch.from_numpy(gains)

        yield run


def problem(kind: str, batch: int, n: int, targets: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    matrix = torch.rand(batch, n, targets, generator=g)
    if kind == "integers":
        return matrix.mul(3).floor()
    if kind == "four tokens":
        return matrix[:, torch.randint(4, (n,), generator=g)].contiguous()
    return matrix if kind == "random" else torch.zeros_like(matrix)


@pytest.mark.parametrize("kind", ["random", "integers", "four tokens", "zero"])
@pytest.mark.parametrize("tile", [(16, 32), (8, 128)])
def test_same_picks_in_a_batch_with_ties_and_excluded_tokens(
    interpreted: Callable[..., tuple[Tensor, Tensor]], kind: str, tile: tuple[int, int]
) -> None:
    matrix = problem(kind, 2, 35, 70)  # neither fills the last tile
    excluded = torch.rand(2, 35, generator=torch.Generator().manual_seed(1)) < 0.3
    order, gains = interpreted(matrix, 12, excluded, tile=tile)
    expected = greedy_exhaustive(matrix, 12, excluded)
    assert order.tolist() == expected[0].tolist() and order.dtype == torch.int64
    torch.testing.assert_close(gains, expected[1])


def test_targets_of_zeros_at_the_end_change_no_bit(interpreted: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Questions of several lengths are padded so."""
    matrix, excluded = problem("random", 2, 16, 70), torch.zeros(2, 16, dtype=torch.bool)
    padded = torch.nn.functional.pad(matrix, (0, 70))  # to the end of the tile and beyond
    for a, b in zip(interpreted(padded, 4, excluded), interpreted(matrix, 4, excluded), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["factor", "bonus"])
def test_same_picks_with_a_prior(interpreted: Callable[..., tuple[Tensor, Tensor]], name: str) -> None:
    matrix, prior = problem("integers", 2, 20, 30), torch.rand(2, 20, generator=torch.Generator().manual_seed(2))
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    order, gains = interpreted(matrix, 20, nothing, **{name: prior}, tile=(8, 32))
    expected = greedy_exhaustive(matrix, 20, nothing, **{name: prior})
    assert order.tolist() == expected[0].tolist()
    torch.testing.assert_close(gains, expected[1])


def test_no_pick(interpreted: Callable[..., tuple[Tensor, Tensor]]) -> None:
    order, gains = interpreted(torch.ones(2, 5, 3), 0, torch.zeros(2, 5, dtype=torch.bool))
    assert order.shape == gains.shape == (2, 0)


@pytest.mark.parametrize("case", golden_cases("mmtok", "selector"))
def test_golden_selections(interpreted: Callable[..., tuple[Tensor, Tensor]], case: dict[str, Any]) -> None:
    tensors, parameters = golden_tensors("mmtok", case), case["params"]
    names = ("text_token_embedding", "vision_tokens", "vision_tokens_clip")
    matrix = coverage_matrix(
        *(tensors[name][None] for name in names),
        alpha=parameters["alpha"],
        text_temperature=parameters["tv_temp"],
        vision_temperature=parameters["vv_temp"],
    )
    excluded = torch.zeros(matrix.shape[:2], dtype=torch.bool)
    if "padding_patch_indices" in tensors:
        excluded[0, tensors["padding_patch_indices"]] = True
    k = min(parameters["k"], 24)  # any first part of the picks is what a smaller budget gives
    order, _ = interpreted(matrix, k, excluded, tile=(256, 1024))
    assert order[0].tolist() == tensors["expected_pick_order"][:k].tolist()


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mmtok_cli.methods.coverage_kernel import _pick as kernel

    pointers = {"alive": "*i8", "token_of_part": "*i32", "order": "*i64"}
    numbers = {"pick", "n", "targets", "parts", "k"}
    constants = {"WITH_FACTOR": True, "WITH_BONUS": True, "ROWS": 16, "TARGETS": 128, "PARTS": 256}
    types = {
        name: "constexpr" if name in constants else "i32" if name in numbers else pointers.get(name, "*fp32")
        for name in kernel.arg_names
    }
    source, target = ASTSource(kernel, types, constexprs=constants), GPUTarget("cuda", capability, 32)
    compiled = compile(source, target=target, options={"enable_fp_fusion": False})
    assert compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 5])
def test_picks_on_a_gpu_are_those_of_the_cpu(batch: int) -> None:
    matrix = problem("random", batch, 576, 584)
    nothing = torch.zeros(batch, 576, dtype=torch.bool)
    assert coverage._kernel(torch.device("cuda", torch.cuda.current_device())) is not None
    order, _ = greedy(matrix.cuda(), 64, nothing.cuda())
    assert order.tolist() == greedy_exhaustive(matrix, 64, nothing)[0].tolist()
