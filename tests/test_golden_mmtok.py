"""MMTok against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_directory, golden_items, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.coverage import Coverage, select_tokens
from mmtok_cli.methods.keywords import filter_text, keywords
from mmtok_cli.models.padding import padding_mask

KINDS = {"selector", "core", "degenerate"}


def select(case: dict[str, Any], tensors: dict[str, Tensor], excluded: Tensor | None, k: int) -> Coverage:
    p = case["params"]
    return select_tokens(
        tensors["text_token_embedding"],
        tensors["vision_tokens"],
        tensors["vision_tokens_clip"],
        k,
        alpha=p["alpha"],
        text_temperature=p["tv_temp"],
        vision_temperature=p["vv_temp"],
        excluded=excluded,
    )


def exclusion(tokens: Tensor, tensors: dict[str, Tensor], name: str = "padding_patch_indices") -> Tensor | None:
    if name not in tensors:
        return None
    mask = torch.zeros(tokens.shape[-2], dtype=torch.bool)
    mask[tensors[name]] = True
    return mask


def test_cases_are_there_and_of_known_kinds() -> None:
    require_cases("mmtok")
    assert {param.values[0]["kind"] for param in golden_cases("mmtok")} <= KINDS


@pytest.mark.parametrize("case", golden_cases("mmtok", "selector"))
def test_selector(case: dict[str, Any]) -> None:
    tensors = golden_tensors("mmtok", case)
    found = select(case, tensors, exclusion(tensors["vision_tokens"], tensors), case["params"]["k"])
    assert found.order.tolist() == tensors["expected_pick_order"].tolist()
    assert found.indices.tolist() == tensors["expected_indices"].tolist()


@pytest.mark.parametrize("case", golden_cases("mmtok", "core"))
def test_core(case: dict[str, Any]) -> None:
    tensors = golden_tensors("mmtok", case)
    vision = tensors["vision_tokens"]
    images = vision.unsqueeze(0) if vision.dim() == 2 else vision
    masks = [exclusion(vision, tensors, f"padding_patch_indices.{image}") for image in range(len(images))]
    excluded = torch.stack([torch.zeros(images.shape[1], dtype=torch.bool) if x is None else x for x in masks])
    k = case["params"]["k"]
    if case["params"]["passthrough"]:
        # Not a selection: the released code hands all tokens on, padding too. That is the caller's affair here.
        excluded = torch.zeros_like(excluded)
        k = images.shape[1]
    found = select(case, tensors, excluded[0] if vision.dim() == 2 else excluded, k).indices
    found = found.unsqueeze(0) if vision.dim() == 2 else found
    assert found.tolist() == tensors["expected_indices"].tolist()
    rows = found.unsqueeze(-1).expand(-1, -1, images.shape[-1])
    assert torch.equal(images.gather(1, rows), tensors["expected_features"])


@pytest.mark.parametrize("case", golden_cases("mmtok", "degenerate"))
def test_degenerate_is_better_than_released(case: dict[str, Any]) -> None:
    tensors = golden_tensors("mmtok", case)
    vision, k = tensors["vision_tokens"], case["params"]["k"]
    excluded = exclusion(vision, tensors)
    eligible = len(vision) if excluded is None else int((~excluded).sum())
    if k > eligible:
        with pytest.raises(MMTokError, match=f"{eligible} of {len(vision)}"):
            select(case, tensors, excluded, k)
        k = eligible
    found = select(case, tensors, excluded, k)
    assert len(set(found.order.tolist())) == k
    assert excluded is None or not excluded[found.order].any()
    assert found.gains.isfinite().all() and (found.gains >= 0).all()
    place = {token: i for i, token in enumerate(found.order.tolist())}
    for twin, first in same_tokens(tensors):
        # Of two equal tokens the lower index goes first, unless it may not be picked at all.
        if twin in place and (excluded is None or not excluded[first]):
            assert place[first] < place[twin]


def same_tokens(tensors: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of tokens that are equal before and behind the projector."""
    both = torch.cat([tensors["vision_tokens"], tensors["vision_tokens_clip"]], 1)
    return [(b, a) for b in range(len(both)) for a in range(b) if torch.equal(both[a], both[b])]


@pytest.mark.parametrize("item", golden_items("mmtok", "keywords.json"))
def test_keywords(item: dict[str, str]) -> None:
    assert filter_text(item["input"]) == item["expected"]
    if not item["input"].startswith("<image>"):
        assert keywords(item["input"]) == item["expected"].split()


@pytest.mark.parametrize("item", golden_items("mmtok", "padding.json"))
def test_padding(item: dict[str, Any]) -> None:
    width, height = item["size"]
    mask = padding_mask(width, height)
    if round(min(width, height) * (336 / max(width, height))) == 0:
        assert (~mask).sum() == 24  # the released rule would leave nothing
    else:
        assert mask.nonzero().view(-1).tolist() == sorted(item["expected"])


def test_where_the_cases_are_taken_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MMTOK_GOLDEN", str(tmp_path))
    assert golden_directory("mmtok") == tmp_path / "mmtok"
    assert golden_cases("mmtok") == []
    with pytest.raises(pytest.fail.Exception, match="holds no case"):
        require_cases("mmtok")
