"""CDPruner on the crops of an image against the outputs of the authors' own code (see golden_cases.py)."""

from typing import Any

import pytest
import torch
from golden_cases import golden_cases, golden_tensors, require_cases
from torch import Tensor

from mmtok_cli.methods.cdpruner import CDPruner
from mmtok_cli.pipeline import SelectionTask
from mmtok_cli.pipeline import select as select_tokens
from mmtok_cli.tokens import Crops, TextTokens, VisionTokens

CASES = golden_cases("cdpruner_next")


def cut_image(tensors: dict[str, Tensor]) -> VisionTokens:
    """The crops of a case as the pipeline hands them to a method; their tokens are packed one crop after another."""
    projected, embeds = tensors["image_features"].float(), tensors["image_embeds"].float()
    crops, n, _ = projected.shape
    everything = torch.ones(crops * n, dtype=torch.bool)

    def tokens(rows: Tensor, image_id: str, **more: Any) -> VisionTokens:
        return VisionTokens(rows, rows, (1, len(rows)), everything[: len(rows)], image_id, lambda x: x, **more)

    places = torch.arange(crops * n).view(crops, n)
    text = tensors["text_embeds"].float()
    tiles = [
        tokens(projected[i], f"image#{i}", signals={"clip_image_embeds": embeds[i], "clip_text_embeds": text})
        for i in range(crops)
    ]
    return tokens(projected.flatten(0, 1), "image", crops=Crops(tuple(tiles), places, places))


def select(cases: list[dict[str, Any]]) -> list[list[list[int]]]:
    """What is kept of each crop of each case's image, all images in one batch."""
    tensors = [golden_tensors("cdpruner_next", case) for case in cases]
    images = [cut_image(each) for each in tensors]
    budgets = [case["params"]["keep"] * len(each["image_features"]) for case, each in zip(cases, tensors, strict=True)]
    text = TextTokens("Where?", lambda words: torch.zeros(len(words), 4))
    kept = []
    tasks = [SelectionTask(image, text, budget) for image, budget in zip(images, budgets, strict=True)]
    for each, chosen in zip(tensors, select_tokens(CDPruner(), tasks), strict=True):
        crops, n, _ = each["image_features"].shape
        places = chosen.indices
        kept.append([(places[places // n == crop] - crop * n).sort().values.tolist() for crop in range(crops)])
    return kept


def test_cases_are_there() -> None:
    require_cases("cdpruner_next")


@pytest.mark.parametrize("case", CASES)
def test_selection(case: dict[str, Any]) -> None:
    (kept,) = select([case])
    expected = golden_tensors("cdpruner_next", case)["expected_indices"].sort(1).values
    assert kept == expected.tolist()


def test_images_of_a_batch_do_not_share_a_scale() -> None:
    require_cases("cdpruner_next")
    cases = [param.values[0] for param in CASES]
    assert select([*cases, cases[0]]) == [select([case])[0] for case in [*cases, cases[0]]]
