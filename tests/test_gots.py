"""GOTS: its picks against QR with pivoting, its lazy form against the plain one, and the method at its limits."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method, pivoted_qr
from mmtok_cli.methods.pivoted_qr import pivoted_rows
from mmtok_cli.tokens import TextTokens, VisionTokens

TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


def rows(seed: int, n: int, d: int, kind: str = "clustered") -> Tensor:
    """Noise, or groups of similar rows with a common part and uneven norms."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=generator)
    if kind == "iid":
        return noise
    groups = torch.randn(7, d, generator=generator)[torch.randint(7, (n,), generator=generator)]
    common = torch.randn(1, d, generator=generator)
    return (0.5 * noise + groups + common) * torch.exp(0.4 * torch.randn(n, 1, generator=generator))


def pivoted(x: Tensor, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`pivoted_rows` of one image."""
    order, energies = pivoted_rows([x], k, None if excluded is None else excluded[None])
    return order[0], energies[0]


@pytest.mark.parametrize("kind", ["clustered", "iid"])
@pytest.mark.parametrize(("n", "d", "k"), [(90, 48, 40), (40, 64, 40), (300, 20, 20)])
def test_picks_are_the_pivots_of_scipy(n: int, d: int, k: int, kind: str) -> None:
    x = rows(n, n, d, kind)
    triangle, pivots = scipy.linalg.qr(x.double().numpy().T, pivoting=True, mode="r")
    order, energies = pivoted(x, k)
    assert order.tolist() == pivots[:k].tolist()
    torch.testing.assert_close(
        energies.double(), torch.from_numpy(np.diag(triangle)[:k] ** 2), rtol=2e-3, atol=1e-5 * float(energies[0])
    )


@pytest.mark.parametrize("sweep", [2, 1000])
@pytest.mark.parametrize("kind", ["clustered", "iid"])
def test_lazy_picks_are_those_of_the_sweep(kind: str, sweep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(3, 400, 150, kind)
    excluded = torch.arange(len(x)) % 7 == 0
    monkeypatch.setattr(pivoted_qr, "_LAZY_FROM", 10_000)
    plain, energies = pivoted(x, 120, excluded)
    for name, value in {
        "_LAZY_FROM": 0,
        "_ADMITTED": 8,
        "_NEAR": 24,
        "_KEPT": 8,
        "_DIRECTIONS": 6,
        "_CHUNK": 16,
    }.items():
        monkeypatch.setattr(pivoted_qr, name, value)
    monkeypatch.setattr(pivoted_qr, "_SWEEP", sweep)
    lazy, same = pivoted(x, 120, excluded)
    assert lazy.tolist() == plain.tolist() and not bool(excluded[lazy].any())
    torch.testing.assert_close(same, energies, rtol=1e-3, atol=1e-5 * float(energies[0]))


@pytest.mark.parametrize("lazy_from", [0, 10_000])
def test_beyond_the_rank_the_largest_norms_follow(lazy_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivoted_qr, "_LAZY_FROM", lazy_from)
    x = rows(5, 60, 40)
    x = x[:, :6] @ rows(6, 6, 40, "iid")  # rank 6
    x[50:] = 0
    x[20:24] = x[20]  # equal rows, and no row comes twice
    order, energies = pivoted(x, 60)
    assert order[:6].tolist() == scipy.linalg.qr(x.double().numpy().T, pivoting=True, mode="r")[1][:6].tolist()
    assert sorted(order.tolist()) == list(range(60)) and energies[6:].tolist() == [0] * 54
    assert order[-10:].tolist() == list(range(50, 60))
    smaller, _ = pivoted(x, 20)
    assert smaller.tolist() == order[:20].tolist()
    zeros, _ = pivoted(torch.zeros(5, 3), 4)
    assert zeros.tolist() == [0, 1, 2, 3]


def test_equal_energies_go_by_index() -> None:
    lazy = [pivoted(torch.eye(2304, 2304), 3)[0].tolist(), pivoted(torch.eye(8).repeat(2, 1), 8)[0].tolist()]
    assert lazy == [[0, 1, 2], list(range(8))]


def test_what_cannot_be_picked_is_refused() -> None:
    x = rows(1, 10, 4)
    with pytest.raises(MMTokError, match="cannot keep 8 vision tokens: 7 of 10 are eligible"):
        pivoted(x, 8, torch.arange(10) < 3)
    for value in (torch.nan, torch.inf):
        with pytest.raises(MMTokError, match="NaN or infinity"):
            pivoted(x.index_fill(0, torch.tensor([4]), value), 2)
    assert pivoted(x, 0)[0].tolist() == []


def test_the_method_reads_features_of_any_length_and_leaves_padding_out() -> None:
    features = rows(2, 24, 16)
    eligible = torch.arange(24) >= 6
    image = VisionTokens(torch.randn(24, 8), features.half(), (4, 6), eligible, "image", lambda x: x)
    method = make_method("gots")
    kept = method.select(image, TEXT, 9)
    assert kept.order is not None
    assert kept.order.tolist() == pivoted(features.half(), 9, ~eligible)[0].tolist()
    assert bool(eligible[kept.indices].all()) and kept.indices.equal(kept.indices.sort().values)
    assert method.count(0.29, 100) == 28
