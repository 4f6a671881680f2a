"""Greedy coverage: equal to the paper's plain loop, near the optimum, indifferent to batches, and lazy indeed."""

from collections.abc import Callable, Iterator
from itertools import combinations
from math import e
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import coverage
from mmtok_cli.methods.coverage import coverage_matrix, greedy_exhaustive, greedy_lazy, select_tokens


def lazy_on_a_device(*args: Any) -> tuple[Tensor, Tensor]:
    """The lazy form as it runs where the matrix does not lie in the memory of the host."""
    with mock.patch.object(coverage, "_on_host", lambda x: False):
        return greedy_lazy(*args)[:2]


GREEDY: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lazy": lambda *args: greedy_lazy(*args)[:2],
    "lazy on a device": lazy_on_a_device,
    "exhaustive": greedy_exhaustive,
}
seeds = st.integers(0, 2**31)
properties = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations wait for each other's threads where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_loop(matrix: Tensor, k: int, excluded: Tensor) -> tuple[list[int], list[float]]:
    """Algorithm 2 of the paper, word for word, on one image's `[n, targets]`: the oracle."""
    best = torch.zeros(matrix.shape[1])
    order: list[int] = []
    gains: list[float] = []
    for _ in range(k):
        gain = (matrix - best).clamp(min=0).sum(1)
        gain[excluded] = -torch.inf
        gain[order] = -torch.inf
        order.append(int(gain.argmax()))
        gains.append(float(gain[order[-1]]))
        best = torch.maximum(best, matrix[order[-1]])
    return order, gains


def random_tokens(seed: int, n: int, m: int, d: int = 8, batch: int = 1, kind: str = "random") -> list[Tensor]:
    """text, projected, features of a batch; "ties" draws from a handful of small integer vectors."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, m, d), (batch, n, d), (batch, n, d)]
    if kind == "ties":
        return [torch.randint(-1, 2, shape, generator=g).float() for shape in shapes]
    return [torch.randn(shape, generator=g) for shape in shapes]


def clustered(seed: int, n: int, d: int, clusters: int = 24) -> Tensor:
    """Features as a ViT's: a common part, a few kinds of patches, and variation within each kind."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randn(clusters, d, generator=g)[torch.randint(clusters, (n,), generator=g)]
    return torch.randn(d, generator=g) + kinds + 0.5 * torch.randn(n, d, generator=g)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A matrix [b, n, targets] of any nastiness, an exclusion mask, and a feasible k."""
    batch, n, targets = draw(st.integers(1, 3)), draw(st.integers(1, 90)), draw(st.integers(1, 70))
    g = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["random", "integers", "four tokens", "zero", "sparse"]))
    matrix = torch.rand(batch, n, targets, generator=g)
    if kind == "integers":
        matrix = matrix.mul(3).floor()
    elif kind == "four tokens":
        matrix = matrix[:, torch.randint(min(4, n), (n,), generator=g)].contiguous()
    elif kind == "zero":
        matrix = torch.zeros_like(matrix)
    elif kind == "sparse":
        matrix = matrix.where(matrix > 0.9, 0)
    excluded = torch.rand(batch, n, generator=g) < draw(st.sampled_from([0.0, 0.4, 0.9]))
    eligible = int((~excluded).sum(1).min())
    return matrix, excluded, draw(st.sampled_from([eligible, eligible // 2, min(eligible, 3)]))


@pytest.mark.parametrize("name", GREEDY)
@settings(max_examples=250, deadline=None, derandomize=True)
@given(problem=problems())
def test_equals_the_plain_loop_to_the_bit(name: str, problem: tuple[Tensor, Tensor, int]) -> None:
    matrix, excluded, k = problem
    order, gains = GREEDY[name](matrix, k, excluded)
    for image in range(len(matrix)):
        assert (order[image].tolist(), gains[image].tolist()) == plain_loop(matrix[image], k, excluded[image])


@pytest.mark.parametrize("n", [300, 700])
@pytest.mark.parametrize("name", GREEDY)
def test_equals_the_plain_loop_with_more_ties_than_a_block_holds(name: str, n: int) -> None:
    for matrix in (torch.ones(1, n, 5), torch.zeros(1, n, 5), torch.eye(n)[None], torch.eye(7).repeat(n // 7, 1)[None]):
        excluded = torch.zeros(matrix.shape[:2], dtype=torch.bool)
        excluded[:, :3] = True
        k = matrix.shape[1] - 3
        order, gains = GREEDY[name](matrix, k, excluded)
        assert (order[0].tolist(), gains[0].tolist()) == plain_loop(matrix[0], k, excluded[0])


@properties
@given(seed=seeds, n=st.integers(1, 9), m=st.integers(0, 4), kind=st.sampled_from(["random", "ties"]), data=st.data())
def test_within_one_minus_one_over_e_of_the_best(seed: int, n: int, m: int, kind: str, data: st.DataObject) -> None:
    tokens = random_tokens(seed, n, m, kind=kind)
    k = data.draw(st.integers(1, n))
    matrix = coverage_matrix(*tokens)[0]
    best = max(float(matrix[list(subset)].amax(0).sum()) for subset in combinations(range(n), k))
    text, projected, features = tokens
    found = select_tokens(text, projected, features, k)
    reached = float(matrix[found.order[0]].amax(0).sum())
    assert reached >= (1 - 1 / e) * best - 1e-6
    assert float(found.gains.sum()) == pytest.approx(reached, rel=1e-5)


@properties
@given(seed=seeds, n=st.integers(2, 60), kind=st.sampled_from(["random", "ties"]))
def test_gains_fall_and_prefixes_nest(seed: int, n: int, kind: str) -> None:
    text, projected, features = (x[0] for x in random_tokens(seed, n, 3, kind=kind))
    whole = select_tokens(text, projected, features, n)
    assert whole.indices.tolist() == list(range(n))
    assert (whole.gains[1:] <= whole.gains[:-1] + 1e-6).all() and (whole.gains >= 0).all()
    for k in (0, 1, n // 2):
        part = select_tokens(text, projected, features, k)
        assert part.order.tolist() == whole.order[:k].tolist()
        assert part.indices.tolist() == sorted(part.order.tolist())
        assert torch.equal(part.gains, whole.gains[:k])


@pytest.mark.parametrize("n", [16, 196, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=seeds, kind=st.sampled_from(["random", "ties"]))
def test_batch_equals_single(n: int, dtype: torch.dtype, seed: int, kind: str) -> None:
    text, projected, features = (x.to(dtype) for x in random_tokens(seed, n, 6, d=32, batch=4, kind=kind))
    g = torch.Generator().manual_seed(seed)
    excluded = torch.rand(4, n, generator=g) < 0.2
    mask = torch.rand(4, 6, generator=g) < 0.6  # real words anywhere; some image may have none
    k = n // 3
    batch = select_tokens(text, projected, features, k, excluded=excluded, text_mask=mask)
    with mock.patch.object(coverage, "_on_host", lambda x: False):  # one search for questions of any length
        at_once = select_tokens(text, projected, features, k, excluded=excluded, text_mask=mask)
    shared = select_tokens(text[0], projected, features, k)
    for i in range(4):
        single = select_tokens(text[i][mask[i]], projected[i], features[i], k, excluded=excluded[i])
        for field in ("indices", "order", "gains"):
            assert torch.equal(getattr(batch, field)[i], getattr(single, field))
            assert torch.equal(getattr(at_once, field)[i], getattr(single, field))
        single = select_tokens(text[0], projected[i], features[i], k)
        assert torch.equal(shared.order[i], single.order) and torch.equal(shared.gains[i], single.gains)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_equals_single_at_full_size(threads: int) -> None:
    torch.set_num_threads(threads)
    projected = torch.stack([clustered(i, 576, 256) for i in range(3)])
    features = torch.stack([clustered(9 + i, 576, 128) for i in range(3)])
    text = projected[:, 7:15] + 0.1
    batch = select_tokens(text, projected, features, 96)
    for i in range(3):
        single = select_tokens(text[i], projected[i], features[i], 96)
        assert torch.equal(batch.order[i], single.order) and torch.equal(batch.gains[i], single.gains)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.2, 1e-3])
def test_zero_rows_are_harmless(dtype: torch.dtype, temperature: float) -> None:
    text, projected, features = (x[0].to(dtype) for x in random_tokens(0, 300, 4, d=16))
    for x in (text, projected, features):
        x[1:3] = 0
    features[200:] = 0
    for n in (30, 300):
        tokens = text, projected[:n], features[:n]
        matrix = coverage_matrix(*(x[None] for x in tokens), vision_temperature=temperature)
        assert matrix.isfinite().all() and (matrix >= 0).all()
        found = select_tokens(*tokens, n, vision_temperature=temperature)
        assert found.gains.isfinite().all() and found.indices.tolist() == list(range(n))
    nothing = torch.zeros(30, 16, dtype=dtype)
    assert select_tokens(nothing[:2], nothing, nothing, 5).order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n", [100, 1296])
def test_the_lowest_of_equal_tokens_goes_first(n: int) -> None:
    projected, features = clustered(0, n, 64), clustered(1, n, 48)
    twins = torch.randperm(n, generator=torch.Generator().manual_seed(2))[: n // 4 * 2].view(2, -1).sort(0).values
    projected[twins[1]], features[twins[1]] = projected[twins[0]], features[twins[0]]
    place = select_tokens(projected[:6] + 1, projected, features, n).order.argsort()
    assert (place[twins[0]] < place[twins[1]]).all()


def test_matrix_is_that_of_the_paper() -> None:
    text, projected, features = random_tokens(1, 700, 5)  # more than one block of the symmetric product
    unit = [torch.nn.functional.normalize(x[0].double(), dim=-1) for x in (text, projected, features)]
    text_part = (unit[0] @ unit[1].T / 0.02).softmax(1) / 5
    vision_part = (unit[2] @ unit[2].T / 0.2).softmax(1) / 700 * 0.5
    expected = torch.cat([text_part, vision_part]).T
    torch.testing.assert_close(coverage_matrix(text, projected, features)[0].double(), expected, rtol=2e-4, atol=1e-12)


def test_the_published_formula_vectors() -> None:
    """Recorded from the official selector; the order was confirmed in float64."""
    j, d_llm, d_vis, i = torch.arange(24.0)[:, None], torch.arange(8.0), torch.arange(6.0), torch.arange(3.0)[:, None]
    projected = torch.sin(0.7 * j + 1.3 * d_llm + 0.1 * j * d_llm)
    features = torch.cos(0.5 * j * (d_vis + 1))
    text = torch.sin(1.1 * i + 0.9 * d_llm + 0.3)
    border = torch.zeros(24, dtype=torch.bool)
    border[[0, 1, 2, 3, 20, 21, 22, 23]] = True
    for temperature, excluded, order, of_text, of_vision in (
        (0.02, None, [0, 1, 18, 15, 21, 16, 19, 11], 0.995031, 0.151838),
        (0.01, None, [0, 1, 18, 15, 21, 16, 19, 11], 0.999928, 0.151838),
        (0.02, border, [13, 14, 18, 16, 15, 17, 19, 4], 0.000016, 0.156638),
    ):
        found = select_tokens(text, projected, features, 8, text_temperature=temperature, excluded=excluded)
        assert found.order.tolist() == order and found.indices.tolist() == sorted(order)
        matrix = coverage_matrix(text[None], projected[None], features[None], text_temperature=temperature)[0]
        covered = matrix[order].amax(0)
        assert float(covered[:3].sum()) == pytest.approx(of_text, abs=1e-6)
        assert float(covered[3:].sum()) == pytest.approx(of_vision, abs=1e-6)


def test_one_kind_of_target_alone() -> None:
    text, projected, features = (x[0] for x in random_tokens(3, 40, 4))
    only_text = select_tokens(text, projected, None, 10)
    assert only_text.order.tolist() == select_tokens(text, projected, features, 10, alpha=0).order.tolist()
    only_vision = select_tokens(None, projected, features, 10)
    assert only_vision.order.tolist() == select_tokens(text[:0], projected, features, 10, alpha=2).order.tolist()
    assert float(only_text.gains.sum()) <= 1 + 1e-6 and float(only_vision.gains.sum()) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 21}, "cannot keep 21 vision tokens: 20 of 20 are eligible"),
        ({"k": -1}, "cannot keep -1 vision tokens"),
        ({"k": 16, "excluded": torch.arange(20) < 5}, "15 of 20 are eligible"),
        ({"k": 20, "excluded": torch.arange(20) < 1}, "19 of 20 are eligible"),
        ({"excluded": torch.zeros(19, dtype=torch.bool)}, "shapes"),
        ({"excluded": torch.tensor([1, 2])}, "shapes"),
        ({"text": torch.ones(3, 7)}, "shapes"),
        ({"text": torch.ones(2, 3, 8)}, "shapes"),
        ({"features": torch.ones(19, 8)}, "shapes"),
        ({"projected": torch.ones(8)}, "shapes"),
        ({"projected": torch.ones(0, 20, 8), "features": torch.ones(0, 20, 8)}, "shapes"),
        ({"text_mask": torch.ones(2, dtype=torch.bool)}, "shapes"),
        ({"alpha": -0.1}, "alpha"),
        ({"text_temperature": 0.0}, "temperature"),
        ({"text": None, "features": None}, "nothing to cover"),
        ({"text": torch.zeros(0, 8), "alpha": 0}, "nothing to cover"),
        ({"features": torch.full((20, 8), torch.nan)}, "NaN"),
        ({"projected": torch.full((20, 8), torch.inf)}, "NaN"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    text, projected, features = (x[0] for x in random_tokens(0, 20, 3))
    arguments = {"text": text, "projected": projected, "features": features, "k": 5} | change
    with pytest.raises(MMTokError, match=message):
        select_tokens(**arguments)  # type: ignore[arg-type]


def test_no_tokens_at_all() -> None:
    for n in (0, 5, 300):
        found = select_tokens(torch.ones(2, 8), torch.ones(n, 8), torch.ones(n, 4), 0)
        assert found.order.shape == found.indices.shape == found.gains.shape == (0,)
        assert found.order.dtype == torch.int64 and found.gains.dtype == torch.float32


def test_the_default_dtype_does_not_matter() -> None:
    text, projected, features = (x[0] for x in random_tokens(4, 50, 3))
    expected = select_tokens(text, projected, features, 9)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = select_tokens(text, projected, features, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.order, expected.order) and torch.equal(found.gains, expected.gains)


def test_few_tokens_are_looked_at_again() -> None:
    """A clock-free measure of speed: the plain loop looks at 2880 tokens for every pick."""
    matrix = coverage_matrix(clustered(0, 8, 96)[None], clustered(1, 2880, 96)[None], clustered(2, 2880, 64)[None])
    order, _, evaluated = greedy_lazy(matrix, 640, torch.zeros(1, 2880, dtype=torch.bool))
    assert order.unique().numel() == 640
    assert evaluated / 640 <= 60


def test_identical_tokens_come_to_an_end() -> None:
    same = torch.ones(600, 8)
    matrix = coverage_matrix(same[None, :2], same[None], same[None])
    order, _, evaluated = greedy_lazy(matrix, 600, torch.zeros(1, 600, dtype=torch.bool))
    assert order[0].tolist() == list(range(600))
    assert evaluated <= 600 * 600
