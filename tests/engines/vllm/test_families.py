"""Tiny models of the other families in vLLM and in transformers: the same tokens, positions and answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Engine
from exported import export
from PIL import Image

import mmtok_cli
from mmtok_cli.budget import Budget
from mmtok_cli.configuration import configured_method
from mmtok_cli.data.samples import Sample
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer

METHODS = ["full", "mmtok", "divprune", "visionzip", "random", "uniform", "resize:pool"]
# Multiples of the patches of a token, so that no image is resized: processors with and without torchvision differ.
SIZES = {
    "llava_next": [(168, 84), (84, 168), (168, 168)],
    "qwen2_5_vl": [(112, 168), (280, 196), (196, 196)],
    "qwen3_vl": [(112, 168), (280, 196), (196, 196)],
}


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Cells of 14 pixels, each of a random colour."""
    cells = torch.rand(size[1] // 14, size[0] // 14, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((cells * 255).byte().numpy()).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(
    scope="module",
    params=["llava_next", pytest.param("qwen2_5_vl", marks=pytest.mark.extended), "qwen3_vl"],
)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Engine]
) -> Any:
    """Prompts are read in chunks of 32 tokens, which end within images."""
    directory: Path = export(request.param, tmp_path_factory.mktemp("exported") / request.param)
    model = mmtok_cli.load_model(str(directory))
    return start(directory, model, max_model_len=1024, max_num_batched_tokens=32, limit_mm_per_prompt={"image": 3})


def samples(family: str) -> list[Sample]:
    images = [picture(size, seed) for seed, size in enumerate(SIZES[family])]
    return [
        Sample(tuple(images[i] for i in chosen), question, tuple(f"picture-{i}" for i in chosen))
        for question in ("How many stars?", "What is red here?")
        for chosen in ((0,), (1,), (2, 0))
    ]


def expected(
    model: VisionLanguageModel, name: str, sample: Sample, budget: str
) -> tuple[list[int], list[list[int]], float]:
    """Token ids, the indices kept of each image, and the log-probability of the first token."""
    method = configured_method(name, model.name)
    wanted = Budget.parse(budget) if method.takes_budget else None
    answers = answer(model, method, [sample], wanted, max_new_tokens=6, ignore_eos=True)
    kept = [selection.indices.tolist() for selection in answers.reduced.selections]
    return answers.token_ids[0].tolist(), kept, float(answers.first_logits[0].log_softmax(-1).max())


@pytest.mark.parametrize("budget", ["25%", "6"])
@pytest.mark.parametrize("name", METHODS)
def test_answers_and_indices(engine: Engine, name: str, budget: str) -> None:
    for sample in samples(engine.model.family):
        tokens, kept, likelihood = expected(engine.model, name, sample, budget)
        engine.forget()
        asked = {"method": name, "budget": budget, "question": sample.question, "image_ids": list(sample.image_ids)}
        prompt = engine.prompt(sample, **asked)
        (told,) = engine.ask([prompt], 6, ignore_eos=True)
        assert told.token_ids == tokens and told.likelihood == pytest.approx(likelihood, abs=1e-3)
        if name != "full":
            assert [image["kept"] for image in engine.recorded()] == kept
        assert [told.token_ids for told in engine.ask([prompt], 6, ignore_eos=True)] == [tokens]  # from caches


def test_requests_of_all_kinds_at_once(engine: Engine) -> None:
    """With a shared prefix of the prompt, answered together and again from caches."""
    prompts, alone = [], []
    for sample in samples(engine.model.family):
        for name in METHODS:
            tokens, _, _ = expected(engine.model, name, sample, "25%")
            asked = {"method": name, "budget": "25%", "question": sample.question, "image_ids": list(sample.image_ids)}
            prompts.append(engine.prompt(sample, **asked))
            alone.append(tokens)
    engine.forget()
    assert [told.token_ids for told in engine.ask(prompts, 6, ignore_eos=True)] == alone
    assert [told.token_ids for told in engine.ask(prompts[::-1], 6, ignore_eos=True)] == alone[::-1]
