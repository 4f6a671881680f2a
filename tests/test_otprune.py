"""OTPrune: its kernel by the formula, its picks by determinants, and columns of zeros."""

from __future__ import annotations

import pytest
import torch

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.otprune import covariance_kernel
from mmtok_cli.tokens import TextTokens, VisionTokens

TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


def test_picks_by_determinants_of_the_eligible_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 12, generator=generator) * torch.rand(12, generator=generator)
    rows = torch.cat([rows, torch.zeros(30, 4)], 1)  # columns of zeros have no length to divide by
    eligible = torch.arange(30) >= 3
    unit = torch.nn.functional.normalize(rows[eligible].double(), dim=0)
    kernel = torch.eye(27).double() + 0.5 * (unit @ unit.T) @ (unit @ unit.T)
    torch.testing.assert_close(covariance_kernel(rows[eligible], 0.5).double(), kernel, atol=1e-6, rtol=1e-5)

    order: list[int] = []
    for _ in range(9):
        left = [i for i in range(27) if i not in order]
        volumes = [float(torch.linalg.det(kernel[[*order, i]][:, [*order, i]])) for i in left]
        order.append(left[volumes.index(max(volumes))])
    image = VisionTokens(rows, rows, (5, 6), eligible, "image", lambda x: x)
    kept = make_method("otprune", gamma=0.5).select(image, TEXT, 9)
    assert kept.order is not None and kept.order.tolist() == [3 + i for i in order]


def test_gamma_and_counts() -> None:
    assert make_method("otprune").count(0.098, 576) == 56
    with pytest.raises(MMTokError, match="gamma must be above 0"):
        make_method("otprune", gamma=0.0)
