"""The files of a model directory, checked before transformers reads them.

transformers ignores some damaged files and fails on others far from where they are at fault. What is checked here is
refused with the name of the file and the field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.families import require_family
from mmtok_cli.models.foreign_errors import COMPARE, shorten, summary

Count = Annotated[int, Field(ge=1, le=2**24)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Index = Annotated[int, Field(ge=0, lt=2**24)]
Length = Annotated[int, Field(ge=1, le=2**31)]
Epsilon = Annotated[float, Field(gt=0, lt=0.1)]
Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Base = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Sides = Count | Annotated[list[Count], Field(min_length=2, max_length=2)]
Size = dict[str, Count] | Count | None
Token = str | dict[str, Any] | None
Template = str | list[dict[str, str]] | dict[str, str] | None
Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"] | None

# The fields on which inference depends, in files that hold many others. All may be left out: transformers has defaults.
strict = with_config(ConfigDict(strict=True))


@strict
class RopeParameters(TypedDict, total=False):
    rope_theta: Base
    rope_type: str
    type: str
    factor: Factor
    mrope_section: list[Count]


@strict
class TextConfig(TypedDict, total=False):
    dtype: Dtype
    torch_dtype: Dtype
    model_type: str
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None
    head_dim: Count | None
    vocab_size: Count
    max_position_embeddings: Length
    rms_norm_eps: Epsilon
    attention_dropout: Share | None
    hidden_act: str
    rope_theta: Base
    rope_parameters: RopeParameters | None
    rope_scaling: RopeParameters | None


@strict
class VisionConfig(TypedDict, total=False):
    dtype: Dtype
    torch_dtype: Dtype
    model_type: str
    hidden_size: Count
    intermediate_size: Count
    out_hidden_size: Count
    num_hidden_layers: Layers
    depth: Layers
    num_attention_heads: Count
    num_heads: Count
    num_channels: Count
    in_channels: Count
    num_position_embeddings: Count
    image_size: Sides
    patch_size: Sides
    window_size: Count
    spatial_merge_size: Count
    temporal_patch_size: Count
    layer_norm_eps: Epsilon
    attention_dropout: Share | None
    hidden_dropout_prob: Share | None
    projection_dropout: Share | None
    hidden_act: str
    fullatt_block_indexes: list[Index]
    deepstack_visual_indexes: list[Index]
    rope_parameters: RopeParameters | None


@strict
class ModelConfig(TextConfig, total=False):
    """Older files have the fields of the language model at the top."""

    auto_map: dict[str, Any]
    text_config: TextConfig
    vision_config: VisionConfig
    image_token_id: Index
    image_token_index: Index
    projector_hidden_act: str
    vision_feature_layer: int | list[int]
    vision_feature_select_strategy: str
    image_grid_pinpoints: Annotated[
        list[Annotated[list[Count], Field(min_length=2, max_length=2)]], Field(min_length=1)
    ]
    downsample_ratio: Annotated[float, Field(gt=0, le=1)]
    quantization_config: dict[str, Any] | None


@strict
class ImageProcessorConfig(TypedDict, total=False):
    image_processor_type: str | None
    do_resize: bool | None
    do_center_crop: bool | None
    do_convert_rgb: bool | None
    do_normalize: Literal[True]
    do_rescale: Literal[True]
    size: Size
    crop_size: Size
    image_mean: Annotated[list[Share], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[Deviation], Field(min_length=3, max_length=3)]
    resample: Annotated[int, Field(ge=0, le=5)]
    rescale_factor: Annotated[float, Field(gt=0, lt=0.1)]  # from 0 to 255 to about 0 to 1
    image_grid_pinpoints: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] | None
    patch_size: Count | None
    merge_size: Count | None
    temporal_patch_size: Count | None
    min_pixels: Count | None
    max_pixels: Count | None
    min_patches: Count | None
    max_patches: Count | None


@strict
class ProcessorConfig(ImageProcessorConfig, total=False):
    auto_map: dict[str, Any]
    processor_class: str | None
    image_processor: ImageProcessorConfig
    image_token: Token
    chat_template: Template
    num_additional_image_tokens: Index | None
    vision_feature_select_strategy: str | None


@strict
class TokenizerConfig(TypedDict, total=False):
    auto_map: dict[str, Any]
    tokenizer_class: str | None
    bos_token: Token
    eos_token: Token
    pad_token: Token
    unk_token: Token
    image_token: Token
    padding_side: Literal["left", "right"]
    model_max_length: Factor | None
    added_tokens_decoder: dict[str, dict[str, Any]]
    extra_special_tokens: list[Any] | dict[str, Any]
    additional_special_tokens: list[Any] | None
    chat_template: Template


@strict
class GenerationConfig(TypedDict, total=False):
    eos_token_id: Index | list[Index] | None


@strict
class WeightsIndex(TypedDict):
    metadata: dict[str, Any]
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


@strict
class ChatTemplate(TypedDict):
    chat_template: Template


FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# All but the configuration may be missing; which ones are needed depends on the family.
FILES: dict[str, Any] = {
    CONFIG: ModelConfig,
    "generation_config.json": GenerationConfig,
    "preprocessor_config.json": ImageProcessorConfig,
    "processor_config.json": ProcessorConfig,
    "tokenizer_config.json": TokenizerConfig,
    "tokenizer.json": dict[str, Any],
    "special_tokens_map.json": dict[str, Any],
    "added_tokens.json": dict[str, Index],
    "chat_template.json": ChatTemplate,
}
Content = TypeVar("Content")


def check_config(directory: Path, name: str) -> None:
    """Raises MMTokError for a configuration that is damaged, or describes what is not supported."""
    config = read_json(directory / CONFIG, ModelConfig, name)
    require_family(config.get("model_type", ""), name)
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    ropes = {
        "rope_parameters": config.get("rope_parameters"),
        "rope_scaling": config.get("rope_scaling"),
        "text_config.rope_parameters": text.get("rope_parameters"),
        "text_config.rope_scaling": text.get("rope_scaling"),
        "vision_config.rope_parameters": vision.get("rope_parameters"),
    }
    activations, rotary_types = hf.activations(), hf.rotary_types()
    quantizer = (config.get("quantization_config") or {}).get("quant_method")
    for field, given, known in (
        ("quantization_config.quant_method", quantizer, hf.quantizers()),
        ("projector_hidden_act", config.get("projector_hidden_act"), activations),
        ("hidden_act", config.get("hidden_act"), activations),
        ("text_config.hidden_act", text.get("hidden_act"), activations),
        ("vision_config.hidden_act", vision.get("hidden_act"), activations),
        *((f"{field}.rope_type", (rope or {}).get("rope_type"), rotary_types) for field, rope in ropes.items()),
        *((f"{field}.type", (rope or {}).get("type"), rotary_types) for field, rope in ropes.items()),
    ):
        if given is not None and given not in known:
            raise MMTokError(f"{CONFIG} of {name} is damaged: {field} is {given!r}, which is not known", COMPARE)


def check_directory(directory: Path, name: str) -> None:
    """Raises MMTokError for a file that is damaged, or that needs something unsupported."""
    for file, shape in FILES.items():
        if (directory / file).exists():
            read_json(directory / file, shape, name)
    template = directory / "chat_template.jinja"
    if template.exists():
        _decoded(template, name)
    if (directory / "adapter_config.json").exists():
        raise MMTokError(
            f"{name} holds an adapter (adapter_config.json), which is not supported",
            "merge it into the model's weights",
        )


def read_json(path: Path, shape: type[Content], name: str) -> Content:
    """The content of a JSON file of the model `name`. Raises MMTokError that names the file and the field at fault."""
    text = _decoded(path, name)
    try:
        return TypeAdapter(shape).validate_json(text)
    except ValidationError as error:
        raise MMTokError(f"{path.name} of {name} is damaged: {_fault(error)}", COMPARE) from error


def _fault(error: ValidationError) -> str:
    """The deepest of the faults: where several types are allowed, it belongs to the type that was meant."""
    fault = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    message = fault["msg"]
    # Besides names of fields, the location holds names of types.
    field = ".".join(
        str(part) for part in fault["loc"] if re.fullmatch(r"[a-z0-9_]+", str(part)) and part not in ("int", "str")
    )
    if not field or fault["type"] == "missing":
        return f"{field}: {message}" if field else message
    given = shorten(repr(fault["input"]), 60)
    return f"{field} is {given}: {message}"


def _decoded(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MMTokError(f"{path.name} of {name} cannot be read: {error.strerror}", "check the file") from error
    except UnicodeDecodeError as error:
        raise MMTokError(f"{path.name} of {name} is not UTF-8 text: {error.reason}", COMPARE) from error


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def check_stored_weights(directory: Path, name: str) -> None:
    """Raises MMTokError unless the weights of a directory are safetensors files that are whole and hold numbers.

    Only the heads of the files are read.
    """
    quantized = read_json(directory / CONFIG, ModelConfig, name).get("quantization_config")
    for file in _weight_files(directory, name):
        for tensor, dtype in _stored_types(file, name).items():
            # Positions are computed when the model is built; older releases stored them as integers.
            if dtype not in FLOATS and not quantized and not tensor.endswith("position_ids"):
                raise MMTokError(
                    f"{tensor} in {file.name} of {name} is stored as {dtype}, and config.json names no quantization",
                    f"weights must be stored as {', '.join(FLOATS)}",
                )


def stored_floats(directory: Path, name: str) -> set[torch.dtype]:
    """The floating-point types of the weights of a directory. Raises MMTokError as `check_stored_weights` does."""
    types = {dtype for file in _weight_files(directory, name) for dtype in _stored_types(file, name).values()}
    return {FLOATS[dtype] for dtype in types if dtype in FLOATS}


def _weight_files(directory: Path, name: str) -> list[Path]:
    """The files that transformers loads: the single one where there is one, otherwise those of the index."""
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX).exists():
        raise MMTokError(
            f"{name} has no weights: there is neither {SINGLE_FILE} nor {INDEX} in it",
            "copy the weights there too; only safetensors files are read",
        )
    shards = dict.fromkeys(read_json(directory / INDEX, WeightsIndex, name)["weight_map"].values())
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise MMTokError(f"{INDEX} of {name} names {shard!r}, which is not a safetensors file beside it", COMPARE)
    return [directory / shard for shard in shards]


def _stored_types(file: Path, name: str) -> dict[str, str]:
    """The type of each tensor in a safetensors file, as the file calls it."""
    if not file.is_file():
        raise MMTokError(f"{file.name} of {name} is missing, or is not a file", "copy all of its weights")
    try:
        file.open("rb").close()  # safetensors says of a file that may not be read that there is none
        with safe_open(file, framework="pt") as stored:
            return {tensor: stored.get_slice(tensor).get_dtype() for tensor in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MMTokError(f"{file.name} of {name} cannot be read: {summary(error)}", COMPARE) from error
