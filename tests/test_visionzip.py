"""VisionZip: how budgets are split, what is merged, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.methods.visionzip import zip_tokens
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

TEXT = TextTokens("Is there a cat?", lambda words: torch.ones(len(words), 8))
PROJECTOR = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def vision(rows: int = 4, columns: int = 6, padding: tuple[int, ...] = (), seed: int = 0) -> VisionTokens:
    """An image of random tokens whose padding attracts the class token more than anything else."""
    n = rows * columns
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, generator=generator)
    eligible = torch.ones(n, dtype=torch.bool).index_fill(0, torch.tensor(padding, dtype=torch.int64), False)
    signals = {
        "class_attention": torch.rand(2, n, generator=generator).masked_fill(~eligible, 2.0),
        "mean_keys": torch.randn(n, 3, generator=generator),
        "class_feature": torch.randn(5, generator=generator),
    }
    return VisionTokens(
        features @ PROJECTOR, features, (rows, columns), eligible, "image", lambda x: x @ PROJECTOR, signals
    )


def zipped(image: VisionTokens, budget: int, **parameters: Any) -> Selection:
    return make_method("visionzip", **parameters).select(image, TEXT, budget)


def zip_image(image: VisionTokens, dominant: int, contextual: int, merge: Any = "sum") -> tuple[Tensor, Tensor]:
    seen = (image.signals[name] for name in ("class_feature", "class_attention", "mean_keys"))
    return zip_one(image.features, *seen, splits=(dominant, contextual), eligible=image.eligible, merge=merge)


def zip_one(
    *given: Tensor, splits: tuple[int, int], eligible: Tensor | None = None, merge: Any = "sum"
) -> tuple[Tensor, Tensor]:
    """`zip_tokens` of one image."""
    allowed = None if eligible is None else [eligible]
    rows, places = zip_tokens(*(each[None] for each in given), *splits, eligible=allowed, merge=merge)
    return rows[0], places[0]


def split(selection: Selection, image: VisionTokens) -> tuple[list[int], list[int]]:
    """Dominant patches and targets: the former are the longest ascending beginning that the class token likes best."""
    places = selection.indices.tolist()
    assert places[0] == -1
    scores = image.signals["class_attention"].sum(0)
    count = next(
        c
        for c in range(len(places) - 1, -1, -1)
        if sorted(scores.topk(c).indices.tolist()) == places[1 : c + 1] and sorted(places[c + 1 :]) == places[c + 1 :]
    )
    return places[1 : count + 1], places[count + 1 :]


@pytest.mark.parametrize(
    ("budget", "dominant", "contextual"), [(192, 162, 30), (128, 108, 20), (64, 54, 10), (32, 27, 5)]
)
def test_published_splits(budget: int, dominant: int, contextual: int) -> None:
    image = vision(24, 24)
    selection = zipped(image, budget)
    patches, targets = split(selection, image)
    assert (1 + len(patches), len(targets)) == (dominant, contextual)
    assert selection.kept == len(selection.tokens) == budget
    assert len(selection.places) == budget - 1 == len(set(selection.places.tolist()))


@pytest.mark.parametrize("budget", range(1, 24))
def test_every_budget_is_met(budget: int) -> None:
    selection = zipped(vision(), budget)
    places = selection.indices.tolist()
    assert len(places) == len(set(places)) == len(selection.tokens) == budget
    assert selection.tokens.isfinite().all()


def test_full_budget_keeps_the_image_as_it_is() -> None:
    image = vision()
    selection = zipped(image, image.total)
    assert selection.indices.tolist() == list(range(24))
    assert selection.tokens is None


def test_three_tokens_and_fewer_are_not_merged() -> None:
    image = vision()
    for budget in (1, 2, 3):
        best = image.signals["class_attention"].sum(0).topk(budget - 1).indices.sort().values
        selection = zipped(image, budget)
        assert selection.indices.tolist() == [-1, *best.tolist()]
        expected = torch.cat([image.signals["class_feature"][None], image.features[best]])
        torch.testing.assert_close(selection.tokens, image.project(expected))
    assert len(split(zipped(image, 4), image)[1]) == 1


def test_the_class_token_and_contextual_tokens_alone() -> None:
    selection = zipped(vision(), 5, contextual=4)
    assert selection.indices.tolist() == [-1, 0, 6, 12, 18]


@pytest.mark.parametrize("contextual", [0, 1, 5])
def test_split_can_be_given(contextual: int) -> None:
    image = vision()
    assert [len(part) for part in split(zipped(image, 10, contextual=contextual), image)] == [
        9 - contextual,
        contextual,
    ]


def test_merging_by_hand() -> None:
    """Patches 0, 1, 3, 4, 5 are left; 0 and 3 are targets; 1 and 4 go to 0, and 5 to 3."""
    features = torch.tensor([[1.0], [10.0], [7.0], [100.0], [20.0], [300.0]])
    attention = torch.tensor([[0.1, 0.1, 0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.3, 0.2, 0.1, 0.1]])
    keys = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 0.0], [0.0, 2.0], [0.5, 0.4], [-1.0, 1.0]])
    rows, places = zip_one(features, torch.tensor([-1.0]), attention, keys, splits=(2, 2))
    assert places.tolist() == [-1, 2, 0, 3]
    assert rows.squeeze(1).tolist() == [-1.0, 7.0, 1 + 15, 100 + 300]
    averaged, same = zip_one(features, torch.tensor([-1.0]), attention, keys, splits=(2, 2), merge="mean")
    assert same.equal(places)
    torch.testing.assert_close(averaged.squeeze(1), torch.tensor([-1.0, 7.0, 31 / 3, 200.0]))


@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_target_without_members_is_just_the_target(merge: Any) -> None:
    """Targets 0 and 2 have the same key, so the first gets all."""
    features, keys = torch.tensor([[1.0], [2.0], [4.0], [6.0]]), torch.ones(4, 2)
    rows, places = zip_one(features, torch.zeros(1), torch.rand(2, 4), keys, splits=(1, 2), merge=merge)
    assert places.tolist() == [-1, 0, 2]
    assert rows[2].item() == 4.0
    torch.testing.assert_close(rows[1].item(), 1 + 4.0 if merge == "sum" else 3.0)


def test_every_patch_dominant_or_a_target() -> None:
    image = vision()
    rows, places = zip_image(image, 15, 10)
    assert sorted(places.tolist()) == list(range(-1, 24))
    assert rows[1:].equal(image.features[places[1:]])


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("budget", [1, 2, 7, 13, 19])
def test_padding_takes_no_part(budget: int, merge: str) -> None:
    """With padding barred, an image is zipped as if it consisted of the other patches alone."""
    padding = (0, 1, 2, 3, 20, 23)
    image = vision(padding=padding)
    left = image.eligible.nonzero().squeeze(1)
    cropped = VisionTokens(
        image.projected[left],
        image.features[left],
        (1, len(left)),
        torch.ones(len(left), dtype=torch.bool),
        "cropped",
        image.project,
        {
            "class_attention": image.signals["class_attention"][:, left],
            "mean_keys": image.signals["mean_keys"][left],
            "class_feature": image.signals["class_feature"],
        },
    )
    contextual = round(budget / 6.4)
    selection = zipped(image, budget, merge=merge)
    rows, places = zip_image(cropped, budget - contextual, contextual, merge)
    assert not set(selection.indices.tolist()) & set(padding)
    assert selection.indices[1:].equal(left[places[1:]])
    torch.testing.assert_close(selection.tokens, image.project(rows))


def test_infeasible_budgets_are_refused() -> None:
    image = vision(padding=(0, 1, 2, 3))
    assert zipped(image, 21).kept == 21  # the class token needs no place
    with pytest.raises(MMTokError, match="22 is more than the class token and the 20 ") as refusal:
        zipped(image, 22)
    assert refusal.value.hint == "choose 1 to 21, or all 24"
    with pytest.raises(MMTokError, match="8 is less than the class token and 10 contextual") as refusal:
        zipped(image, 8, contextual=10)
    assert refusal.value.hint == "choose 11 to 21, or all 24"
    with pytest.raises(MMTokError, match="cannot make 21 contextual tokens of the 20 ") as refusal:
        zipped(image, 22, contextual=21)
    assert refusal.value.hint == "choose at most 20 contextual tokens"


@pytest.mark.parametrize(("dominant", "contextual"), [(0, 3), (26, 0), (20, 6), (3, -1)])
def test_impossible_splits_are_refused(dominant: int, contextual: int) -> None:
    image = vision()
    with pytest.raises(MMTokError, match=f"do not make {dominant} dominant and {contextual} contextual"):
        zip_image(image, dominant, contextual)


@pytest.mark.parametrize("parameters", [{"merge": "median"}, {"contextual": -1}])
def test_unknown_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(MMTokError, match="cannot"):
        make_method("visionzip", **parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_keeps_the_data_type_and_does_not_overflow(dtype: torch.dtype) -> None:
    n = 64
    features = torch.full((n, 4), 3000.0, dtype=dtype)  # the sum of 60 of them is more than float16 holds
    attention, keys = torch.rand(2, n), torch.randn(n, 3).to(dtype)
    rows, _ = zip_one(features, features[0], attention, keys, splits=(2, 1))
    assert rows.dtype == dtype
    torch.testing.assert_close(rows[-1].float(), torch.full((4,), 6000.0), rtol=0.01, atol=0)


def test_the_authors_shares_for_qwen_hold_where_there_is_no_class_token() -> None:
    """576 tokens: int(0.45 n) + int(0.05 n) of 50 % and int(0.65 n) + int(0.05 n) of 70 %, one fewer than of LLaVA."""
    method, qwen = make_method("visionzip"), ("received_attention", "mean_keys")
    for share, on_qwen, on_llava in ((0.5, 287, 288), (0.7, 402, 403), (0.3, 172, 172)):
        assert method.count(share, 576, qwen) == on_qwen
        assert method.count(share, 576, type(method).signals) == on_llava
