"""The demo model in vLLM and in transformers: the same tokens are kept, and the same answers given."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine
from PIL import Image
from vllm.exceptions import VLLMValidationError

import mmtok_cli
from mmtok_cli.budget import Budget
from mmtok_cli.configuration import configured_method
from mmtok_cli.data.samples import Sample, batches, demo_samples
from mmtok_cli.methods.settings import read_settings
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer
from mmtok_cli.rules import Rules

DEMO = Path(mmtok_cli.__file__).parent / "demo" / "weights"
QUESTIONS = int(os.environ.get("MMTOK_QUESTIONS", "24"))
METHODS = ["mmtok", "divprune", "visionzip", "random"]
# VisPruner's diverse half is left out: which of two equal patches of a plain background it removes first depends on the
# last bits of the features.
SETTINGS = {"vispruner": {"set": ["vispruner.important_ratio=1"]}}
OTHERS = ["mmtok:text", "mmtok:vision", "mmtok:loop", "uniform", "vispruner", "resize:pool"]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return mmtok_cli.load_model("demo")


@pytest.fixture(scope="module")
def engine(model: VisionLanguageModel, start: Callable[..., Engine]) -> Engine:
    """Prompts of unreduced images are read in three chunks."""
    return start(DEMO, model, max_model_len=2048, max_num_batched_tokens=256, limit_mm_per_prompt={"image": 3})


def ids(sample: Sample) -> dict[str, Any]:
    return {"question": sample.question, "image_ids": list(sample.image_ids)}


def by_pipeline(
    model: VisionLanguageModel, name: str, samples: Sequence[Sample], budget: str | None, **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each answer, up to its end, and the indices that are kept of each image."""
    texts = SETTINGS.get(name, {}).get("set", [])
    method = configured_method(name, "demo", read_settings(texts, [name]).get(name))
    tokens: list[list[int]] = []
    kept: list[list[int]] = []
    for batch in batches(samples, 8):
        answers = answer(model, method, batch, Budget.parse(budget) if budget else None, max_new_tokens=8, **options)
        for row in answers.token_ids.tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in model.eos_token_ids), len(row))
            tokens.append(row[:end])
        kept += [selection.indices.tolist() for selection in answers.reduced.selections]
    return tokens, kept


def test_unreduced_answers(engine: Engine, model: VisionLanguageModel) -> None:
    samples = demo_samples(QUESTIONS)
    expected, _ = by_pipeline(model, "full", samples, None)
    engine.forget()
    told = engine.ask([engine.prompt(sample) for sample in samples])
    differ = [i for i, (a, b) in enumerate(zip(told, expected, strict=True)) if a.token_ids != b]
    print(f"full: {len(samples) - len(differ)} of {len(samples)} answers equal")
    assert len(differ) <= len(samples) // 100


@pytest.mark.parametrize("budget", ["64", "16"])
@pytest.mark.parametrize("name", METHODS)
def test_answers_and_indices(engine: Engine, model: VisionLanguageModel, name: str, budget: str) -> None:
    """One in a hundred may differ: kernels do in the last bits, and so may picks between which little decides."""
    samples = demo_samples(QUESTIONS)
    expected, kept = by_pipeline(model, name, samples, budget)
    engine.forget()
    told = engine.ask([engine.prompt(s, method=name, budget=budget, **ids(s)) for s in samples])
    # One after another, each without the caches of the others, since the record names images and not questions.
    indices = []
    for sample in samples:
        engine.forget()
        engine.ask([engine.prompt(sample, method=name, budget=budget, **ids(sample))], 1)
        indices += [image["kept"] for image in engine.recorded()]
    other_answers = sum(a.token_ids != b for a, b in zip(told, expected, strict=True))
    other_indices = sum(a != b for a, b in zip(indices, kept, strict=True))
    print(f"{name} at {budget}: {other_answers} answers and {other_indices} selections of {len(samples)} differ")
    assert all(answer.prompt_length < 30 + int(budget) for answer in told)
    assert max(other_answers, other_indices) <= len(samples) // 100


@pytest.mark.parametrize("track", ["released", "harmonised"])
@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_padded_and_several_images(engine: Engine, model: VisionLanguageModel, name: str, track: Any) -> None:
    """Oblong images, padded to squares, one and three in a prompt."""
    picture = Image.open(DEMO.parent / "example.png").convert("RGB")
    images = (picture.crop((0, 60, 336, 250)), picture.crop((100, 0, 220, 336)), picture)
    for chosen in ((0,), (1,), (0, 1, 2)):
        sample = Sample(tuple(images[i] for i in chosen), "What color is the star?", tuple(f"p{i}" for i in chosen))
        expected, kept = by_pipeline(model, name, [sample], "20", rules=Rules(track=track))
        engine.forget()
        asked = {
            "method": name,
            "budget": 20,
            "track": track,
            "image_aspect_ratio": "pad",
            **ids(sample),
        } | SETTINGS.get(name, {})
        (told,) = engine.ask([engine.prompt(sample, **asked)])
        assert [image["kept"] for image in engine.recorded()] == kept
        assert told.token_ids == expected[0]


def test_one_picture_twice_with_two_names(engine: Engine, model: VisionLanguageModel) -> None:
    (picture,) = demo_samples(1)[0].images
    sample = Sample((picture, picture.copy()), "What color is the star?", ("one", "other"))
    expected, kept = by_pipeline(model, "random", [sample], "20")
    engine.forget()
    (told,) = engine.ask([engine.prompt(sample, method="random", budget=20, **ids(sample))])
    assert [image["kept"] for image in engine.recorded()] == kept and kept[0] != kept[1]
    assert told.token_ids == expected[0]


def mixed_prompts(engine: Engine) -> list[dict[str, Any]]:
    """Two questions about each of two scenes: unreduced, and by two methods at three budgets."""
    by_scene: dict[str, list[Sample]] = {}
    for sample in demo_samples(60):
        by_scene.setdefault(sample.image_ids[0], []).append(sample)
    scenes = [samples[:2] for samples in by_scene.values() if len(samples) > 1][:2]
    prompts = []
    for sample in (sample for scene in scenes for sample in scene):
        prompts.append(engine.prompt(sample))
        for method in ("mmtok", "random"):
            for budget in (8, 16, "20%"):
                prompts.append(engine.prompt(sample, method=method, budget=budget))
    return prompts


def test_requests_of_all_kinds_at_once_are_answered_as_if_alone(engine: Engine) -> None:
    prompts = mixed_prompts(engine)
    alone = []
    for prompt in prompts:
        engine.forget()
        alone += engine.ask([prompt])
    engine.forget()
    assert engine.ask(prompts) == alone  # eight at a time
    assert engine.ask(prompts) == alone  # from caches
    backwards = prompts[::-1]
    engine.forget()
    assert engine.ask(backwards) == alone[::-1]
    assert len({told.prompt_length for told in alone}) > 4


def test_the_question_is_part_of_what_is_cached(engine: Engine) -> None:
    first, second = mixed_prompts(engine)[0], mixed_prompts(engine)[7]
    assert first["prompt"] != second["prompt"]
    for method, reads in (("mmtok", True), ("divprune", False)):
        engine.forget()
        for prompt in (first, second, first, second):
            engine.ask([prompt | {"mm_processor_kwargs": {"method": method, "budget": 16}}])
        kept = [image["kept"] for image in engine.recorded()]
        assert len(kept) == (2 if reads else 1)
        assert len(kept) == 1 or kept[0] != kept[1]


def test_one_of_two_images_is_cached(engine: Engine) -> None:
    """The names of images go to those that are processed."""
    one, two = demo_samples(1)[0].images[0], Image.open(DEMO.parent / "example.png").convert("RGB")
    pair = Sample((one, two), "What color is the star?", ("one", "two"))
    asked = {"method": "random", "budget": 16, "image_ids": ["one", "two"]}
    engine.forget()
    (expected,) = engine.ask([engine.prompt(pair, **asked)])
    kept = [image["kept"] for image in engine.recorded()]
    engine.forget()
    # The same arguments, so that the first image has the same hash in both requests.
    engine.ask([engine.prompt(Sample((one, one), pair.question, ("one", "one")), **asked)])
    (again,) = engine.ask([engine.prompt(pair, **asked)])
    assert engine.recorded()[-1]["image_id"] == "two"
    assert [engine.recorded()[0]["kept"], engine.recorded()[-1]["kept"]] == kept
    assert again == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "fastv", "budget": 16}, "fastv drops tokens inside the language model"),
        ({"method": "random:inside", "budget": 16}, "random:inside drops tokens inside"),
        ({"method": "resize", "budget": 16}, "resize makes the image smaller"),
        ({"method": "none"}, "none has no budget"),
        ({"method": "cdpruner", "budget": 16}, "cdpruner reads clip_image_embeds, clip_text_embeds"),
        ({"method": "hiprune", "budget": 16}, "hiprune reads middle_attention, received_attention"),
        ({"method": "mmtokk", "budget": 16}, "did you mean mmtok"),
        ({"methd": "mmtok"}, "did you mean 'method'?"),
        ({"method": "mmtok"}, "mmtok needs a budget"),
        ({"budget": 16}, "has a budget and no method"),
        ({"method": "mmtok", "budget": 0}, "a budget of 0"),
        ({"method": "mmtok", "budget": "many"}, "many"),
        ({"method": "mmtok", "budget": [1]}, "budget in mm_processor_kwargs cannot be"),
        ({"method": "mmtok", "budget": 16, "track": "published"}, "released or harmonised"),
        ({"method": "mmtok", "budget": 16, "set": ["mmtok.beta=1"]}, "beta"),
        ({"method": "mmtok", "budget": 16, "image_ids": ["a", "b"]}, "names 2 images, and the prompt has 1"),
        ({"method": "mmtok", "budget": 16, "image_aspect_ratio": "crop"}, "image_aspect_ratio"),
        ({"method": 3, "budget": 16}, "method in mm_processor_kwargs cannot be 3"),
    ],
)
def test_refusals_are_one_line_and_leave_the_engine_running(engine: Engine, asked: dict[str, Any], said: str) -> None:
    sample = demo_samples(1)[0]
    with pytest.raises(VLLMValidationError) as error:
        engine.ask([engine.prompt(sample, **asked)])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert engine.ask([engine.prompt(sample)])[0].token_ids


def test_a_prompt_of_another_form_needs_its_question(engine: Engine) -> None:
    prompt = engine.prompt(demo_samples(1)[0])
    prompt["prompt"] = "look at <image> and tell the color"
    with pytest.raises(VLLMValidationError, match="does not follow the chat template"):
        engine.ask([prompt | {"mm_processor_kwargs": {"method": "mmtok", "budget": 16}}])
    for asked in ({"method": "mmtok", "question": "What color is it?"}, {"method": "divprune"}):
        assert engine.ask([prompt | {"mm_processor_kwargs": {**asked, "budget": 16}}])[0].prompt_length < 30
