"""Where model and method meet: stages, decoding, positions, several images."""

from __future__ import annotations

import gc
import re
import weakref
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image
from test_matrix import tiny_method
from tiny_models import FAMILIES

from mmtok_cli import pipeline
from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import Continuation, prefill
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf
from mmtok_cli.models import tiny as tiny_module
from mmtok_cli.models.base import Box, Prompt, VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import answer, reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.stages import CHECK, STAGES, unwatched


def test_decode_equals_generate(tiny: Llava, samples: list[Sample]) -> None:
    said = answer(tiny, make_method("mmtok"), samples, Budget(count=6), max_new_tokens=12)
    with torch.inference_mode():
        expected = tiny.model.generate(
            **reduce(tiny, make_method("mmtok"), samples, Budget(count=6)).inputs, max_new_tokens=12, do_sample=False
        )
    new = expected[:, said.reduced.inputs["input_ids"].shape[1] :]
    assert said.token_ids.equal(new)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"])
@torch.inference_mode()
def test_steps_of_a_padded_batch_read_what_their_mask_shows(
    name: str, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are prepared only where every layer takes the same, and change nothing."""
    model, forward, seen, logits = FAMILIES[name]("sdpa"), hf.forward, [], []

    def watched(model: Any, inputs: dict[str, Any], cache: Any = None) -> Any:
        seen.append(inputs["attention_mask"].dim())
        return forward(model, inputs, cache)

    monkeypatch.setattr(hf, "forward", watched)
    for prepared in (True, False):
        if not prepared:
            monkeypatch.setattr(hf, "takes_step_mask", lambda _: False)
        inputs = reduce(model, make_method("full"), samples, None).inputs
        assert not inputs["attention_mask"].all()
        first, cache = prefill(model, inputs)
        behind, token = Continuation(model, inputs, cache), first.argmax(-1)
        logits.append([behind.read(token), behind.read(token)])
    alike = name in ("llava", "qwen2_5_vl")
    assert seen == [2, 4, 4, 2, 2, 2] if alike else seen == [2] * 6
    assert all(map(torch.equal, *logits))


def test_steps_of_a_padded_batch_with_a_sliding_window(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's configuration has a window, and no list of layer types."""
    mistral = known_profiles()["llava-next-mistral-7b"]
    monkeypatch.setattr(tiny_module, "known_profiles", lambda: {"mistral": mistral})
    windowed = {**tiny_module.SMALLER["llava_next"], "text_config": {**tiny_module.TEXT, "sliding_window": 24}}
    monkeypatch.setitem(tiny_module.SMALLER, "llava_next", windowed)
    model = tiny_module.tiny_model("llava_next")
    together = answer(model, make_method("full"), samples, None, max_new_tokens=4).token_ids.tolist()
    alone = [answer(model, make_method("full"), [s], None, max_new_tokens=4).token_ids.tolist() for s in samples]
    assert [[row] for row in together] == alone


def test_stages_are_entered_in_order(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    entered = []

    @contextmanager
    def stage(name: str):
        entered.append(name)
        yield

    answer(tiny_sdpa, make_method("full"), samples[:1], None, stage=stage, max_new_tokens=2)
    assert tuple(name for name, _ in groupby(stage for stage in entered if stage != CHECK)) == STAGES


def test_cache_holds_the_kept_tokens_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    full, reduced = (
        answer(tiny_sdpa, make_method(name), samples[:1], Budget(count=6), max_new_tokens=1)
        for name in ("full", "mmtok")
    )
    per_token = 4 * 2 * 2 * 12 * 4  # layers, keys and values, KV heads, head width, bytes
    assert full.kv_cache_bytes - reduced.kv_cache_bytes == 30 * per_token
    assert full.reduced.tokens[0].text == reduced.reduced.tokens[0].text


def test_prefix_of_a_larger_budget(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    large, small = (
        reduce(tiny_sdpa, make_method("mmtok"), samples[:1], Budget(count=k)).selections[0] for k in (16, 5)
    )
    assert large.order is not None and small.order is not None
    assert large.order[:5].equal(small.order)


@pytest.mark.parametrize("method", ["mmtok", "divprune", "fastv"])
def test_several_images_in_a_batch(method: str, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    """Images of different sizes, one, two and three in a prompt, text between them: as if each prompt were alone."""
    pictures = [picture(160, 100, 6), picture(84, 84, 5), picture(60, 140, 7)]
    asked = [
        Sample((pictures[0], pictures[1]), "is <image> red or <image> ?", ("a", "b")),
        samples[0],
        Sample(tuple(pictures), "How many stars?", ("a", "b", "c")),
    ]
    together = answer(vlm, make_method(method), asked, Budget(percent=30), max_new_tokens=4)
    for row, sample in enumerate(asked):
        alone = answer(vlm, make_method(method), [sample], Budget(percent=30), max_new_tokens=4)
        mine = [s for s, owner in zip(together.selections, together.reduced.prompt.owners, strict=True) if owner == row]
        assert all(a.indices.equal(b.indices) for a, b in zip(alone.selections, mine, strict=True))
        assert together.reduced.tokens[row] == alone.reduced.tokens[0]
        counts = [make_method(method).count(0.3, vlm.total(image)) for image in sample.images]
        assert alone.reduced.tokens[0].kept == sum(counts)
        torch.testing.assert_close(together.first_logits[row], alone.first_logits[0], atol=2e-5, rtol=1e-5)
        assert together.texts[row] == alone.texts[0]


def test_several_images_in_one_question(tiny: Llava) -> None:
    images = (picture(84, 84, 5), picture(160, 100, 6))
    sample = Sample(images, "Is there a star?", ("a", "b"))
    both = reduce(tiny, make_method("mmtok"), [sample], Budget(count=8))
    assert both.tokens[0].total == 72 and both.tokens[0].kept == 16
    for image, image_id, selection in zip(images, "ab", both.selections, strict=True):
        alone = reduce(tiny, make_method("mmtok"), [Sample((image,), "Is there a star?", (image_id,))], Budget(count=8))
        assert selection.indices.equal(alone.selections[0].indices)


def test_the_encoder_is_spared_by_resize(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny_sdpa, make_method("resize"), samples, Budget(count=8))
    assert [v.grid for v in reduced.vision] == [(2, 4), (2, 4), (4, 2)]  # the long side follows the image's
    assert all(bool(v.eligible.all()) for v in reduced.vision)  # no padding: the image fills the smaller grid
    assert [tuple(p.shape) for p in reduced.prompt.pixel_values] == [(3, 28, 56), (3, 28, 56), (3, 56, 28)]


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_say_where_images_stand(family: str) -> None:
    if family == "llava_onevision":
        pytest.skip("it takes one image per question: tests/test_llava_onevision.py")
    vlm = FAMILIES[family]("sdpa")
    images = (picture(84, 84, 5), picture(160, 100, 6))

    prompt = vlm.prepare(["is <image> the red star <image> ?"], [images], [("a", "b")], [None, None])
    ids, (first, second) = prompt.input_ids[0], [vlm.total(image) for image in images]
    places = (ids == vlm.image_token_id).nonzero().squeeze(1)
    assert len(places) == first + second
    gaps = (places.diff() > 1).nonzero().squeeze(1).tolist()
    assert gaps == [first - 1]
    texts = ids[: places[0]], ids[places[first - 1] + 1 : places[first]], ids[places[-1] + 1 :]
    before, between, behind = (vlm.tokenizer.decode(part, skip_special_tokens=True) for part in texts)
    assert before.endswith("is") and between.split() == "the red star".split() and behind.startswith("?")


@pytest.mark.parametrize(
    ("family", "question", "message"),
    [
        ("llava", "a <image> and <image>?", "2 <image> markers for 1 image"),
        ("qwen2_5_vl", "a <|image_pad|>?", "stands for an image"),
    ],
)
def test_markers_that_make_no_sense_are_refused(
    family: str, question: str, message: str, samples: list[Sample]
) -> None:
    with pytest.raises(MMTokError, match=re.escape(message)):
        reduce(FAMILIES[family]("sdpa"), make_method("full"), [Sample(samples[0].images, question, ("x",))], None)


@pytest.mark.parametrize("question", ["🙂🙂", "?!", "the", "é" * 300])
def test_questions_without_keywords_are_answered(question: str, tiny_sdpa: Llava, samples: list[Sample]) -> None:
    reduced = reduce(tiny_sdpa, make_method("mmtok"), [Sample(samples[0].images, question, ("x",))], Budget(count=4))
    assert reduced.tokens[0].kept == 4


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
def test_images_of_extreme_shape_are_answered(size: tuple[int, int], tiny_sdpa: Llava) -> None:
    sample = Sample((picture(*size),), "Is there a star?", ("x",))
    assert (
        answer(tiny_sdpa, make_method("mmtok"), [sample], Budget(count=4), max_new_tokens=2).reduced.tokens[0].kept == 4
    )


def clipped(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box within the image, None where that is less than half of it."""
    left, top, right, bottom = box
    inside = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    across, down = (inside[2] - inside[0]) / (right - left), (inside[3] - inside[1]) / (bottom - top)
    return tuple(map(round, inside)) if across > 0.5 and down > 0.5 else None


SHAPES = [(168, 84), (84, 168), (84, 84), (200, 60), (130, 100), (97, 211)]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_patches_land_where_they_were_seen(family: str) -> None:
    """A bright patch of an image must be the token that its box says, where no token looks at another."""
    vlm = FAMILIES[family]("sdpa")
    for name, parameter in vlm.model.named_parameters():
        if re.search(r"(out_proj|attn\.proj|projection_layer)\.(weight|bias)$", name):
            parameter.zero_()

    def seen(image: Image.Image) -> torch.Tensor:
        prompt = vlm.prepare(["Is there a star?"], [(image,)], [("x",)], [None])
        return vlm.encode(prompt)[0].features

    for width, height in SHAPES:
        dark = Image.new("RGB", (4 * width, 4 * height))
        baseline = seen(dark)
        for panel in vlm.panels(dark, None):
            shown = [(token, clipped(box, dark.size)) for token, box in zip(panel.tokens, panel.boxes, strict=True)]
            inner = [(token, box) for token, box in shown if box]
            assert len(inner) >= 4
            for token, box in inner[:: max(1, len(inner) // 7)]:
                marked = dark.copy()
                marked.paste((255, 255, 255), box)
                change = (seen(marked) - baseline).norm(dim=-1)[list(panel.tokens)]
                assert panel.tokens[int(change.argmax())] == token, (width, height, panel.title)


def test_random_draws_depend_on_seed_and_image_alone(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    def drawn(seed: int, order: list[int]) -> dict[int, list[int]]:
        reduced = reduce(tiny_sdpa, make_method("random", seed=seed), [samples[i] for i in order], Budget(count=8))
        return {i: selection.indices.tolist() for i, selection in zip(order, reduced.selections, strict=True)}

    assert drawn(0, [0, 1, 2]) == drawn(0, [2, 0, 1])
    assert drawn(0, [0, 1, 2]) != drawn(1, [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "step"), [("full", "prefill"), ("mmtok", "prefill"), ("visionzip", "prefill"), ("fastv", "decode")]
)
def test_a_measured_run_holds_nothing_of_the_encoder_longer_than_it_is_read(
    name: str, step: str, tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels, features and signals would hide in the peaks what a method saves."""
    encode, read = type(tiny_sdpa).encode, getattr(pipeline, step)
    held: list[Any] = []
    alive: list[int] = []

    def encoding(model: Llava, prompt: Prompt, signals: Any = (), **more: Any) -> Any:
        vision = encode(model, prompt, signals, **more)
        tensors = [t for v in vision for t in (v.projected, v.features, *v.signals.values())]
        held.extend(map(weakref.ref, (*prompt.pixel_values, *tensors)))
        return vision

    def watched(*given: Any, **options: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in held))
        return read(*given, **options)

    monkeypatch.setattr(type(tiny_sdpa), "encode", encoding)
    monkeypatch.setattr(pipeline, step, watched)
    case = Case(name, tiny_method(name), None if name == "full" else Budget(count=4))
    lean = case.answer(tiny_sdpa, samples[:2], 2, unwatched)
    assert len(held) >= 2 * 3 and alive == [0]
    held.clear()
    whole = case.answer(tiny_sdpa, samples[:2], 2, unwatched, encodings=True)
    assert alive[1] == len(held)
    assert lean.texts == whole.texts and lean.reduced.tokens == whole.reduced.tokens
    assert [v.total for v in lean.reduced.vision] == [v.total for v in whole.reduced.vision]
