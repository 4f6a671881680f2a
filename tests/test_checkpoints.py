"""Model directories that are damaged: refused with the file and the field, whatever transformers would make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import QUESTION, refused, run, run_json
from conftest import picture
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_tiny_clip, build_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from mmtok_cli.budget import Budget
from mmtok_cli.cli.main import app
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import decode
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf, load_model, trial
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.models.llava import Llava
from mmtok_cli.models.pretrained import require_finite
from mmtok_cli.pipeline import answer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LEFT_OUT = "left out"
Damage = Callable[[Path], object]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each family, undamaged."""
    found = {}
    for family, build in FAMILIES.items():
        found[family] = tmp_path_factory.mktemp("originals") / family
        model = build("sdpa")
        model.model.save_pretrained(found[family])
        model.processor.save_pretrained(found[family])
    return found


@pytest.fixture()
def damaged(originals: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's directory with some damage."""

    def make(damage: Damage, family: str = "llava") -> Path:
        directory = tmp_path / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(originals[family], directory)
        damage(directory)
        return directory

    return make


def fault_of(directory: Path, **options: Any) -> str:
    """The message, which is one line, of loading a directory."""
    with pytest.raises(MMTokError) as error:
        load_model(str(directory), device="cpu", **options)
    assert len(error.value.message.splitlines()) == 1 and len(error.value.message) < 600 and error.value.hint
    return error.value.message.replace(str(directory), "MODEL")


def field(file: str, path: str, value: Any) -> Damage:
    """Set a field of a JSON file, at a dotted path."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / file).read_text(encoding="utf-8")) if (directory / file).exists() else {}
        *parents, last = path.split(".")
        inner = content
        for name in parents:
            inner = inner[int(name)] if isinstance(inner, list) else inner.setdefault(name, {})
        if value is LEFT_OUT:
            del inner[last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
        (directory / file).write_text(json.dumps(content), encoding="utf-8")

    return damage


def content(file: str, data: bytes) -> Damage:
    return lambda directory: (directory / file).write_bytes(data)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        change(weights)
        save_file(weights, directory / WEIGHTS, {"format": "pt"})

    return damage


def shards(change: Callable[[Path, dict[str, Any]], object] = lambda *_: None) -> Damage:
    """Spread the weights over two files and an index, and change these."""

    def damage(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names = sorted(weights)
        index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
        for shard, part in zip(SHARDS, (names[:20], names[20:]), strict=True):
            save_file({name: weights[name] for name in part}, directory / shard, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(part, shard)
        change(directory, index)
        (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return damage


# ---------------------------------------------------------------------------------------------------------------------
# Weights

GROUPS = {
    "logits": "language_model.lm_head.weight",
    "embedding": "language_model.model.embed_tokens.weight",
    "norm": "language_model.model.norm.weight",
    "queries": "language_model.model.layers.1.self_attn.q_proj.weight",
    "MLP": "language_model.model.layers.3.mlp.down_proj.weight",
    "projector": "multi_modal_projector.linear_1.weight",
    "projector's bias": "multi_modal_projector.linear_2.bias",
    "encoder": "vision_tower.encoder.layers.2.mlp.fc1.weight",
    "patches": "vision_tower.embeddings.patch_embedding.weight",
}


def own_name(weight: str) -> str:
    """How the loaded model calls a stored weight, from its last three words."""
    return ".".join(weight.split(".")[-3:]).removeprefix("model.").removeprefix("language_model.")


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def fault_of_weight(weight: str, change: Callable[[Tensor], Tensor] | None, damaged: Any) -> str:
    """The message of loading a model of which one weight was changed, or left out."""

    def damage(weights: dict[str, Tensor]) -> None:
        tensor = weights.pop(weight)
        if change:
            weights[weight] = change(tensor)

    message = fault_of(damaged(tensors(damage)))
    assert own_name(weight) in message
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "the files of MODEL lack"),
        (lambda tensor: torch.zeros(3, 5), "has the shape 3x5 in the files of MODEL"),
        (lambda tensor: tensor.flatten()[:-1].clone(), "has the shape"),
        (spoil(float("nan")), "the weights of MODEL hold NaN or infinity"),
        (spoil(float("-inf")), "the weights of MODEL hold NaN or infinity"),
        (lambda tensor: tensor.to(torch.int8), "stored as I8"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "stored as F8_E4M3"),
        (lambda tensor: tensor > 0, "stored as BOOL"),
    ],
    ids=["missing", "shape", "short", "nan", "inf", "int8", "fp8", "bool"],
)
def test_damage_to_a_weight(change: Callable[[Tensor], Tensor] | None, words: str, damaged: Any) -> None:
    assert words in fault_of_weight(GROUPS["queries"], change, damaged)


@pytest.mark.parametrize("weight", GROUPS.values(), ids=GROUPS)
def test_weights_of_every_part(weight: str, damaged: Any) -> None:
    assert "NaN or infinity" in fault_of_weight(weight, spoil(float("nan")), damaged)
    assert "stored as I8" in fault_of_weight(weight, lambda tensor: tensor.to(torch.int8), damaged)


@pytest.mark.parametrize(
    ("prefix", "named"),
    [
        ("language_model.model.layers", "language_model.layers.0"),
        ("vision_tower", "vision_tower"),
        ("multi_modal_projector", "multi_modal_projector"),
        ("", "lm_head"),
    ],
)
def test_whole_parts_that_are_missing(prefix: str, named: str, damaged: Any) -> None:
    def drop(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]

    message = fault_of(damaged(tensors(drop)))
    assert "the files of MODEL lack" in message and named in message and " more" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_checked(family: str, damaged: Any) -> None:
    lost: list[str] = []
    message = fault_of(damaged(tensors(lambda weights: lost.append(weights.popitem()[0])), family))
    assert "lack" in message and lost[0].split(".")[-2] in message


def test_weights_that_the_model_does_not_have(damaged: Any) -> None:
    more = {"model.extra.weight": torch.ones(2), "language_model.model.layers.9.mlp.up_proj.weight": torch.ones(2)}
    message = fault_of(damaged(tensors(lambda weights: weights.update(more))))
    assert "hold weights that the model does not have" in message
    assert "extra.weight" in message and "layers.9.mlp.up_proj.weight" in message


def test_what_may_differ(damaged: Any, originals: dict[str, Path]) -> None:
    """Buffers that older releases stored, half precision, and decoder layers that were not asked for."""

    def change(weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor.half()
        weights["vision_tower.embeddings.position_ids"] = torch.arange(37)

    directory = damaged(tensors(change))
    assert load_model(str(directory), device="cpu").loaded_layers == 4
    assert load_model(str(directory), device="cpu", layers=2).loaded_layers == 2


@pytest.mark.parametrize(
    "data",
    [b"", b"12345678", b"\x80\x04K\x01.", bytes(5000), (2**60).to_bytes(8, "little"), b"version https://git-lfs\n"],
    ids=["empty", "short", "pickle", "zeros", "head", "pointer"],
)
def test_files_that_hold_no_weights(data: bytes, damaged: Any) -> None:
    assert f"{WEIGHTS} of MODEL cannot be read" in fault_of(damaged(content(WEIGHTS, data)))


@pytest.mark.parametrize("size", [-1, 60, 2000])
def test_files_that_are_cut_off(size: int, damaged: Any) -> None:
    def cut(directory: Path) -> None:
        (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:size])

    assert f"{WEIGHTS} of MODEL cannot be read" in fault_of(damaged(cut))


def test_pickles_are_not_read(damaged: Any) -> None:
    def pickle(directory: Path) -> None:
        torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
        (directory / WEIGHTS).unlink()

    directory = damaged(pickle)
    assert "no .safetensors file" in fault_of(directory)
    save_file({"other": torch.ones(1)}, directory / "other.safetensors")
    assert f"neither {WEIGHTS} nor {INDEX}" in fault_of(directory)


def test_weights_in_several_files(damaged: Any) -> None:
    assert load_model(str(damaged(shards())), device="cpu").weights == "pretrained"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda directory, index: (directory / SHARDS[1]).unlink(), f"{SHARDS[1]} of MODEL is missing"),
        (lambda directory, index: (directory / SHARDS[1]).write_bytes(b"12"), f"{SHARDS[1]} of MODEL cannot be read"),
        (lambda directory, index: index.pop("weight_map"), f"{INDEX} of MODEL is damaged: weight_map"),
        (lambda directory, index: index.pop("metadata"), f"{INDEX} of MODEL is damaged: metadata"),
        (lambda directory, index: index.update(weight_map={}), f"{INDEX} of MODEL is damaged: weight_map"),
        (lambda directory, index: index.update(weight_map=[]), f"{INDEX} of MODEL is damaged: weight_map"),
        (lambda directory, index: index["weight_map"].update(a=3), f"{INDEX} of MODEL is damaged: weight_map"),
        (lambda directory, index: index["weight_map"].update(a="../x.safetensors"), "not a safetensors file beside it"),
        (lambda directory, index: index["weight_map"].update(a="/x.safetensors"), "not a safetensors file beside it"),
        (lambda directory, index: index["weight_map"].update(a=""), "not a safetensors file beside it"),
        (lambda directory, index: index["weight_map"].update(a="x.bin"), "not a safetensors file beside it"),
        (lambda directory, index: index.update(weight_map=dict.fromkeys(index["weight_map"], SHARDS[0])), "lack"),
    ],
)
def test_an_index_that_is_damaged(change: Callable[[Path, dict[str, Any]], object], words: str, damaged: Any) -> None:
    assert words in fault_of(damaged(shards(change)))


def test_infinity_is_found_in_any_parameter_and_buffer() -> None:
    module = torch.nn.BatchNorm1d(4)
    require_finite(module, "it")
    module.running_mean[2] = float("inf")
    with pytest.raises(MMTokError, match="running_mean"):
        require_finite(module.half(), "it")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu], ids=str)
def test_quantized_weights_are_checked_too(dtype: torch.dtype) -> None:
    """Tensors of 8 and 4 bits, as quantized checkpoints have them."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("packed", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    module.register_buffer("scales", torch.ones(4).to(dtype))
    require_finite(module, "it")
    module.scales = torch.tensor([1, 1, float("nan"), 1]).to(dtype)
    with pytest.raises(MMTokError, match="NaN or infinity: scales"):
        require_finite(module, "it")


def test_a_damaged_text_tower(tmp_path: Path) -> None:
    build_tiny_clip().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    ClipText.load(str(tmp_path), torch.float32)
    tensors(lambda weights: weights["text_projection.weight"][0].fill_(float("nan")))(tmp_path)
    with pytest.raises(MMTokError, match="NaN or infinity: text_projection"):
        ClipText.load(str(tmp_path), torch.float32)
    tensors(lambda weights: weights.update({"text_projection.weight": torch.ones(2, 2)}))(tmp_path)
    with pytest.raises(MMTokError, match=r"text_projection\.weight has the shape 2x2"):
        ClipText.load(str(tmp_path), torch.float32)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(MMTokError, match=r"tokenizer\.json of .* is damaged"):
        ClipText.load(str(tmp_path), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Files of JSON

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"[" * 100_000, b'{"a": "\xff"}', "{}".encode("utf-16"), None],
    ids=["empty", "brace", "list", "null", "number", "text", "deep", "latin-1", "utf-16", "directory"],
)
def test_files_that_hold_no_json_object(data: bytes | None, file: str, damaged: Any) -> None:
    def damage(directory: Path) -> None:
        (directory / file).unlink()
        if data is None:
            (directory / file).mkdir()
        else:
            (directory / file).write_bytes(data)

    assert f"{file} of MODEL" in fault_of(damaged(damage))


def test_files_that_may_not_be_read(damaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as a user who may read everything, so that file modes alone do not show it."""
    read = Path.read_text

    def closed(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", closed)
    assert "tokenizer.json of MODEL cannot be read: Permission denied" in fault_of(damaged(lambda directory: None))


def test_weights_that_may_not_be_read(damaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def closed(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    directory = damaged(lambda directory: None)
    monkeypatch.setattr(Path, "open", closed)
    assert f"{WEIGHTS} of MODEL cannot be read" in fault_of(directory)


COUNTS = ("text_config.hidden_size", "text_config.num_hidden_layers", "text_config.num_attention_heads")
COUNTS += ("text_config.num_key_value_heads", "text_config.head_dim", "text_config.vocab_size")
COUNTS += ("text_config.intermediate_size", "vision_config.hidden_size", "vision_config.num_hidden_layers")
COUNTS += ("vision_config.num_attention_heads", "vision_config.patch_size", "vision_config.image_size")
NO_COUNTS = (0, -1, 10**9, 0.5, True, "7", [], {})


@pytest.mark.parametrize("path", COUNTS)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_sizes_in_the_configuration(path: str, value: Any, damaged: Any) -> None:
    assert f"config.json of MODEL is damaged: {path} is " in fault_of(damaged(field("config.json", path, value)))


NAN = float("nan")
FIELDS: list[tuple[str, str, Any]] = [
    *(("config.json", "num_hidden_layers", value) for value in (0, 10**9, "x")),  # as older files have it
    ("config.json", "rope_scaling.type", "nonsense"),
    *(("config.json", "model_type", value) for value in (3, None, [], {})),
    *(("config.json", part, value) for part in ("text_config", "vision_config") for value in (None, 3, [], "x")),
    *(("config.json", "dtype", value) for value in ("nonsense", "int8", 3, [])),
    *(("config.json", "text_config.rms_norm_eps", value) for value in (0, -1e-6, NAN, 0.5, None, "x")),
    *(("config.json", "text_config.rope_parameters.rope_theta", value) for value in (0, -1, NAN, None, "x")),
    *(("config.json", "text_config.rope_parameters.rope_type", value) for value in ("nonsense", None, 3, [])),
    *(("config.json", "text_config.rope_parameters.factor", value) for value in (0, -1, NAN)),
    *(("config.json", "text_config.hidden_act", value) for value in ("nonsense", None, 3)),
    *(("config.json", "text_config.max_position_embeddings", value) for value in (0, -1, None)),
    *(("config.json", "vision_config.hidden_act", value) for value in ("nonsense", None, 3)),
    *(("config.json", "vision_config.attention_dropout", value) for value in (2, -1, NAN)),
    *(("config.json", "projector_hidden_act", value) for value in ("nonsense", None, 3)),
    *(("config.json", "image_token_index", value) for value in (-1, None, "x", 10**9)),
    *(("config.json", "vision_feature_layer", value) for value in (None, "x", 0.5)),
    *(("config.json", "quantization_config", value) for value in ([], "x", {"quant_method": "nonsense"})),
    *(("config.json", "auto_map", value) for value in (None, "x")),
    *(("generation_config.json", "eos_token_id", value) for value in (-1, "x", {}, True, [1, None], 10**9)),
    *(("processor_config.json", "image_processor.size", value) for value in ("x", [], 0, {"shortest_edge": 0})),
    *(("processor_config.json", "image_processor.crop_size", value) for value in ("x", {"height": -1, "width": 3})),
    *(("processor_config.json", "image_processor.image_mean", value) for value in (None, 0.5, [0.5], [0, 0, NAN])),
    *(("processor_config.json", "image_processor.image_std", value) for value in (None, [1, 1, 0], [1, 1, "x"])),
    *(("processor_config.json", "image_processor.resample", value) for value in (None, 9, "x")),
    *(("processor_config.json", "image_processor.do_normalize", value) for value in (False, None, "x")),
    *(("processor_config.json", "image_processor.do_rescale", value) for value in (False, None)),
    *(("processor_config.json", "image_processor.rescale_factor", value) for value in (0, 1, NAN, None)),
    *(("processor_config.json", "image_processor", value) for value in (None, 3, "x", [])),
    *(("processor_config.json", "processor_class", value) for value in (3, [])),
    *(("tokenizer_config.json", "eos_token", value) for value in (3, [], True)),
    *(("tokenizer_config.json", "padding_side", value) for value in ("up", None, 3)),
    *(("tokenizer_config.json", "tokenizer_class", value) for value in (3, [])),
    *(("tokenizer_config.json", "extra_special_tokens", value) for value in (3, "x")),
    *(("tokenizer_config.json", "model_max_length", value) for value in (0, -1, "x")),
    *(("tokenizer_config.json", "chat_template", value) for value in (3, [3])),
    *(("tokenizer_config.json", "auto_map", value) for value in (None, "x")),
    *(("chat_template.json", "chat_template", value) for value in (3, [3])),
]


@pytest.mark.parametrize(("file", "path", "value"), FIELDS, ids=lambda value: str(value))
def test_fields(file: str, path: str, value: Any, damaged: Any) -> None:
    message = fault_of(damaged(field(file, path, value)))
    assert f"{file} of MODEL is damaged: " in message and path.partition(".")[0] in message


QWEN_FIELDS = [
    *(("config.json", "text_config.rope_parameters.mrope_section", value) for value in (None, [], [2, 2], [2, 2, 3])),
    *(("config.json", "vision_config.fullatt_block_indexes", value) for value in (None, [], [99], [-1], ["x"])),
    *(("config.json", "vision_config.num_heads", value) for value in (0, 16, None)),
    *(("config.json", "vision_config.spatial_merge_size", value) for value in (0, 4, None)),
    *(("preprocessor_config.json", "patch_size", value) for value in (0, 7, "x")),
    *(("preprocessor_config.json", "merge_size", value) for value in (0, 4)),
    *(("preprocessor_config.json", "size.longest_edge", value) for value in (0, -1, None)),
]


@pytest.mark.parametrize(("file", "path", "value"), QWEN_FIELDS, ids=lambda value: str(value))
def test_fields_of_qwen(file: str, path: str, value: Any, damaged: Any) -> None:
    message = fault_of(damaged(field(file, path, value), "qwen2_5_vl"))
    assert file in message or "config.json" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (field("config.json", "text_config.num_attention_heads", 7), "config.json of MODEL cannot be used"),
        (field("config.json", "text_config.hidden_size", None), "hidden_size"),
        (field("config.json", "text_config.model_type", "nonsense"), "nonsense"),
        (field("config.json", "text_config.pad_token_id", 10**6), "config.json of MODEL"),
        (field("config.json", "text_config.num_hidden_layers", 3), "does not have: model.language_model.layers.3"),
        (field("config.json", "image_token_index", 7), "0 image tokens with the id 7"),
        (field("config.json", "model_type", "bert"), "is a 'bert' model"),
        (field("generation_config.json", "eos_token_id", 1000), "a token 1000"),
        (field("tokenizer.json", "model.vocab.red", 1000), "a token 1000"),
        (field("tokenizer.json", "model.vocab.red", 5), "the same number to several words"),
        (field("tokenizer.json", "post_processor.special_tokens", {}), "the processor of MODEL fails"),
        (field("tokenizer.json", "model.type", "nonsense"), "the processor of MODEL cannot be loaded"),
        (field("tokenizer.json", "added_tokens", {}), "MODEL"),
        (field("adapter_config.json", "peft_type", "LORA"), "adapter_config.json"),
        (lambda directory: (directory / "tokenizer.json").unlink(), "the processor of MODEL cannot be loaded"),
        (lambda directory: (directory / "processor_config.json").unlink(), "the processor of MODEL cannot be loaded"),
    ],
)
def test_files_that_do_not_fit_together(damage: Damage, words: str, damaged: Any) -> None:
    assert words in fault_of(damaged(damage))


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "b" * 300, "~nobody-of-this-name", "\0", "/" + "y" * 5000])
def test_names_that_no_directory_can_have(name: str) -> None:
    with pytest.raises(MMTokError) as error:
        load_model(name, device="cpu")
    assert len(error.value.message.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates

TEMPLATES = {
    "syntax": ("{% for", "fails: unexpected 'end of template'"),
    "raise": ("{{ raise_exception('no\nway') }}", "fails: no way"),
    "undefined": ("{{ messages.foo.bar }}", "fails: 'list object' has no attribute 'foo'"),
    "unknown function": ("{{ foo() }}", "fails: 'foo' is undefined"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
    "unsafe change": ("{{ messages.append(1) }}", "fails: access to attribute 'append'"),
    "division": ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
    "include": ("{% include '/etc/hosts' %}", "fails"),
    "recursion": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "fails: maximum recursion depth"),
    "no image": ("{{ messages[0].content[1].text }}", "puts 0 image tokens into a prompt about 1 image"),
    "two images": ("<image><image>{{ messages[0].content[-1].text }}", "puts 2 image tokens"),
    "no question": ("<image> Hello", "leaves out the question"),
    "empty": (" ", "puts 0 image tokens"),
    "long": ("<image>{{ 'word ' * 100000 }}", "makes 500007 characters of a short question"),
    "memory": ("{{ 'a' * 10 ** 11 }}", "takes too much time or memory"),
    "growth": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "takes too much time or memory",
    ),
    "endless": (
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "takes too much time or memory",
    ),
}
# Starting a process takes most of a test. One is started for those that it stops, and for some that it must survive.
TRIED = [TEMPLATES[name][0] for name in ("long", "memory", "growth", "endless", "syntax", "recursion", "no question")]


@pytest.mark.parametrize(("template", "words"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates(template: str, words: str, damaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TEMPLATE_SECONDS", 1)  # of processor time
    if template not in TRIED:
        monkeypatch.setattr(hf, "rendered_length", lambda *args: 0)  # as of every template that fails
    message = fault_of(damaged(content("chat_template.jinja", template.encode())))
    assert message.startswith("the chat template of MODEL ") and words in message


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.stderr.write('first\\nlast\\n'); sys.exit(1)", "cannot be tried: last"),
        ("raise SystemExit(1)", "cannot be tried: its process gave no reason"),
        ("", "cannot be tried"),
    ],
    ids=["message", "silent", "no output"],
)
def test_a_trial_that_fails(code: str, words: str, damaged: Any, tmp_path: Path, monkeypatch: Any) -> None:
    program = tmp_path / "program.py"
    program.write_text(code)
    monkeypatch.setattr(hf.render_template, "__file__", str(program))
    template = f"<image>{{{{ messages[0].content[-1].text }}}} {code!r}"  # its length is not cached
    assert words in fault_of(damaged(content("chat_template.jinja", template.encode())))


def test_a_template_that_fails_over_one_prompt_alone(tiny_sdpa: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if 'red' in messages[0].content[-1].text %}{{ foo.bar }}{% endif %}<image>"
    monkeypatch.setattr(tiny_sdpa.processor, "chat_template", template)
    assert tiny_sdpa.chat("What is it?", 1) == "<image>"
    with pytest.raises(MMTokError, match="the chat template of tiny fails: 'foo' is undefined"):
        tiny_sdpa.chat("Is it red?", 1)
    with pytest.raises(MMTokError, match="puts 1 image tokens into a prompt about 2 images"):
        tiny_sdpa.chat("What are they?", 2)


# ---------------------------------------------------------------------------------------------------------------------
# Code of a model

EVIL = "from pathlib import Path\nPath({target!r}).write_text('ran')\nclass T: pass\n"
AUTO_MAPS: list[Mapping[str, Mapping[str, Any]]] = [
    {"config.json": {"auto_map": {"AutoConfig": "evil.T", "AutoModelForImageTextToText": "evil.T"}}},
    {"config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.T"}}},
    {"processor_config.json": {"auto_map": {"AutoProcessor": "evil.T", "AutoImageProcessor": "evil.T"}}},
    {"processor_config.json": {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.T"}}},
    {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"], "AutoProcessor": "evil.T"}}},
    {"tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}},
]


def with_code(directory: Path, settings: Mapping[str, Mapping[str, Any]]) -> Path:
    """Add Python files that leave a trace when they run; where that is."""
    trace = directory.parent / "trace"
    for file in ("evil.py", "custom_generate/generate.py"):
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(EVIL.format(target=str(trace)), encoding="utf-8")
    for file, fields in settings.items():
        for name, value in fields.items():
            field(file, name, value)(directory)
    return trace


@pytest.mark.parametrize("settings", AUTO_MAPS, ids=str)
def test_code_never_runs(settings: Any, damaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", ask)
    traces: list[Path] = []
    directory = damaged(lambda directory: traces.append(with_code(directory, settings)))
    try:
        load_model(str(directory), device="cpu")  # where transformers has a class of its own, that is used
    except MMTokError as error:
        assert "never run" in error.message or "not supported" in error.message
    assert not traces[0].exists()


def test_nobody_is_asked(damaged: Any, photo: Path) -> None:
    traces: list[Path] = []
    directory = damaged(lambda directory: traces.append(with_code(directory, AUTO_MAPS[3])))
    arguments = ["infer", str(photo), QUESTION, "-m", str(directory), "-b", "4"]
    refused(CliRunner().invoke(app, arguments, input="y\n"), "auto_map")
    assert not traces[0].exists()


# ---------------------------------------------------------------------------------------------------------------------
# Through the command line, and the answers of those that load


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tensors(lambda weights: weights.pop(GROUPS["projector"])), "linear_1.weight"),
        (tensors(lambda weights: weights[GROUPS["norm"]].fill_(float("nan"))), "NaN or infinity"),
        (field("config.json", "text_config.hidden_size", 0), "text_config.hidden_size is 0"),
        (field("tokenizer_config.json", "padding_side", 3), "tokenizer_config.json"),
        (content("chat_template.jinja", b"{% for"), "chat template"),
    ],
)
@pytest.mark.parametrize("method", ["fastv", "none"])
def test_command_line(damage: Damage, words: str, method: str, damaged: Any, photo: Path) -> None:
    budget = () if method == "none" else ("-b", 4)
    refused(run("infer", photo, QUESTION, "-m", damaged(damage), "--method", method, *budget), words)


def test_random_weights_need_sound_files_too(damaged: Any) -> None:
    directory = damaged(field("tokenizer_config.json", "padding_side", 3))
    assert "tokenizer_config.json" in fault_of(directory, weights="random")


@pytest.mark.parametrize("generation", [None, LEFT_OUT, 7, [7, 8]], ids=str)
def test_answers_end_where_tokenizer_or_generation_settings_say(generation: Any, damaged: Any) -> None:
    def damage(directory: Path) -> None:
        if generation is LEFT_OUT:
            (directory / "generation_config.json").unlink()
            field("config.json", "text_config.eos_token_id", None)(directory)
        else:
            field("generation_config.json", "eos_token_id", generation)(directory)

    model = load_model(str(damaged(damage)), device="cpu")
    named = {2} if generation in (None, LEFT_OUT) else {7, 2} if generation == 7 else {7, 8, 2}
    assert set(model.eos_token_ids) == named
    sample = Sample((picture(84, 84, 1),), QUESTION, ("x",))
    said = answer(model, make_method("mmtok"), [sample], Budget(count=8), max_new_tokens=1)
    for end in named:  # an answer that begins with it is over
        logits = torch.nn.functional.one_hot(torch.tensor([end]), said.first_logits.shape[1]).float()
        assert decode(model, said.reduced.inputs, logits, None, 20).tolist() == [[end]]


def test_a_model_without_an_end_of_answers_is_refused(damaged: Any) -> None:
    def damage(directory: Path) -> None:
        field("generation_config.json", "eos_token_id", None)(directory)
        field("tokenizer_config.json", "eos_token", None)(directory)

    assert "names no token that ends an answer" in fault_of(damaged(damage))


def test_logits_that_are_not_numbers_are_no_answer(tiny_sdpa: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where float16 overflows: token 0 would be the answer."""
    real = hf.forward
    monkeypatch.setattr(hf, "forward", lambda *args: (real(*args)[0] * float("nan"), None))
    sample = Sample((picture(84, 84, 1),), QUESTION, ("x",))
    with pytest.raises(MMTokError, match="NaN or infinity in place of an answer"):
        answer(tiny_sdpa, make_method("none"), [sample], None)


def test_the_embedded_model_needs_no_trial_of_its_template(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "rendered_length", lambda *args: 1 / 0)
    assert run_json("infer", photo, QUESTION, "-b", 16, "--max-new-tokens", 1)["answer"]
