"""VisPruner against a slow, literal reading of its description, at every budget."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from PIL import Image
from tiny_models import PATCH, VISION, build_tiny_llava, text_config
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.vispruner import important_and_diverse
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import reduce
from mmtok_cli.tokens import TextTokens, VisionTokens

TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))


def image(rows: int, columns: int, padding: tuple[int, ...] = (), seed: int = 0) -> VisionTokens:
    """An image of random tokens whose padding attracts the class token more than anything else."""
    n = rows * columns
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 6, generator=generator)
    eligible = torch.ones(n, dtype=torch.bool).index_fill(0, torch.tensor(padding, dtype=torch.int64), False)
    attention = torch.rand(3, n, generator=generator).masked_fill(~eligible, 2.0)
    return VisionTokens(
        features, features, (rows, columns), eligible, "image", lambda x: x, {"class_attention": attention}
    )


def literal(features: Tensor, attention: Tensor, allowed: list[int], budget: int, ratio: float = 0.5) -> list[int]:
    """The description, step by step over lists."""
    average = attention.mean(0).tolist()
    ranking = sorted(allowed, key=lambda i: (-average[i], i))
    important = int(budget * ratio)
    kept, pool = ranking[:important], ranking[important:]
    if budget == important:
        return sorted(kept)
    while len(pool) > budget - important:
        evens = [token for i, token in enumerate(pool) if i % 2 == 0]
        odds = [token for i, token in enumerate(pool) if i % 2 == 1]
        closest = {
            even: max(float(cosine_similarity(features[even], features[odd], dim=0)) for odd in odds) for even in evens
        }
        evens.sort(key=lambda even: -closest[even])
        pool = evens[min(8, len(pool) - (budget - important)) :] + odds
    return sorted(kept + pool)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 5), (1, 7)])
def test_every_budget_as_described(rows: int, columns: int) -> None:
    vision = image(rows, columns, seed=rows)
    for budget in range(1, vision.total + 1):
        selection = make_method("vispruner").select(vision, TEXT, budget)
        expected = literal(vision.features, vision.signals["class_attention"], list(range(vision.total)), budget)
        assert selection.indices.tolist() == expected
        assert len(expected) == budget
        assert selection.tokens is None


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.9, 1.0])
def test_important_ratio(ratio: float) -> None:
    vision = image(5, 6)
    attention = vision.signals["class_attention"]
    for budget in (1, 2, 9, 20, 29):
        selection = make_method("vispruner", important_ratio=ratio).select(vision, TEXT, budget)
        assert selection.indices.tolist() == literal(vision.features, attention, list(range(30)), budget, ratio)
        best = attention.mean(0).topk(int(budget * ratio)).indices
        assert set(best.tolist()) <= set(selection.indices.tolist())


@pytest.mark.parametrize("budget", [58, 59, 64, 127, 575])
def test_an_odd_rest_at_full_size(budget: int) -> None:
    """58 of 576 is where the released code fails: 29 important tokens leave 547."""
    vision = image(24, 24)
    indices = make_method("vispruner").select(vision, TEXT, budget).indices
    assert len(indices) == budget
    assert bool((indices[1:] > indices[:-1]).all())


def test_padding_is_left_out_where_it_may_not_be_kept() -> None:
    padding = (0, 1, 2, 3, 4, 5, 19, 23)
    vision = image(4, 6, padding)
    allowed = vision.eligible.nonzero().squeeze(1).tolist()
    for budget in range(1, len(allowed) + 1):
        indices = make_method("vispruner").select(vision, TEXT, budget).indices.tolist()
        assert indices == literal(vision.features, vision.signals["class_attention"], allowed, budget)
        assert not set(indices) & set(padding)
    assert make_method("vispruner").select(vision, TEXT, 24).indices.tolist() == list(range(24))


def test_repetitions_are_thinned_out() -> None:
    """The class token prefers patches in raster order, so every second one is thinned: 0, 2, 4 ... 14."""
    features = torch.eye(8)[torch.arange(16) // 2]  # pairs of equals
    features[[2, 6, 8, 14]] = -1.0  # four that are unlike any patch between
    attention = torch.linspace(0.02, 0.01, 16).expand(2, -1)
    indices = important_and_diverse([features], [attention], 12, 0.0)[0]
    assert set(range(16)) - set(indices.tolist()) == {0, 4, 10, 12}


def test_zero_features_are_harmless() -> None:
    indices = important_and_diverse([torch.zeros(10, 3)], [torch.rand(2, 10)], 5)[0]
    assert len(set(indices.tolist())) == 5


def test_a_ratio_out_of_range_is_refused() -> None:
    for ratio, words in ((-0.1, "not between 0 and 1"), (1.5, "not between 0 and 1"), (float("nan"), "cannot be nan")):
        with pytest.raises(MMTokError, match=words):
            make_method("vispruner", important_ratio=ratio)


def encoder_of_real_size(seed: int) -> Llava:
    """24 x 24 patches, as published models have; weights as transformers draws them."""
    _, processor = build_tiny_llava()
    vision = {**VISION, "image_size": 24 * PATCH, "hidden_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text_config(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    return Llava("real size", LlavaForConditionalGeneration(config).eval(), processor)


@pytest.mark.parametrize("seed", range(3))
def test_an_image_is_selected_alike_alone_and_in_batches(seed: int) -> None:
    """Of flat images, cosines that decide differ by no more than rounding."""
    model, method, budget = encoder_of_real_size(seed), make_method("vispruner"), Budget(count=64)
    flat = [Image.new("RGB", (336, 336), colour) for colour in ("grey", "white", "navy", "green")]
    noisy = [picture(336, 336, seed + i) for i in range(4)]
    half = [Image.new("RGB", (336, 100 + 20 * i), (10, 60, 30 * i)) for i in range(4)]
    for pictures in (flat, noisy, half):
        samples = [Sample((each,), "What is it?", (f"picture-{i}",)) for i, each in enumerate(pictures)]
        alone = [reduce(model, method, [sample], budget).selections[0].indices.tolist() for sample in samples]
        assert all(len(set(kept)) == 64 for kept in alone)
        for size in (2, 4):
            for start in range(0, 4, size):
                together = reduce(model, method, samples[start : start + size], budget).selections
                assert [chosen.indices.tolist() for chosen in together] == alone[start : start + size]
