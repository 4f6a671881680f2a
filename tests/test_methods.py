"""The catalogue, and methods that come from other packages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import accepted, make_method, method_class, method_names
from mmtok_cli.methods.full import Full
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import reduce
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import Selection


@dataclass(frozen=True)
class LargestNorm(Method):
    """Keeps the tokens of largest norm."""

    summary: ClassVar[str] = "tokens of largest norm"
    power: float = 2.0

    def select(self, vision, text, budget):
        norms = vision.projected.norm(p=self.power, dim=-1).masked_fill(~vision.eligible, -1)
        return Selection(norms.topk(budget).indices.sort().values)
'''


@pytest.fixture()
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package, as pip would have installed it."""
    (tmp_path / "largest_norm.py").write_text(PACKAGE)
    info = tmp_path / "largest_norm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: largest-norm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmtok.methods]\nlargest-norm = largest_norm:LargestNorm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("largest_norm", None)


def vision(rows: int = 4, columns: int = 6, eligible: list[int] | None = None) -> VisionTokens:
    n = rows * columns
    mask = torch.ones(n, dtype=torch.bool)
    if eligible is not None:
        mask = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(eligible), True)
    generator = torch.Generator().manual_seed(0)
    projected, features = torch.randn(n, 8, generator=generator), torch.randn(n, 5, generator=generator)
    return VisionTokens(projected, features, (rows, columns), mask, "image", lambda rows: rows)


TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


@pytest.mark.usefixtures("installed_package")
def test_method_of_another_package() -> None:
    assert "largest-norm" in method_names()
    method = make_method("largest-norm", power=1.0)
    image = vision()
    kept = method.select(image, TEXT, 3).indices
    assert set(kept.tolist()) == set(image.projected.abs().sum(1).topk(3).indices.tolist())


def test_signal_that_nobody_offers_is_refused(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    @dataclass(frozen=True)
    class Curious(Full):
        signals: ClassVar[tuple[str, ...]] = ("heartbeat",)

    with pytest.raises(MMTokError, match="does not offer heartbeat"):
        reduce(tiny_sdpa, Curious(), samples, None)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(MMTokError, match="no method 'unifrom'") as error:
        method_class("unifrom")
    assert "did you mean uniform" in error.value.hint


def test_only_known_parameters_are_passed_on() -> None:
    assert accepted("random", {"seed": 3, "alpha": 1}) == {"seed": 3}
    assert accepted("mmtok", {"seed": 3, "alpha": 1}) == {"alpha": 1}


def test_every_method_explains_itself() -> None:
    for name in method_names():
        method = method_class(name)
        assert (
            method.summary
            and method.__doc__
            and method.acts in ("before the encoder", "between encoder and language model")
        )


@pytest.mark.parametrize("budget", range(1, 24))
def test_uniform_is_exact_for_every_budget(budget: int) -> None:
    kept = make_method("uniform").select(vision(), TEXT, budget).indices
    assert len(kept) == len(set(kept.tolist())) == budget and kept.equal(kept.sort().values)


def test_uniform_spreads_over_rows_and_columns() -> None:
    kept = make_method("uniform").select(vision(6, 6), TEXT, 9).indices
    assert kept.tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]


def test_pool_averages_what_each_cell_holds() -> None:
    image = vision()
    pooled: Selection = make_method("resize:pool").select(image, TEXT, 6)
    assert pooled.tokens is not None and pooled.tokens.shape == (6, 8)
    first_cell = image.projected.view(4, 6, 8)[:2, :2].reshape(-1, 8).mean(0)
    torch.testing.assert_close(pooled.tokens[0], first_cell)
    assert pooled.indices.tolist() == [7, 9, 11, 19, 21, 23]


def test_pool_leaves_padding_out() -> None:
    inside = [r * 6 + c for r in (1, 2) for c in range(6)]
    image = vision(eligible=inside)
    pooled: Selection = make_method("resize:pool").select(image, TEXT, 3)
    assert pooled.tokens is not None
    torch.testing.assert_close(pooled.tokens.mean(0), image.projected[inside].mean(0))
    assert set(pooled.indices.tolist()) <= set(inside)


def test_ablations_of_mmtok_differ_as_they_should() -> None:
    image = vision()
    both, text, sight = (make_method(name).select(image, TEXT, 5) for name in ("mmtok", "mmtok:text", "mmtok:vision"))
    other = TextTokens("Is there a dog?", lambda words: -torch.ones(len(words), 8))
    assert make_method("mmtok:vision").select(image, other, 5).indices.equal(sight.indices)
    assert not make_method("mmtok:text").select(image, other, 5).indices.equal(text.indices)
    assert both.order is not None and text.order is not None
    assert both.order[0] == text.order[0]  # the text term is far sharper
