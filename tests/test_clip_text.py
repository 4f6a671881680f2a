"""CLIP's other half: the same numbers as the whole CLIP model's, loaded late or refused in one clear line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_clip, build_tiny_llava, tiny_text_tower
from typer.testing import CliRunner

from mmtok_cli.budget import Budget
from mmtok_cli.cli.main import app
from mmtok_cli.data.samples import Sample
from mmtok_cli.demo.architecture import build_tokenizer
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.models.base import Prompt
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import reduce
from mmtok_cli.profiles import known_profiles

BUDGET = Budget(count=8)


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clip") / "clip"
    build_tiny_clip().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture()
def sample() -> Sample:
    return Sample((picture(84, 84, 1),), "What digit is on the blue square?", ("picture",))


def prompt_of(model: Llava, sample: Sample) -> Prompt:
    return model.prepare([sample.question], [sample.images], [sample.image_ids], [(6, 6)])


@torch.inference_mode()
def test_text_embeds_are_those_of_clip() -> None:
    clip, tower, tokenizer = build_tiny_clip(), tiny_text_tower(torch.float32), build_tokenizer()
    ids = tokenizer("is there a red circle")["input_ids"]
    expected = clip.get_text_features(torch.tensor([[*ids, tokenizer.eos_token_id]])).pooler_output
    torch.testing.assert_close(tower.text_embeds("Is there a red circle"), expected)


@torch.inference_mode()
def test_long_questions_go_in_pieces() -> None:
    clip, tower, tokenizer = build_tiny_clip(), tiny_text_tower(torch.float32), build_tokenizer()
    ids = tokenizer("is there a red circle in the image and a blue square ?", add_special_tokens=False)["input_ids"]
    assert len(ids) == 13
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces = [[start, *ids[:6], end], [start, *ids[6:12], end], [start, *ids[12:], end]]
    found = tower.text_embeds("Is there a red circle in the image and a blue square?")
    assert found.shape == (3, 16)
    for row, piece in zip(found, pieces, strict=True):
        torch.testing.assert_close(row, clip.get_text_features(torch.tensor([piece])).pooler_output[0])
    assert tower.text_embeds("").shape == (1, 16)


@torch.inference_mode()
def test_image_embeds_are_those_of_clip() -> None:
    clip, tower = build_tiny_clip(), tiny_text_tower(torch.float32)
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    hidden = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    found = tower.image_embeds(hidden)
    assert found.shape == (2, 37, 16)
    # CLIP itself takes the class token alone through the last two steps.
    torch.testing.assert_close(found[:, 0], clip.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(found, clip.visual_projection(clip.vision_model.post_layernorm(hidden)))


def test_the_vision_tower_is_left_behind() -> None:
    names = {name.split(".")[0] for name, _ in tiny_text_tower(torch.float32).named_parameters()}
    assert names == {"text_model", "text_projection", "post_layernorm", "visual_projection"}


def test_loading_from_a_directory(clip_directory: Path) -> None:
    built, loaded = tiny_text_tower(torch.bfloat16), ClipText.load(str(clip_directory), torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert built.text_embeds("a red circle").equal(loaded.text_embeds("a red circle"))


def test_loaded_once_and_only_when_asked_for(clip_directory: Path, sample: Sample) -> None:
    calls: list[torch.dtype] = []

    def load(dtype: torch.dtype) -> ClipText:
        calls.append(dtype)
        return ClipText.load(str(clip_directory), dtype)

    model = Llava("tiny", *build_tiny_llava(), text_tower=load)
    reduce(model, make_method("mmtok"), [sample], BUDGET)
    assert not calls
    for _ in range(2):
        reduce(model, make_method("cdpruner"), [sample], BUDGET)
    assert calls == [torch.float32]
    model.model.to(torch.bfloat16)
    with torch.inference_mode():
        signals = model.encode(prompt_of(model, sample), ("clip_image_embeds", "clip_text_embeds"))[0].signals
    assert {signal.dtype for signal in signals.values()} == {torch.bfloat16}


def test_clip_signals_read_no_attention(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Llava("tiny", *build_tiny_llava(), text_tower=tiny_text_tower)
    monkeypatch.setattr(model, "_attention", lambda: pytest.fail("attention was looked at"))
    vision = model.encode(prompt_of(model, sample), ("clip_image_embeds", "clip_text_embeds"))[0]
    assert vision.signals["clip_image_embeds"].shape == (36, 16)
    assert vision.signals["clip_text_embeds"].shape == (2, 16)


def test_each_image_goes_with_its_own_question(tiny_sdpa: Llava) -> None:
    two = Sample((picture(84, 84, 1), picture(84, 84, 2)), "How many stars?", ("a", "b"))
    one = Sample((picture(84, 84, 3),), "Is there a red circle?", ("c",))
    prompt = tiny_sdpa.prepare(
        [two.question, one.question], [two.images, one.images], [two.image_ids, one.image_ids], [(6, 6)] * 3
    )
    texts = [v.signals["clip_text_embeds"] for v in tiny_sdpa.encode(prompt, ("clip_text_embeds",))]
    tower = tiny_text_tower(torch.float32)
    for found, question in zip(texts, (two.question, two.question, one.question), strict=True):
        torch.testing.assert_close(found, tower.text_embeds(question))


def test_a_tower_of_another_encoder_is_refused(sample: Sample) -> None:
    def wider(dtype: torch.dtype) -> ClipText:
        tower = tiny_text_tower(dtype)
        tower.visual_projection = torch.nn.Linear(40, 16, bias=False)
        return tower

    model = Llava("tiny", *build_tiny_llava(), text_tower=wider)
    with pytest.raises(MMTokError, match="40 wide, and these features are 32"):
        reduce(model, make_method("cdpruner"), [sample], BUDGET)


def test_a_tower_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, sample: Sample) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load = partial(ClipText.load, "nobody/has-this-clip")
    model = Llava("tiny", *build_tiny_llava(), text_tower=load)
    with pytest.raises(MMTokError, match="could not be fetched from the hub") as error:
        reduce(model, make_method("cdpruner"), [sample], BUDGET)
    assert "hf download nobody/has-this-clip" in error.value.hint


def test_a_tower_that_is_damaged(clip_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(MMTokError, match="could not be loaded as a CLIP text tower"):
        ClipText.load(str(tmp_path), torch.float32)
    for file in clip_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "text_projection.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(MMTokError, match=r"lack text_projection\.weight"):
        ClipText.load(str(tmp_path), torch.float32)


def test_a_model_without_a_tower_refuses(tiny_directory: Path, photo: Path, sample: Sample) -> None:
    model = load_model(str(tiny_directory), device="cpu")
    with pytest.raises(MMTokError, match="comes without a CLIP text tower") as error:
        reduce(model, make_method("cdpruner"), [sample], BUDGET)
    assert "llava-1.5-7b" in error.value.hint
    result = CliRunner().invoke(app, ["infer", str(photo), "Is there a red circle?", "--method", "cdpruner", "-b", "8"])
    assert result.exit_code == 2 and result.stdout == ""
    first, hint = result.stderr.splitlines()
    assert first.startswith("error: ") and "demo comes without a CLIP text tower" in first and "llava-1.5-7b" in hint


def test_load_model_takes_the_tower_from_the_profile(
    tiny_directory: Path, clip_directory: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = {"location": str(tiny_directory), "text_tower": str(clip_directory), "architecture": None}
    profile = known_profiles()["llava-1.5-7b"].model_copy(update=update)
    monkeypatch.setattr("mmtok_cli.models.sources.known_profiles", lambda: {profile.name: profile})
    model = load_model("llava-1.5-7b", device="cpu")
    assert reduce(model, make_method("cdpruner"), [sample], BUDGET).selections[0].kept == 8
