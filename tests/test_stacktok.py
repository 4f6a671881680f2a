"""StackTok: one budget over the crops of an image, and its gate against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import gated_coverage as gated_coverage_module
from mmtok_cli.methods import make_method
from mmtok_cli.methods.coverage import greedy_exhaustive
from mmtok_cli.methods.gated_coverage import gated_coverage
from mmtok_cli.pipeline import reduce
from mmtok_cli.rules import Rules

WARM = {"text_temperature": 0.3, "vision_temperature": 0.2}  # a gate that opens and closes


def given(seed: int, n: int = 50, words: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 12, generator=generator) for rows in (words, n, n))


def by_definition(text: Tensor, projected: Tensor, features: Tensor, k: int) -> tuple[list[int], set[str]]:
    """The gated picks of one image in float64, and which matrices decided."""
    unit = [torch.nn.functional.normalize(x.double(), dim=-1) for x in (text, projected, features)]
    for_text = (unit[0] @ unit[1].T / WARM["text_temperature"]).softmax(1)
    for_image = (unit[2] @ unit[2].T / WARM["vision_temperature"]).softmax(1)
    nothing = torch.zeros(1, len(projected), dtype=torch.bool)
    alone = greedy_exhaustive(for_image.T[None].contiguous(), k, nothing)[1][0].cumsum(0) / len(projected)
    entropy = -(for_text * for_text.log()).sum(1).mean() / math.log(len(projected))
    demand = min(max(float(entropy), 0.3), 0.9) * torch.cat([alone.new_zeros(1), alone])
    order: list[int] = []
    led = set()
    for step in range(k):
        cover = [m[:, order].amax(1) if order else torch.zeros(len(m)).double() for m in (for_text, for_image)]
        gains = {
            name: (matrix - present[:, None]).relu().mean(0).index_fill(0, torch.tensor(order, dtype=torch.int64), -1)
            for name, matrix, present in (("text", for_text, cover[0]), ("image", for_image, cover[1]))
        }
        name = "text" if cover[1].mean() >= demand[step] and bool((gains["text"] > 0).any()) else "image"
        order.append(int(gains[name].argmax()))
        led.add(name)
    return order, led


def test_picks_as_defined() -> None:
    text, projected, features = given(0)
    expected, led = by_definition(text, projected, features, 20)
    assert led == {"text", "image"}
    nothing = torch.zeros(50, dtype=torch.bool)
    (found,) = gated_coverage(text, [projected], [features], 20, excluded=[nothing], **WARM)
    assert found.order.tolist() == expected


@pytest.mark.parametrize("swap", ["auto", "always"])
@pytest.mark.parametrize(("crops", "n", "words", "k"), [(1, 50, 4, 20), (3, 40, 6, 30), (2, 9, 0, 18), (1, 9, 3, 9)])
def test_the_search_of_a_gpu_finds_the_same(
    crops: int, n: int, words: int, k: int, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, crops without a token that can be picked and budgets of everything included."""
    text = given(9)[0].repeat(2, 1)[:words]
    projected, features = zip(*(given(seed, n)[1:] for seed in range(crops)), strict=True)
    for rows in (*projected, *features):
        rows[n // 2 :] = rows[: n - n // 2].clone()
    excluded = [torch.arange(n) % 7 == 3, *[torch.zeros(n, dtype=torch.bool)] * (crops - 1)]
    k = min(k, sum(int((~mask).sum()) for mask in excluded))
    on_host, on_device = [], []
    for found in (on_host, on_device):
        for options in (WARM, {}):
            found += gated_coverage(text, projected, features, k, excluded=excluded, swap=swap, **options)
        monkeypatch.setattr(gated_coverage_module, "_searched_on_host", gated_coverage_module._searched_on_device)
    for a, b in zip(on_host, on_device, strict=True):
        assert a.picked.tolist() == b.picked.tolist() and a.order.tolist() == b.order.tolist()


def test_an_exchange_raises_the_coverage() -> None:
    text, projected, features = given(1)
    nothing = torch.zeros(50, dtype=torch.bool)
    totals = []
    for swap in ("never", "always"):
        (found,) = gated_coverage(text, [projected], [features], 6, excluded=[nothing], swap=swap, **WARM)
        matrices = [
            (torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T / t).softmax(1)
            for a, b, t in ((text, projected, 0.3), (features, features, 0.2))
        ]
        totals.append(float(sum(matrix[:, found.order].amax(1).mean() for matrix in matrices)))
        assert len(set(found.order.tolist())) == 6
    assert totals[1] > totals[0]


@pytest.mark.parametrize("track", ["released", "harmonised"])
def test_crops_share_one_budget(track: str, samples: list[Sample]) -> None:
    """The crops of an image get what they win, in a batch as alone, and the whole is what the budget says."""
    vlm, method, rules = FAMILIES["llava_next"]("sdpa"), make_method("mmtok:stack"), Rules(track)
    together = reduce(vlm, method, samples, Budget(count=20), rules=rules)
    uneven = False
    for number, sample in enumerate(samples):
        alone = reduce(vlm, method, [sample], Budget(count=20), rules=rules)
        assert alone.selections[0].indices.equal(together.selections[number].indices)
        assert alone.tokens[0].kept == vlm.keep(sample.images[0], Budget(count=20), track)
        crops = together.vision[number].crops
        assert crops is not None
        shares = [int(torch.isin(places[places >= 0], alone.selections[0].indices).sum()) for places in crops.places]
        uneven |= shares != sorted(crops.split(alone.tokens[0].kept), reverse=True)
    assert uneven


def test_what_cannot_be_picked_is_refused() -> None:
    text, projected, features = given(2, 10)
    excluded = torch.arange(10) < 4
    with pytest.raises(MMTokError, match="cannot keep 7 vision tokens: 6 are eligible"):
        gated_coverage(text, [projected], [features], 7, excluded=[excluded])
    with pytest.raises(MMTokError, match="NaN or infinity"):
        gated_coverage(text, [projected.index_fill(0, torch.tensor(3), torch.nan)], [features], 2, excluded=[excluded])
    (found,) = gated_coverage(text[:0], [projected], [features], 6, excluded=[excluded])
    assert sorted(found.order.tolist()) == [4, 5, 6, 7, 8, 9] and found.beta == 0.9
    for parameters in ({"beta_min": 0.9, "beta_max": 0.3}, {"tau_text": 0.0}):
        with pytest.raises(MMTokError, match="0"):
            make_method("mmtok:stack", **parameters)
