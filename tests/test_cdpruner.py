"""CDPruner: its greedy determinant against determinants, its relevance against the formula, both at their limits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.cdpruner import CDPruner, conditional_kernel, greedy_determinant, relevance
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import reduce
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import TextTokens, VisionTokens

seeds = st.integers(0, 2**31)
properties = settings(max_examples=100, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernels(seed: int, batch: int, n: int, d: int) -> Tensor:
    weights = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.1
    return conditional_kernel(normal(seed, batch, n, d), weights)


def brute_force(kernel: Tensor, k: int) -> tuple[list[int], list[float]]:
    """The greedy definition by determinants of submatrices, in float64: the oracle."""
    order: list[int] = []
    gains: list[float] = []
    before = 1.0
    for _ in range(k):
        left = [i for i in range(len(kernel)) if i not in order]
        after = {i: float(torch.linalg.det(kernel[[*order, i]][:, [*order, i]].double())) for i in left}
        order.append(max(left, key=lambda i: after[i]))
        gains.append(after[order[-1]] / before)
        before = after[order[-1]]
    return order, gains


@properties
@given(seed=seeds, n=st.integers(1, 9), batch=st.integers(1, 3), data=st.data())
def test_equals_ratios_of_determinants(seed: int, n: int, batch: int, data: st.DataObject) -> None:
    kernel = kernels(seed, batch, n, d=16)
    k = data.draw(st.integers(0, n))
    order, gains = greedy_determinant(kernel, k)
    for image in range(batch):
        expected_order, expected_gains = brute_force(kernel[image], k)
        assert order[image].tolist() == expected_order
        assert gains[image].tolist() == pytest.approx(expected_gains, rel=1e-3, abs=1e-6)


@st.composite
def degenerate(draw: st.DrawFn) -> Tensor:
    """Kernels of low rank: [batch, n, n]."""
    seed, n, d = draw(seeds), draw(st.integers(2, 80)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(seed)
    projected, weights = torch.randn(2, n, d, generator=g), torch.rand(2, n, generator=g)
    kind = draw(st.sampled_from(["low rank", "duplicates", "zero rows", "all equal", "all zero", "hardly relevant"]))
    if kind == "duplicates":
        projected = projected[:, torch.randint(min(3, n), (n,), generator=g)]
    elif kind == "zero rows":
        projected[:, ::2] = 0
    elif kind == "all equal":
        projected, weights = projected[:, :1].expand(2, n, d), torch.ones(2, n)
    elif kind == "all zero":
        projected = torch.zeros(2, n, d)
    elif kind == "hardly relevant":
        weights = weights.where(weights > 0.8, 1e-6)
    return conditional_kernel(projected, weights)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(kernel=degenerate())
def test_more_picks_than_the_rank_are_harmless(kernel: Tensor) -> None:
    n = kernel.shape[1]
    order, gains = greedy_determinant(kernel, n)
    assert order.sort(1).values.tolist() == [list(range(n))] * 2
    assert gains.isfinite().all() and (gains >= 0).all() and (gains[:, 1:] <= gains[:, :-1]).all()
    part = greedy_determinant(kernel, n // 2)
    assert part[0].equal(order[:, : n // 2]) and torch.allclose(part[1], gains[:, : n // 2], rtol=1e-4, atol=1e-6)


def test_equal_tokens_wait_until_nothing_new_is_left() -> None:
    projected = normal(0, 1, 6, 16).repeat(1, 4, 1)
    order, gains = greedy_determinant(conditional_kernel(projected, torch.ones(1, 24)), 24)
    assert sorted(i % 6 for i in order[0, :6].tolist()) == list(range(6))
    assert (gains[0, :6] > 0.1).all() and (gains[0, 6:] < 1e-5).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_relevance_is_that_of_the_formula(sign: int) -> None:
    image, text = normal(0, 2, 12, 8), normal(1, 3, 8)
    cosine = torch.nn.functional.cosine_similarity(image[:, :, None].double(), text[None, None].double(), dim=-1)
    score = sign * cosine.mean(-1)
    expected = (score - score.min() + 1e-6) / (score.max() - score.min())
    torch.testing.assert_close(relevance(image, text, sign).double(), expected, atol=1e-6, rtol=1e-5)


def test_the_whole_batch_sets_the_scale_of_relevance() -> None:
    image, text = normal(0, 2, 12, 8), normal(1, 1, 8)
    together = relevance(image, text)
    assert float(together.max()) == pytest.approx(1, abs=1e-5) and float(together.min()) < 1e-5
    assert not torch.allclose(together[0], relevance(image[:1], text)[0], atol=1e-3)


def test_the_sign_turns_the_order_round() -> None:
    image, text = normal(0, 1, 12, 8), normal(1, 1, 8)
    released, plain = relevance(image, text), relevance(image, text, 1.0)
    assert released.argsort().equal(plain.argsort(descending=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equally_relevant_tokens_are_all_relevant(dtype: torch.dtype) -> None:
    constant = torch.ones(1, 20, 8, dtype=dtype)
    assert relevance(constant, normal(0, 2, 8).to(dtype)).tolist() == [[1.0] * 20]
    assert relevance(torch.zeros_like(constant), torch.ones(1, 8, dtype=dtype)).tolist() == [[1.0] * 20]


def image_of(projected: Tensor, embeds: Tensor, text: Tensor, eligible: Tensor | None = None) -> VisionTokens:
    everything = torch.ones(len(projected), dtype=torch.bool)
    return VisionTokens(
        projected=projected,
        features=projected,
        grid=(1, len(projected)),
        eligible=everything if eligible is None else eligible,
        image_id="image",
        project=lambda x: x,
        signals={"clip_image_embeds": embeds, "clip_text_embeds": text},
    )


TEXT = TextTokens("Where?", lambda words: torch.zeros(len(words), 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_images(dtype: torch.dtype, value: float) -> None:
    flat = torch.full((36, 8), value, dtype=dtype)
    found = CDPruner().select(image_of(flat, flat, normal(0, 2, 8).to(dtype)), TEXT, 10)
    assert found.indices.tolist() == sorted(set(found.order.tolist())) and found.kept == 10


def test_excluded_tokens_might_as_well_not_be_there() -> None:
    projected, embeds, text = normal(0, 30, 8), normal(1, 30, 6), normal(2, 2, 6)
    eligible = torch.arange(30) % 3 > 0
    embeds[~eligible] = -text[0]  # would set the scale of relevance
    places = eligible.nonzero().squeeze(1)
    found = CDPruner().select(image_of(projected, embeds, text, eligible), TEXT, 9)
    alone = CDPruner().select(image_of(projected[places], embeds[places], text), TEXT, 9)
    assert found.order.equal(places[alone.order])


def crops_of(seed: int, sizes: tuple[int, ...]) -> list[VisionTokens]:
    """Crops of one image of which each is less relevant to the text than the one before."""
    text = normal(seed, 2, 6)
    return [
        image_of(normal(seed + i, n, 8), normal(seed + 10 + i, n, 6) - i * text[0], text)
        for i, n in enumerate(sizes, 1)
    ]


def test_crops_share_one_scale_of_relevance() -> None:
    sizes = (30, 30, 20)
    crops = crops_of(0, sizes)
    embeds = torch.cat([crop.signals["clip_image_embeds"] for crop in crops])
    expected = relevance(embeds[None], crops[0].signals["clip_text_embeds"])[0].split(sizes)
    found = CDPruner().across_crops(crops)
    assert all(crop.signals["relevance"].equal(share) for crop, share in zip(found, expected, strict=True))
    for crop, share in zip(found, expected, strict=True):
        order, _ = greedy_determinant(conditional_kernel(crop.projected[None], share[None]), 9)
        assert CDPruner().select(crop, TEXT, 9).order.equal(order[0])
    alone = [CDPruner().select(crop, TEXT, 9).order for crop in crops]
    assert not all(CDPruner().select(c, TEXT, 9).order.equal(a) for c, a in zip(found, alone, strict=True))


def test_excluded_tokens_of_crops_set_no_scale() -> None:
    crops = crops_of(0, (20, 20))
    plain = CDPruner().across_crops(crops)
    text = crops[0].signals["clip_text_embeds"]
    widened = [
        replace(
            crop,
            projected=torch.cat([crop.projected, crop.projected[:2]]),
            eligible=torch.arange(22) < 20,
            signals={**crop.signals, "clip_image_embeds": torch.cat([crop.signals["clip_image_embeds"], sign * text])},
        )
        for crop, sign in zip(crops, (-9, 9), strict=True)
    ]
    for crop, other in zip(plain, CDPruner().across_crops(widened), strict=True):
        assert CDPruner().select(crop, TEXT, 7).order.equal(CDPruner().select(other, TEXT, 7).order)


def test_refusals() -> None:
    kernel = kernels(0, 1, 5, 8)
    with pytest.raises(MMTokError, match="cannot keep 6 vision tokens: 5 are eligible"):
        greedy_determinant(kernel, 6)
    with pytest.raises(MMTokError, match="NaN"):
        greedy_determinant(conditional_kernel(torch.full((1, 5, 8), torch.nan), torch.ones(1, 5)), 2)
    with pytest.raises(MMTokError, match="relevance sign is 0"):
        CDPruner(relevance_sign=0)


def test_the_question_matters(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    method, budget = make_method("cdpruner"), Budget(count=8)
    image = samples[0].images
    asked = [Sample(image, question, ("same",)) for question in ("Is there a red circle?", "How many stars?")]
    first, second = reduce(tiny_sdpa, method, asked, budget).selections
    assert first.order is not None and second.order is not None and not first.order.equal(second.order)
    plain = reduce(tiny_sdpa, make_method("cdpruner", relevance_sign=1.0), asked[:1], budget).selections[0]
    assert not first.indices.equal(plain.indices)


def test_padding_competes_on_the_released_track_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    method, wide = make_method("cdpruner"), [samples[1]]
    released = reduce(tiny_sdpa, method, wide, Budget(count=34))
    eligible = released.vision[0].eligible
    assert released.selections[0].kept == 34 > int(eligible.sum())
    kept = reduce(tiny_sdpa, method, wide, Budget(count=8), rules=Rules(track="harmonised")).selections[0]
    assert eligible[kept.indices].all()
