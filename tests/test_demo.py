"""The embedded model: scenes, questions, the packed training pass, and the shipped weights."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from mmtok_cli.demo.drawing import FAMILIES, background, draw
from mmtok_cli.demo.questions import CHOICES, KINDS, NEGATIVES, Question, held_out
from mmtok_cli.demo.scenes import COLOURS, POPULAR_PAIRS, SHAPES, make_scene

PARTS = (("train", "sparse"), ("train", "dense"), ("eval", "sparse"), ("eval", "dense"))
DESCRIPTIONS_HASH = "26dde6d655c5f7ba"
WEIGHTS_HASH = "7dac483d788b5124"


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return held_out(400)


def test_scenes_are_the_same_everywhere() -> None:
    described = [repr(make_scene(seed, split, density)) for seed in range(20) for split, density in PARTS]
    assert hashlib.sha256("\n".join(described).encode()).hexdigest()[:16] == DESCRIPTIONS_HASH


def test_pictures_repeat() -> None:
    first, second = (np.asarray(draw(make_scene(3, "eval", "dense"))) for _ in range(2))
    assert first.shape == (336, 336, 3)
    assert np.array_equal(first, second)


@pytest.mark.parametrize(("density", "low", "high"), [("sparse", 2, 6), ("dense", 6, 10)])
def test_objects_stay_apart_and_inside(density: str, low: int, high: int) -> None:
    for seed in range(100):
        scene = make_scene(seed, "eval", density)
        assert low <= len(scene.objects) <= high
        assert len(scene.pairs) == len(scene.objects)
        for i, item in enumerate(scene.objects):
            assert all(item.radius <= at < scene.size - item.radius for at in item.centre)
            for other in scene.objects[:i]:
                assert np.hypot(*np.subtract(item.centre, other.centre)) > item.radius + other.radius


def test_objects_have_their_colour() -> None:
    for seed in range(30):
        scene = make_scene(seed, "eval")
        pixels = np.asarray(draw(scene))
        for item in scene.objects:
            if item.digit is None:
                assert tuple(pixels[item.centre[1], item.centre[0]]) == COLOURS[item.colour]


def test_training_and_evaluation_share_neither_scenes_nor_backgrounds() -> None:
    assert not set(FAMILIES["train"]) & set(FAMILIES["eval"])
    seen = {split: {background(split, seed, 56).tobytes() for seed in range(50)} for split in FAMILIES}
    assert len(seen["train"]) == len(seen["eval"]) == 50
    assert not seen["train"] & seen["eval"]
    for seed in range(50):
        assert make_scene(seed, "train").objects != make_scene(seed, "eval").objects


def test_backgrounds_are_muted() -> None:
    for split in FAMILIES:
        pixels = np.stack([background(split, seed, 56) for seed in range(20)])
        assert 45 <= pixels.min() < pixels.max() <= 205


def test_held_out_is_stable_and_frozen(questions: list[Question]) -> None:
    assert held_out(10) == questions[:10]
    assert held_out(10, seed=1) != questions[:10]
    with pytest.raises(FrozenInstanceError):
        questions[0].answer = "no"  # type: ignore[misc]


@pytest.mark.parametrize("start", [0, 24, 160])
def test_every_eight_questions_are_a_fair_mix(questions: list[Question], start: int) -> None:
    part = questions[start : start + 8]
    assert Counter(q.kind for q in part) == {"existence": 4, "colour": 1, "shape": 1, "count": 1, "digit": 1}
    assert Counter(q.answer for q in part if q.kind == "existence") == {"yes": 2, "no": 2}
    assert Counter(q.density for q in part) == {"sparse": 4, "dense": 4}
    assert len({q.scene for q in part}) == 8


def test_existence_is_balanced_and_has_every_kind_of_absence(questions: list[Question]) -> None:
    existence = [q for q in questions if q.kind == "existence"]
    assert Counter(q.answer for q in existence)["yes"] * 2 == len(existence)
    absences = Counter(q.variant for q in existence if q.answer == "no")
    assert set(absences) == set(NEGATIVES)
    assert min(absences.values()) > 0.25 * sum(absences.values())


def test_no_scene_is_asked_the_same_about_existence_twice(questions: list[Question]) -> None:
    asked = Counter((q.scene.seed, q.text) for q in questions if q.variant == "present")
    assert max(asked.values()) == 1


def test_answers_follow_from_the_scene(questions: list[Question]) -> None:
    assert {q.kind for q in questions} == set(KINDS)
    for question in questions:
        assert question.answer in question.choices == CHOICES[question.kind]
        assert question.answer == answer_again(question), question


def answer_again(question: Question) -> str:
    """The answer, found from the question's words alone."""
    words = question.text.lower().rstrip("?").split()
    singular = {plural: shape for shape, plural in SHAPES.items()}
    colours = [word for word in words if word in COLOURS]
    shapes = [singular.get(word, word) for word in words if singular.get(word, word) in SHAPES]
    meant = [
        item
        for item in question.scene.objects
        if (not colours or item.colour in colours) and (not shapes or item.shape in shapes)
    ]
    if question.variant == "popular":
        assert (colours[0], shapes[0]) in POPULAR_PAIRS
    if question.variant == "adversarial":
        assert colours[0] in {item.colour for item in question.scene.objects}
        assert shapes[0] in {item.shape for item in question.scene.objects}
    if question.kind == "existence":
        return "yes" if meant else "no"
    if question.kind == "count":
        return str(len(meant))
    (only,) = meant
    return str(getattr(only, question.kind))


def test_questions_and_scenes_need_no_torch() -> None:
    code = (
        "import sys; from mmtok_cli.demo.drawing import draw; from mmtok_cli.demo.questions import held_out; "
        "draw(held_out(8)[0].scene)"
    )
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_vocabulary_covers_every_question_and_answer(questions: list[Question]) -> None:
    from mmtok_cli.demo.architecture import build_tokenizer

    tokenizer = build_tokenizer()
    for question in questions:
        assert tokenizer.unk_token_id not in tokenizer(question.text)["input_ids"]
        assert len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer("Is there a ZEBRA")["input_ids"] == tokenizer("is THERE a <unk>")["input_ids"]
    assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id


def test_fast_tokens_are_the_tokenizers(questions: list[Question]) -> None:
    from mmtok_cli.demo.architecture import build_tokenizer
    from mmtok_cli.demo.batches import tokenise

    tokenizer = build_tokenizer()
    for question in questions[:50]:
        assert tokenise(question.text) == tokenizer(question.text, add_special_tokens=False)["input_ids"]


def test_packed_questions_equal_single_ones() -> None:
    import torch

    from mmtok_cli.demo.architecture import build_model, vocabulary
    from mmtok_cli.demo.batches import BLOCK, make_batch
    from mmtok_cli.demo.forward import forward

    torch.manual_seed(0)
    packed = build_model("plain").eval()
    stock = build_model("eager").eval()
    stock.load_state_dict(packed.state_dict())
    names = vocabulary()
    opening = torch.tensor([names.index(word) for word in ("<s>", "user", ":")] + [names.index("<image>")] * 576)
    batch = make_batch(5, 2, 24, ("sparse", "dense"), 3)
    with torch.no_grad():
        outputs = forward(packed, batch)
        for picture, block in ((0, 0), (1, 2)):
            answer_at = int(batch.answer_at[picture, block])
            ids = torch.cat([opening, batch.text[picture, block * BLOCK : answer_at + 1]])[None]
            single = stock(input_ids=ids, pixel_values=batch.pixels[[picture]], attention_mask=torch.ones_like(ids))
            torch.testing.assert_close(outputs.logits[picture, block, 0], single.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_patch_labels_name_what_the_patch_shows() -> None:
    from mmtok_cli.demo.batches import make_batch, training_scene

    batch = make_batch(7, 1, 24, ("dense",), 1)
    for item in training_scene(7, 24, "dense").objects:
        patch = item.centre[1] // 14 * 24 + item.centre[0] // 14
        assert batch.centres[0, patch] == 1
        assert batch.colours[0, patch] == list(COLOURS).index(item.colour) + 1
        assert batch.shapes[0, patch] == list(SHAPES).index(item.shape) + 1
        if item.digit is not None:
            assert (batch.digits[0] == item.digit).any()


@pytest.fixture(scope="module")
def shipped():
    from mmtok_cli.demo.evaluate import load

    return load()


def test_prompt_is_vicunas(shipped) -> None:
    _, processor = shipped
    turn = [{"type": "image"}, {"type": "text", "text": "Is there a red circle?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    assert prompt == "USER: <image>\nIs there a red circle? ASSISTANT:"
    inputs = processor(images=[draw(make_scene(0))], text=[prompt], return_tensors="pt")
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 576


def test_oblong_images_are_padded_not_cropped(shipped) -> None:
    from PIL import Image

    _, processor = shipped
    wide = Image.new("RGB", (640, 200), (255, 0, 0))
    pixels = processor.image_processor(images=[wide], return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 336, 336)
    assert pixels[0, 168, 2] == pixels[0, 168, 168] != pixels[0, 2, 168]


@pytest.mark.compat
def test_shipped_weights_answer_held_out_questions(shipped) -> None:
    from mmtok_cli.demo.evaluate import answer

    model, processor = shipped
    questions = held_out(48)
    replies = [reply for i in range(0, 48, 8) for reply in answer(model, processor, questions[i : i + 8])]
    right = sum(reply == question.answer for reply, question in zip(replies, questions, strict=True))
    assert right >= 44


def test_shipped_weights_are_small() -> None:
    from mmtok_cli.demo.evaluate import WEIGHTS

    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 10_000_000


def hub_names() -> set[str]:
    """The names in llava-hf/llava-1.5-7b-hf, for as many layers as the demo model has."""
    vision, language = "vision_tower.vision_model.", "language_model.model."
    names = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    for part in ("class_embedding", "patch_embedding.weight", "position_embedding.weight"):
        names.add(vision + f"embeddings.{part}")
    names |= {vision + f"{part}.{kind}" for part in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")}
    attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    for i in range(5):
        for part in (*attention, "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"):
            names |= {vision + f"encoder.layers.{i}.{part}.{kind}" for kind in ("weight", "bias")}
    names |= {language + "embed_tokens.weight", language + "norm.weight", "language_model.lm_head.weight"}
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    mlp = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    for i in range(4):
        for part in (*attention, *mlp, "input_layernorm", "post_attention_layernorm"):
            names.add(language + f"layers.{i}.{part}.weight")
    return names


def test_shipped_weights_are_in_the_hubs_layout() -> None:
    from safetensors import safe_open

    from mmtok_cli.demo.evaluate import WEIGHTS

    digest = hashlib.sha256()
    with safe_open(WEIGHTS / "model.safetensors", "np") as weights:
        assert set(weights.keys()) == hub_names()
        assert weights.metadata() == {"format": "pt"}
        for name in sorted(weights.keys()):
            tensor = weights.get_tensor(name)
            assert tensor.dtype == np.float16
            digest.update(f"{name} {tensor.shape}".encode() + tensor.tobytes())
    assert digest.hexdigest()[:16] == WEIGHTS_HASH


@pytest.mark.compat
def test_every_shipped_tensor_is_loaded() -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    from mmtok_cli.demo.architecture import hub_layout
    from mmtok_cli.demo.evaluate import WEIGHTS

    model, found = AutoModelForImageTextToText.from_pretrained(
        WEIGHTS, dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not any(found.values()), found
    loaded, stored = hub_layout(model.state_dict()), load_file(WEIGHTS / "model.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.compat
def test_training_saves_what_is_shipped(shipped, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from mmtok_cli.demo.evaluate import WEIGHTS
    from mmtok_cli.demo.train import save

    save(shipped[0], tmp_path)
    saved, stored = (load_file(directory / "model.safetensors") for directory in (tmp_path, WEIGHTS))
    assert saved.keys() == stored.keys()
    assert all(saved[name].dtype == torch.float16 and torch.equal(saved[name], stored[name]) for name in stored)


def test_layout_refuses_names_it_does_not_know() -> None:
    import torch

    from mmtok_cli.demo.architecture import hub_layout

    with pytest.raises(ValueError, match="vision_encoder"):
        hub_layout({"model.vision_encoder.norm.weight": torch.zeros(1)})


def test_reduced_pictures() -> None:
    """The tokens that are shown: as many for every picture, ascending, in compositions that vary."""
    import torch

    from mmtok_cli.demo.batches import make_batch
    from mmtok_cli.demo.train import SETTINGS, shown_tokens

    batch = make_batch(1, 8, 24, ("sparse", "dense"), 2)
    rng = torch.Generator().manual_seed(0)
    assert all(shown_tokens(stage, batch, rng) is None for stage in SETTINGS.stages if not stage.dropping)
    (reduced,) = (stage for stage in SETTINGS.stages if stage.name == "reduced")
    drawn = [shown_tokens(reduced, batch, rng) for _ in range(20)]
    kept = [tokens for tokens in drawn if tokens is not None]
    assert 0 < len(kept) < 20
    for tokens in kept:
        assert 40 <= tokens.shape[1] <= 518 and bool((tokens[:, 1:] > tokens[:, :-1]).all())
    shares = torch.cat([(batch.colours.gather(1, tokens) > 0).float().mean(1) for tokens in kept])
    assert shares.min() < 0.15 and shares.max() > 0.5
