"""Models of the true architecture without their weights, and whether they fit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from mmtok_cli import models
from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError, UnloadableError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf, load_model, pretrained, room
from mmtok_cli.models.llava import Llava
from mmtok_cli.models.random_weights import fill_randomly
from mmtok_cli.models.room import laid_out, needs_of
from mmtok_cli.models.sources import architecture, shortened, weights_dtype
from mmtok_cli.models.stand_in import StandInTokenizer, llava_next_processor, llava_processor, qwen_processor
from mmtok_cli.pipeline import answer
from mmtok_cli.profiles import known_profiles

CPU = torch.device("cpu")


def small_config() -> AutoConfig:
    """LLaVA-1.5's configuration with its widths and depths cut down."""
    architecture = {**known_profiles()["llava-1.5-7b"].architecture}
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    architecture["text_config"] = {**architecture["text_config"], **narrow, "num_key_value_heads": 2}
    architecture["vision_config"] = {**architecture["vision_config"], **narrow, "image_size": 84}
    return AutoConfig.for_model("llava", **architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_model_answers_without_any_download(dtype: torch.dtype, samples: list[Sample]) -> None:
    config = small_config()
    before = torch.random.get_rng_state()
    model = fill_randomly(laid_out(config, dtype), CPU).eval()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(bool(p.isfinite().all()) and p.dtype == dtype for p in model.parameters())
    assert all(bool(b.isfinite().all()) for b in model.buffers() if b.is_floating_point())
    vlm = Llava("small", model, llava_processor(config, known_profiles()["llava-1.5-7b"].chat_template))
    for name, parameters in (("mmtok", {}), ("fastv", {"layer": 1}), ("visionzip", {})):
        said = answer(vlm, make_method(name, **parameters), samples, Budget(count=8), max_new_tokens=3)
        assert [tokens.kept for tokens in said.reduced.tokens] == [8, 8, 8]
        assert bool(said.first_logits.isfinite().all())


def test_families_without_a_stand_in_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Llava, "stand_in_processor")
    monkeypatch.setattr(Llava, "load_processor", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    config = small_config()
    monkeypatch.setattr("mmtok_cli.models.architecture", lambda *_: config)
    with pytest.raises(MMTokError, match="the llava family has no stand-in processor") as error:
        load_model("llava-1.5-7b", device="cpu", weights="random")
    assert "download" in error.value.hint


def test_the_same_random_weights_every_time() -> None:
    first, second = (fill_randomly(laid_out(small_config(), torch.float32), CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_random_weights_of_a_directory(tiny_directory: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_directory.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MMTokError, match="has no weights"):
        load_model(str(bare))
    assert load_model(str(bare), weights="random").weights == "random"
    assert load_model(str(tiny_directory)).weights == "pretrained"
    with pytest.raises(MMTokError, match="no weights 'none'"):
        load_model(str(bare), weights="none")


def test_stand_in_tokenizer() -> None:
    tokenizer = StandInTokenizer(32064, "<image>", 32000, 1, 2)
    ids = tokenizer("USER: <image>\nWhat color is the car? ASSISTANT:")["input_ids"]
    assert ids[0] == 1 and ids.count(32000) == 1
    assert len(ids) == 15
    assert max(ids) < 32064 and not {0, 1, 2} & set(ids[1:])
    words = tokenizer(["red", "car"], is_split_into_words=True)["input_ids"]
    assert words[1:] == [*tokenizer("red")["input_ids"][1:], *tokenizer("car")["input_ids"][1:]]
    padded = tokenizer(["red car", "car"], padding=True)["attention_mask"]
    assert padded[1][0] == 0 and padded[1][-1] == 1


def built(name: str) -> Any:
    profile = known_profiles()[name]
    config = AutoConfig.for_model(profile.family, **copy.deepcopy(profile.architecture))
    make = {"llava_next": llava_next_processor}.get(profile.family, qwen_processor)
    return make(config, profile.chat_template)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-2b"])
def test_stand_in_for_qwen(name: str) -> None:
    tokenizer = built(name).tokenizer
    line = [151644, *tokenizer("user\n")["input_ids"]]
    assert len(line) == 3 and max(line[1:]) < 151643
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What color are the 12 cars?<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[:6] == [*line, 151652, 151655, 151653]  # nothing stands before the first turn
    assert ids[-2:] == [151645, line[-1]]
    assert len(ids) == 16
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (151645, 151643, None)
    assert tokenizer("<|endoftext|><|video_pad|>")["input_ids"] == [151643, 151656]
    padded = tokenizer(["red car", "car"], padding=True)
    assert padded["input_ids"][1][0] == 151643 and padded["attention_mask"] == [[1, 1], [0, 1]]
    words = tokenizer(["red", "car"], is_split_into_words=True)["input_ids"]
    assert words == padded["input_ids"][0]


@pytest.mark.parametrize(
    ("name", "mean", "deviation", "fewest", "most"),
    [("qwen2.5-vl-7b", 0.40821073, 0.27577711, 3136, 12845056), ("qwen3-vl-8b", 0.5, 0.5, 65536, 16777216)],
)
def test_stand_in_sees_images_as_qwen_does(name: str, mean: float, deviation: float, fewest: int, most: int) -> None:
    processor = built(name).image_processor
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (fewest, most)
    patch = processor.patch_size**2
    assert processor.get_number_of_image_patches(8, 8) * patch == fewest
    assert 0.99 * most < processor.get_number_of_image_patches(6000, 7000) * patch <= most
    seen = processor(Image.new("RGB", (640, 480)), return_tensors="pt")
    count = int(seen["image_grid_thw"].prod())
    assert count == 4 * known_profiles()[name].vision_tokens
    assert seen["pixel_values"].shape == (count, 3 * 2 * patch)
    assert float(seen["pixel_values"].max()) == pytest.approx(-mean / deviation)  # black


def test_stand_in_cuts_images_as_llava_next_does() -> None:
    processor = built("llava-next-mistral-7b")
    for image, crops, tokens in [((640, 480), 5, 2340), ((336, 336), 3, 1176), ((900, 300), 4, 2328)]:
        out = processor(images=Image.new("RGB", image), text="[INST] <image>\nred [/INST]", return_tensors="pt")
        assert out["pixel_values"].shape == (1, crops, 3, 336, 336)
        assert out["image_sizes"].tolist() == [[image[1], image[0]]]
        assert out["input_ids"][0].tolist().count(32000) == tokens


def test_models_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 20 * 2**30)
    with pytest.raises(
        UnloadableError, match=r"7\.06 B weights take 26\.3 GiB in float32, KV cache and .* 0\.8 GiB"
    ) as error:
        load_model("llava-1.5-7b", device="cpu", dtype="float32")
    assert "cpu has 20.0 GiB free" in error.value.message
    assert "in bfloat16 it takes 13.6 GiB" in error.value.hint
    with pytest.raises(UnloadableError, match=r"13\.35 B weights take 49\.7 GiB") as error:
        load_model("llava-next-13b", device="cpu", weights="random")
    assert error.value.hint.endswith("mmtok profile --model llava-next-13b")
    layers = int(error.value.options["--layers"])
    assert error.value.options == {"--dtype": "bfloat16", "--layers": str(layers)}
    assert f"{layers} of its 40 decoder layers fit" in error.value.hint
    monkeypatch.undo()
    layout = laid_out(architecture("llava-next-13b", ""), torch.bfloat16)
    whole = needs_of(layout, torch.bfloat16, (2340,))
    assert whole.of_layers(layers).total <= 18 * 2**30 < whole.of_layers(layers + 1).total


def test_needs_count_every_byte_of_weights_and_cache(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    needs = needs_of(tiny_sdpa.model, torch.float32, (36,))
    assert needs.weights == sum(p.nbytes for p in tiny_sdpa.model.parameters())
    said = answer(tiny_sdpa, make_method("full"), samples[:1], None, max_new_tokens=1)
    tokens = said.reduced.inputs["input_ids"].shape[1]
    assert needs.layers * needs.cache / (36 + room.TEXT_TOKENS) == said.kv_cache_bytes / tokens
    assert needs.layers_within(needs.total) == needs.layers == 4
    assert needs.layers_within(needs.total - 1) == 3 and needs.layers_within(0) == 0
    eager = needs_of(tiny_sdpa.model, torch.float32, (36,), "eager")
    assert eager.working - needs.working == 4 * 164**2 * 8
    two, part = needs_of(tiny_sdpa.model, torch.float32, (36, 36)), needs.of_layers(1)
    assert (two.weights, two.working) == (needs.weights, 2 * needs.working)
    assert (part.total, part.layers) == (needs.total - 3 * (needs.layer + needs.cache), 1)


def test_needs_include_the_encoder() -> None:
    """Of a large image, the encoder's activations exceed the KV cache; four patches make a token of Qwen2.5-VL."""
    layout = laid_out(architecture("qwen2.5-vl-7b", ""), torch.bfloat16)
    needs = needs_of(layout, torch.bfloat16, (16384,))
    assert needs.encoder == 4 * 16384 * (8 * 1280 + 3 * 3420) * 2 and needs.total == needs.weights + needs.activations
    assert needs.activations == max(needs.working, needs.encoder)
    few = needs.of_layers(1)
    assert few.encoder == needs.encoder > few.working and few.total == few.weights + few.encoder
    assert needs.layers_within(few.total) == 1 and needs.layers_within(few.total - 1) == 0
    eager = needs_of(laid_out(architecture("llava-next-7b", ""), torch.bfloat16), torch.bfloat16, (2880,), "eager")
    crops = needs_of(laid_out(architecture("llava-next-7b", ""), torch.bfloat16), torch.bfloat16, (2880,))
    assert eager.encoder - crops.encoder == 16 * 2880 * 576 * 6  # each crop sees itself alone


@pytest.fixture()
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """CUDA devices that are free to so many bytes; what is put there stays on the CPU."""

    def have(free: int) -> None:
        monkeypatch.setattr(models, "choose_device", lambda name: torch.device("cuda", 0))
        monkeypatch.setattr(room, "free_on_gpus", lambda: {0: free, 1: free})
        monkeypatch.setattr(room, "free_memory", lambda device: free)

    return have


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_no_part_of_a_model_is_left_outside_the_gpus(
    weights: str, two_gpus: Callable[[int], None], tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would put what does not fit into host memory or on disk, without a word."""
    loaded: list[Any] = []
    monkeypatch.setattr(models, "_random", lambda layout, device, places: loaded.append(places))
    monkeypatch.setattr(hf, "load_weights", lambda *_, device_map, **__: loaded.append(device_map))
    layout = laid_out(architecture("tiny", str(tiny_directory)), torch.float32)
    needs = needs_of(layout, torch.float32, (36,))
    monkeypatch.setattr(room, "refusal", lambda *_: None)  # by the sum of all GPUs
    two_gpus(needs.weights // 2)  # together just enough, but for the sixth that activations get
    with pytest.raises(MMTokError, match=r"does not fit on 2 GPUs .* would be left in host memory or on disk") as error:
        load_model(str(tiny_directory), weights=weights, dtype="float32", device_map="auto")
    assert "--layers" in error.value.hint and not loaded
    two_gpus(needs.weights * 3)
    with pytest.raises(Exception, match="NoneType"):  # nothing was loaded
        load_model(str(tiny_directory), weights=weights, dtype="float32", device_map="auto")
    assert set(loaded[0].values()) <= {0, 1}


def test_weights_are_read_straight_to_the_device(
    two_gpus: Callable[[int], None], tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hf, "load_weights", lambda *_, device_map, **__: asked.append(device_map))
    two_gpus(2**34)
    for found in (True, False):
        monkeypatch.setattr(pretrained, "find_spec", lambda name, found=found: found)
        with pytest.raises(Exception, match="NoneType"):
            load_model(str(tiny_directory))
    assert asked == [{"": "cuda:0"}, None]


def test_the_fit_is_checked_in_the_data_type_of_the_files(
    two_gpus: Callable[[int], None], tiny_directory: Path, tmp_path: Path
) -> None:
    """--dtype auto keeps the type of the files on a GPU: float32 takes twice as much as float16."""
    config = json.loads((tiny_directory / "config.json").read_text())
    silent = tmp_path / "silent"
    shutil.copytree(tiny_directory, silent)
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (silent / "config.json").write_text(json.dumps(config))
    for directory in (tiny_directory, silent):
        source = architecture(str(directory), str(directory))
        assert weights_dtype(str(directory), str(directory), source) == torch.float32
        two_gpus(needs_of(laid_out(source, torch.float32), torch.float32, (576,)).total - 1)
        with pytest.raises(UnloadableError, match="GiB in float32"):
            load_model(str(directory))


@pytest.mark.parametrize("family", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen3-vl-2b"])
def test_a_part_of_a_model(family: str) -> None:
    config = architecture(family, "")
    depth = config.text_config.num_hidden_layers
    model = laid_out(shortened(config, 2, family), torch.bfloat16)
    assert len(model.model.language_model.layers) == 2 and model.config.text_config.num_hidden_layers == 2
    with pytest.raises(MMTokError, match=f"has {depth} decoder layers, not {depth + 1}"):
        shortened(architecture(family, ""), depth + 1, family)


def test_layers_of_a_directory(tiny_directory: Path, samples: list[Sample]) -> None:
    part, whole = load_model(str(tiny_directory), layers=2), load_model(str(tiny_directory))
    assert (part.loaded_layers, part.layer_count) == (2, 4) and (whole.loaded_layers, whole.layer_count) == (4, 4)
    for name, weight in part.model.named_parameters():
        assert torch.equal(weight, whole.model.get_parameter(name))
    said = answer(part, make_method("fastv", layer=1), samples[:1], Budget(count=8), max_new_tokens=1)
    assert said.reduced.tokens[0].layer_average == (36 + 3 * 8) / 4  # of the whole model
    with pytest.raises(MMTokError, match="before layer 4 of 4, and only 2 are run") as error:
        answer(part, make_method("fastv", layer=3), samples[:1], Budget(count=8))
    assert "--layers 4" in error.value.hint


def test_parts_on_devices_of_their_own() -> None:
    """As over several GPUs, with the CPU in the place of each; the weights are those of the model in one piece."""
    places = {"model.vision_tower": "cpu", "model.language_model": "cpu", "model": "cpu", "lm_head": "cpu"}
    spread = fill_randomly(laid_out(small_config(), torch.float32), CPU, places)
    whole = fill_randomly(laid_out(small_config(), torch.float32), CPU)
    assert all(torch.equal(a, b) for a, b in zip(spread.parameters(), whole.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(spread.buffers(), whole.buffers(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "magic"}, "no attention kernel 'magic'"),
        ({"attention": "flash_attention_2", "device": "cpu"}, "needs a CUDA device"),
        ({"device_map": "auto", "device": "cpu"}, "spreads a model over GPUs"),
        ({"device_map": "auto", "layers": 1}, "--device-map runs whole models only"),
        ({"device_map": "balanced"}, "no device map 'balanced'"),
        ({"layers": 0}, "has 4 decoder layers, not 0"),
    ],
)
def test_loading_that_cannot_be_done_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MMTokError, match=message):
        load_model("demo", **options)


def test_attention_kernel_is_the_one_that_was_asked_for(tiny_directory: Path) -> None:
    assert load_model(str(tiny_directory), attention="eager").attention == "eager"
    assert load_model(str(tiny_directory)).attention == "sdpa"
