"""The profiles: true architectures, prompts as the checkpoints' own templates make them, methods that fit."""

from __future__ import annotations

import copy
import shutil
import tomllib
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils.chat_template_utils import render_jinja_template

from mmtok_cli import profiles
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.methods.settings import profile_parameters
from mmtok_cli.models import hf
from mmtok_cli.profiles import Profile, known_profiles
from mmtok_cli.report.catalogues import models_legend, models_table

PROFILES = known_profiles()
BUILDABLE = [profile for profile in PROFILES.values() if profile.architecture]
EXACT = {  # parameters, to the last one, so that no width and no depth slips
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "internvl3-2b": 2_088_957_440,
    "internvl3-8b": 7_944_373_760,
    "internvl3.5-2b": 2_348_347_392,
    "internvl3.5-4b": 4_732_489_216,
    "internvl3.5-8b": 8_528_318_464,
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "llava-next-7b": 7_063_431_168,
    "llava-next-13b": 13_351_499_776,
    "llava-next-mistral-7b": 7_566_747_648,
    "llava-onevision-0.5b": 893_675_552,
    "llava-onevision-7b": 8_030_807_584,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3.5-0.8b": 852_985_920,
    "qwen3.5-2b": 2_213_241_664,
    "qwen3.5-4b": 4_539_265_536,
    "qwen3.5-9b": 9_409_813_744,
    "qwen3.5-27b": 27_356_728_560,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "qwen3-vl-235b-a22b": 235_670_022_896,
}
LAYER_TYPES = {"gemma3": {"full_attention", "sliding_attention"}, "qwen3_5": {"full_attention", "linear_attention"}}
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PROMPTS = {  # image token, what stands for an image, and the prompt around the images and "red?"
    "gemma3": (
        "<start_of_image>",
        "<start_of_image>",
        "<start_of_turn>user\n{}red?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "internvl": (
        "<IMG_CONTEXT>",
        "<IMG_CONTEXT>\n",
        "<|im_start|>user\n{}red?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llava": ("<image>", "<image>\n", "USER: {}red? ASSISTANT:"),
    "llava_next": ("<image>", "<image>\n", "USER: {}red? ASSISTANT:"),
    "llava_onevision": ("<image>", "<image>", "<|im_start|>user {}\nred?<|im_end|><|im_start|>assistant\n"),
    "llava-next-mistral-7b": ("<image>", "<image>\n", "[INST] {}red? [/INST]"),
    "qwen2_5_vl": ("<|image_pad|>", SEEN, SYSTEM + "<|im_start|>user\n{}red?<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3_5": (
        "<|image_pad|>",
        SEEN,
        "<|im_start|>user\n{}red?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "qwen3_vl_moe": ("<|image_pad|>", SEEN, "<|im_start|>user\n{}red?<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3_vl": ("<|image_pad|>", SEEN, "<|im_start|>user\n{}red?<|im_end|>\n<|im_start|>assistant\n"),
}


def configuration(profile: Profile) -> Any:
    return AutoConfig.for_model(profile.family, **copy.deepcopy(profile.architecture))


def test_profiles_are_parsed_again_only_where_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in profiles.profile_directory().glob("qwen*.toml"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(profiles, "profile_directory", lambda: tmp_path)
    parsed: list[str] = []
    parse = tomllib.loads
    monkeypatch.setattr(profiles.tomllib, "loads", lambda text: parsed.append(text) or parse(text))

    known = known_profiles()
    known["qwen3-vl-2b"].methods["mmtok"] = {"alpha": 9}  # what a caller does to its own copy
    parsed.clear()
    path = tmp_path / "qwen3-vl-2b.toml"
    path.write_text(path.read_text().replace('summary = "', 'summary = "Changed. ', 1))
    again = known_profiles()
    assert len(parsed) == 1 and again["qwen3-vl-2b"].summary.startswith("Changed. ")
    assert again["qwen3-vl-4b"] == known["qwen3-vl-4b"] and known_profiles() == again and len(parsed) == 1
    assert again["qwen3-vl-2b"].methods.get("mmtok") != {"alpha": 9}
    known["qwen3-vl-4b"].architecture["text_config"].clear()
    assert known_profiles()["qwen3-vl-4b"].architecture["text_config"]


def test_all_models_are_buildable_but_the_one_that_comes_along() -> None:
    assert {profile.name for profile in BUILDABLE} == set(EXACT) == set(PROFILES) - {"demo"}


@pytest.mark.parametrize("profile", BUILDABLE, ids=lambda profile: profile.name)
def test_architectures_are_the_true_ones(profile: Profile) -> None:
    config = configuration(profile)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == EXACT[profile.name]
    assert profile.parameters == pytest.approx(EXACT[profile.name], rel=1e-3)
    assert config.to_dict()["model_type"] == profile.family
    text = config.text_config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    assert getattr(text, "sliding_window", None) == (1024 if profile.family == "gemma3" else None)
    assert kinds == LAYER_TYPES.get(profile.family, {"full_attention"})


@pytest.mark.parametrize("profile", BUILDABLE, ids=lambda profile: profile.name)
def test_configurations_know_every_key_of_the_architecture(profile: Profile) -> None:
    def unknown(part: dict[str, Any], config: Any) -> list[str]:
        fields = {name for kind in type(config).__mro__ for name in getattr(kind, "__annotations__", {})}
        nested = [u for key, v in part.items() if key.endswith("_config") for u in unknown(v, getattr(config, key))]
        return nested + [key for key in part if key not in fields | set(config.attribute_map) | {"model_type"}]

    ids = {"bos_token_id", "eos_token_id"}  # of Qwen3-VL, where transformers takes them without naming them
    assert set(unknown(profile.architecture or {}, configuration(profile))) <= ids


@pytest.mark.parametrize("profile", BUILDABLE, ids=lambda profile: profile.name)
def test_tokens_of_a_photograph(profile: Profile) -> None:
    """By arithmetic of the released preprocessing; the stand-in processors are held to the same numbers elsewhere."""
    vision = configuration(profile).vision_config
    if profile.family == "llava":
        tokens = (vision.image_size // vision.patch_size) ** 2
    elif profile.family == "llava_next":  # four crops of a 672 px square that the photograph fills in its width
        side = vision.image_size // vision.patch_size
        rows = 2 * side * 480 // 640
        tokens = side**2 + rows * (2 * side + 1)
    elif profile.family == "llava_onevision":  # four crops; of 40.5 rows, 40 are left
        side = vision.image_size // vision.patch_size
        tokens = side**2 + 40 * (2 * side + 1)
    elif profile.family == "gemma3":
        tokens = profile.architecture["mm_tokens_per_image"]
    elif profile.family == "internvl":  # three rows of four tiles, and a thumbnail
        side = vision.image_size[0] // vision.patch_size[0] // 2
        tokens = (3 * 4 + 1) * side**2
    else:
        pixels = vision.patch_size * vision.spatial_merge_size
        tokens = round(480 / pixels) * round(640 / pixels)
    assert tokens == profile.vision_tokens


def rendered(profile: Profile, *turns: dict[str, Any], reply: bool = True) -> str:
    texts, _ = render_jinja_template(
        [list(turns)],
        chat_template=profile.chat_template,
        add_generation_prompt=reply,
        return_assistant_tokens_mask=False,
    )
    return texts[0]


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("profile", BUILDABLE, ids=lambda profile: profile.name)
def test_prompts(profile: Profile, images: int) -> None:
    prompt = rendered(profile, turn("user", "red?", images))
    token, image, around = PROMPTS.get(profile.name) or PROMPTS[profile.family]
    assert prompt == around.format(image * images)
    assert prompt.count(token) == images


def test_prompts_of_other_turns() -> None:
    """A second question goes behind the first answer, and a system turn takes the place of the standing one."""
    mistral, qwen = PROFILES["llava-next-mistral-7b"], PROFILES["qwen2.5-vl-7b"]
    turns = turn("user", "a"), turn("assistant", "b"), turn("user", "c")
    assert rendered(mistral, *turns) == "[INST] a [/INST] b</s>[INST] c [/INST]"
    with_system = rendered(qwen, turn("system", "s"), turn("user", "a"), reply=False)
    assert with_system == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize("profile", BUILDABLE, ids=lambda profile: profile.name)
def test_methods_cut_where_the_model_allows(profile: Profile) -> None:
    """Inside the language model, behind the layers to whose outputs DeepStack adds, and by attention that there is."""
    config = configuration(profile)
    first = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    layers = config.text_config.num_hidden_layers
    linear = [i for i, kind in enumerate(hf.layer_types(config.text_config)) if kind == "linear_attention"]
    if linear:
        first = 4
    places = {}
    for name in method_names():
        method = make_method(name, **profile_parameters(name, profile.methods, profile.name))
        cuts = method.cuts(profile.vision_tokens, profile.vision_tokens // 10, layers)
        places[name] = [cut.before for cut in cuts]
        assert not {cut.reads for cut in cuts} & {*linear}
    assert all(first <= layer < layers for cuts in places.values() for layer in cuts)
    assert places["fastv"] == places["random:inside"] == [max(first, 2)]


@pytest.mark.parametrize("profile", BUILDABLE, ids=lambda profile: profile.name)
def test_temperatures_of_mmtok(profile: Profile) -> None:
    values = profile_parameters("mmtok", profile.methods, profile.name)
    expected = 0.01 if profile.family.startswith("qwen") else 0.02
    assert values == {"alpha": 0.5, "vision_temperature": 0.2, "text_temperature": expected}


def test_models_table_fits_80_columns_and_goes_by_family() -> None:
    profiles = list(PROFILES.values())
    families = [profile.family for profile in profiles[1:]]
    assert profiles[0].name == "demo" and families == sorted(families)
    console = Console(width=80, record=True, file=StringIO())
    console.print(models_table(profiles, [True] * len(profiles)))
    lines = console.export_text().splitlines()
    for profile in profiles[1:]:
        [(line, behind)] = [pair for pair in pairwise(lines) if pair[0].split()[:1] == [profile.name]]
        assert len(line) <= 80
        assert f" {profile.location}" in line.rstrip() + behind.strip()  # the longest continue on a line of their own
    legend = models_legend(profiles)
    assert (
        "demo 64 16 4; gemma-3 50% 25% 10%; internvl3 20% 10% 5%; llava-1.5 192 128 64; llava-next 640 320 160; "
        "llava-onevision 25% 11.1% 6.25%; qwen2.5-vl 20% 10% 5%;" in legend
    )
