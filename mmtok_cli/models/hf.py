"""Everything mmtok knows about the inside of transformers: names of classes, modules, arguments and outputs.

transformers renames such things between minor releases, so no other file of this package mentions them. They are read
strictly: a name that is not found raises an MMTokError with the installed version and the tested range. A missing name
never stands for "none".
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import render_template

VERSION: str = transformers.__version__
OLDEST, BEYOND = "5.18", "5.25"  # minor releases that the compatibility tests ran with: from OLDEST, below BEYOND
Rotary = tuple[Tensor, Tensor]  # cosine and sine of the positions

# Newer releases first. Decoder layers, models and their outputs all use the same name.
CACHE_NAMES = ("cache", "past_key_values")

# Arguments that decorators take out of **kwargs, so that no signature shows them. What they ask for is checked on the
# output instead.
UNNAMED_ARGUMENTS = {"use_cache", "return_dict", "output_hidden_states"}


# ---------------------------------------------------------------------------------------------------------------------
# Strict reading


def tested_range() -> str:
    """The tested releases as a requirement: "transformers>=5.18,<5.25"."""
    return f"transformers>={OLDEST},<{BEYOND}"


def is_tested(version: str = VERSION) -> bool:
    """Whether the release lies in the tested range."""

    def minor(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", text)[:2])

    return minor(OLDEST) <= minor(version) < minor(BEYOND)


def changed(missing: str) -> MMTokError:
    """The error for a name that this release of transformers does not have."""
    tested = f"{OLDEST} up to, but not including, {BEYOND}"
    return MMTokError(
        f"transformers {VERSION} has no {missing}, which mmtok needs; mmtok was tested with {tested}",
        f'pip install "{tested_range()}"',
    )


def or_tested(hint: str) -> str:
    """The hint for a fault that the installed release may have caused: it names the tested ones where it is not one."""
    if is_tested():
        return hint
    return f'{hint}; or, since transformers {VERSION} was not tested with mmtok: pip install "{tested_range()}"'


def part(parent: Any, path: str) -> Any:
    """The attribute at a dotted path. Raises MMTokError where there is none."""
    for name in path.split("."):
        try:
            parent = getattr(parent, name)
        except AttributeError as error:
            raise changed(f"{type(parent).__name__}.{name}") from error
    return parent


def imported(module: str, name: str) -> Any:
    """An object of one of transformers' modules. Raises MMTokError where there is none."""
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise changed(f"transformers.{module}.{name}") from error


def public(name: str) -> Any:
    """A class that transformers exports. Raises MMTokError where there is none."""
    try:
        return getattr(transformers, name)
    except (ImportError, AttributeError) as error:
        raise changed(f"class {name}") from error


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function, method or module of transformers whose signature must name the keyword arguments.

    Their `**kwargs` would accept a renamed argument silently: images given to a forward pass would be ignored.
    Raises MMTokError for an argument that the signature does not name.
    """
    if isinstance(function, nn.Module):
        owner, signature = type(function).__name__, _parameters(type(function).forward)
    else:
        owner, signature = function.__qualname__, _parameters(getattr(function, "__func__", function))
    for name in kwargs:
        if name not in signature and name not in UNNAMED_ARGUMENTS:
            raise changed(f"argument {name!r} of {owner}")
    return function(*args, **kwargs)


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD)


def _output(output: Any, name: str) -> Any:
    """A field of a model output that must be set."""
    value = part(output, name)
    if value is None:
        raise changed(f"value in {type(output).__name__}.{name}")
    return value


def silence() -> None:
    """Silence the log messages and progress bars of transformers and its hub client."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    if HF_HUB_DISABLE_PROGRESS_BARS is None:  # otherwise the environment decides, and the call warns
        disable_progress_bars()


_quiet_lock = threading.Lock()
_loud: list[Callable[[], None]] = []  # one for each open `quiet`: restores the settings that it found


@contextmanager
def quiet() -> Iterator[None]:
    """`silence` while the context is open; afterwards log levels and progress bars are as before.

    Contexts may be nested or open in several threads; the last one that is left restores what the first one found.
    """
    with _quiet_lock:
        _loud.append(_loud[0] if _loud else _restorer())
        silence()
    try:
        yield
    finally:
        with _quiet_lock:
            restore = _loud.pop()
            if not _loud:
                restore()


def _restorer() -> Callable[[], None]:
    """A function that undoes `silence`."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    levels = logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    def restore() -> None:
        logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()

    return restore


# ---------------------------------------------------------------------------------------------------------------------
# Loading


# Passed wherever files are loaded: Python code of a model is never run, and the user is not prompted to allow it.
NO_CODE = {"trust_remote_code": False}


def load_config(source: str) -> Any:
    """The configuration of a directory or hub id. Raises OSError or ValueError where there is none."""
    with quiet():
        return public("AutoConfig").from_pretrained(source, **NO_CODE)


def make_config(model_type: str, settings: Mapping[str, Any]) -> Any:
    """A configuration of the given architecture."""
    return public("AutoConfig").for_model(model_type, **settings)


def stored_dtype(config: Any) -> torch.dtype | None:
    """The data type that a configuration says its weights are stored in; None where it says nothing."""
    dtype = part(config, "dtype")
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@dataclass(frozen=True)
class EncoderShape:
    """A vision encoder: widths of its states and of its MLP, attention heads, and patches per vision token.

    longest: patches of the pictures of fixed size that it sees; None where images have their own.
    """

    hidden: int
    intermediate: int
    heads: int
    patches: int
    longest: int | None


def encoder_shape(config: Any) -> EncoderShape:
    """The shape of the encoder of a model's configuration."""
    vision = part(config, "vision_config")
    heads = getattr(vision, "num_heads", None) or part(vision, "num_attention_heads")
    side = getattr(vision, "spatial_merge_size", None) or round(1 / getattr(config, "downsample_ratio", 1))
    pictures, patch = getattr(vision, "image_size", None), part(vision, "patch_size")
    longest = None if pictures is None else (_side(pictures) // _side(patch)) ** 2
    tokens = getattr(config, "mm_tokens_per_image", None)  # of Gemma, whose tokens are means of patches
    if tokens and longest:
        side = round((longest / tokens) ** 0.5)
    return EncoderShape(part(vision, "hidden_size"), part(vision, "intermediate_size"), heads, side**2, longest)


def _side(size: Any) -> int:
    """Pixels along a side, of which configurations have one or a list of both."""
    return int(size if isinstance(size, int) else size[0])


def activations() -> list[str]:
    """Names of the activation functions."""
    return list(imported("activations", "ACT2FN"))


def rotary_types() -> list[str]:
    """Names of the ways to compute the rotary embedding."""
    return ["default", "mrope", "axial", *imported("modeling_rope_utils", "ROPE_INIT_FUNCTIONS")]


def quantizers() -> list[str]:
    """Names of the ways to store quantized weights."""
    return list(imported("quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING"))


@dataclass(frozen=True)
class Loaded:
    """A loaded model, and where the stored weights differ from it.

    missing, unexpected: names of weights that only the model has, or only the files. mismatched: those of another
    shape, with the stored shape and the model's.
    """

    model: Any
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]


def load_weights(
    source: str,
    config: Any,
    *,
    dtype: torch.dtype | None,
    attention: str | Mapping[str, str],
    device_map: Mapping[str, int | str] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> Loaded:
    """The model of a directory or hub id from safetensors files. Without a dtype, it has that of the stored weights.

    device_map: the device of each part. quantization: the arguments with which weights are quantized.
    """
    return _loaded(
        public("AutoModelForImageTextToText"),
        source,
        config=config,
        dtype=dtype or "auto",
        attn_implementation=attention,
        **(quantization or {"device_map": device_map}),
    )


def bitsandbytes_config(bits: int, dtype: torch.dtype) -> Any:
    """How bitsandbytes quantizes to 8 or 4 bits. dtype: of the products with weights of 4 bits."""
    if bits == 8:
        return public("BitsAndBytesConfig")(load_in_8bit=True)
    return public("BitsAndBytesConfig")(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def torchao_config(config: Any) -> Any:
    """One of torchao's configurations, for `load_weights`."""
    return public("TorchAoConfig")(config)


def compile_language_model(model: Any) -> None:
    """Compile the language model's forward pass, in place, for sequences of any length.

    A further kind of input is compiled when it first occurs; too many of them are an error, not a run without
    compilation.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    language_model(model).compile(dynamic=True)


def _loaded(kind: Any, source: str, **options: Any) -> Loaded:
    with quiet():
        # Weights of another shape are reported like missing ones, by name, and refused by the caller.
        model, report = kind.from_pretrained(
            source,
            **NO_CODE,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    missing, unexpected, mismatched = (
        sorted(report[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    return Loaded(model, missing, unexpected, mismatched)


def empty_model(config: Any, dtype: torch.dtype | None, attention: str | Mapping[str, str]) -> Any:
    """The model of a configuration on the meta device, without memory for its weights."""
    with quiet(), torch.device("meta"):
        return public("AutoModelForImageTextToText").from_config(config, dtype=dtype, attn_implementation=attention)


def initialize_weights(model: Any) -> None:
    """Draw the weights of a model of `empty_model` that has got its memory, and compute its buffers."""
    part(model, "initialize_weights")()
    part(model, "tie_weights")()


def unsplittable_modules(model: Any) -> Any:
    """Classes of modules that must lie on one device each."""
    return part(model, "_no_split_modules")


def load_processor(source: str, *, local_files_only: bool = False) -> Any:
    """The processor of a directory or hub id, with image processors that do not need torchvision.

    Raises OSError or ValueError where there is none.
    """
    with quiet():
        return public("AutoProcessor").from_pretrained(
            source, **NO_CODE, backend="pil", local_files_only=local_files_only
        )


def load_tokenizer(source: str | Path, *, local_files_only: bool = False) -> Any:
    with quiet():
        return public("AutoTokenizer").from_pretrained(source, **NO_CODE, local_files_only=local_files_only)


def load_chat_template(source: str | Path, *, local_files_only: bool = False) -> Any:
    """The chat template among a processor's settings: text, several by name, or None."""
    with quiet():
        read = part(imported("processing_utils", "ProcessorMixin"), "get_processor_dict")
        settings, _ = read(source, local_files_only=local_files_only)
    return settings.get("chat_template")


RENDER_SECONDS = 300  # for the process below to start and end, however busy the machine is


def rendered_length(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    variables: Mapping[str, str],
    seconds: int,
    memory: int,
) -> int | None:
    """Characters of the longest prompt that a chat template makes of the conversations, in a process of its own.

    None for a template that takes more seconds of processor time, or more bytes of memory. Raises RuntimeError where
    the process fails.
    """
    task = {
        "module": "transformers.utils.chat_template_utils",
        "function": "render_jinja_template",
        "arguments": {"chat_template": template, "add_generation_prompt": True, **variables},
        "conversations": conversations,
        "seconds": seconds,
        "bytes": memory,
    }
    command = [sys.executable, "-P", render_template.__file__]  # -P: no module beside the file is imported
    try:
        done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, timeout=RENDER_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == render_template.OUT_OF_MEMORY or done.returncode < 0:  # stopped at the limit of its time
        return None
    if done.returncode:
        *_, last = ["its process gave no reason", *done.stderr.strip().splitlines()]
        raise RuntimeError(last)
    return int(done.stdout)


def image_processor_class(kind: str) -> Any:
    """The image processor that works on PIL images, without torchvision.

    kind: clip, gemma3, got_ocr2 (InternVL), llava, llava_next, llava_onevision, qwen2_vl.
    """
    names = {
        "clip": "CLIP",
        "gemma3": "Gemma3",
        "got_ocr2": "GotOcr2",
        "llava": "Llava",
        "llava_next": "LlavaNext",
        "llava_onevision": "LlavaOnevision",
        "qwen2_vl": "Qwen2VL",
    }
    return imported(f"models.{kind}.image_processing_pil_{kind}", f"{names[kind]}ImageProcessorPil")


def load_image_processor(kind: str, source: str | Path, *, local_files_only: bool = False) -> Any:
    with quiet():
        return image_processor_class(kind).from_pretrained(source, **NO_CODE, local_files_only=local_files_only)


def pixel_statistics(kind: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that images are normalised with. kind: OPENAI_CLIP, IMAGENET_STANDARD."""
    return imported("image_utils", f"{kind}_MEAN"), imported("image_utils", f"{kind}_STD")


def load_clip(source: str, dtype: torch.dtype) -> Loaded:
    """A whole CLIP model from safetensors files."""
    return _loaded(public("CLIPModel"), source, dtype=dtype)


def has_flash_attention() -> bool:
    """Whether the package flash-attn is installed and usable."""
    return bool(imported("utils", "is_flash_attn_2_available")())


def has_linear_attention_kernels() -> bool:
    """Whether the package flash-linear-attention is installed and usable, in place of transformers' reference code."""
    return bool(imported("utils.import_utils", "is_flash_linear_attention_available")())


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a vision-language model


def attention_kernel(model: Any) -> str:
    return str(part(model, "config._attn_implementation"))


def encoder_attention_kernel(model: Any) -> str:
    return str(part(model, "config.vision_config._attn_implementation"))


def attention_kernels(language: str, encoder: str) -> str | Mapping[str, str]:
    """The attention kernels of the language model and the vision encoder, for `empty_model` and `load_weights`."""
    return language if language == encoder else {"": language, "vision_config": encoder}


def language_model(model: Any) -> Any:
    return part(model, "model.language_model")


def decoder_layers(language: Any) -> Any:
    """The decoder layers of a language model, a list of modules."""
    return part(language, "layers")


def input_embedding(model: Any) -> Any:
    """The embedding of tokens at the entrance of the language model."""
    return part(model, "get_input_embeddings")()


def output_embedding(model: Any) -> Any:
    """The layer that gives the logits."""
    return part(model, "get_output_embeddings")()


def end_tokens(model: Any) -> Any:
    """The id of the token that ends an answer, several of them, or None."""
    return part(model, "generation_config.eos_token_id")


def head_width(text_config: Any) -> int:
    """Values per attention head. Configurations name it only where it is not the usual share of the hidden size."""
    named = getattr(text_config, "head_dim", None)
    return int(named or part(text_config, "hidden_size") // part(text_config, "num_attention_heads"))


def rotary_sections(text_config: Any) -> Any:
    """How many of the rotary frequencies stand for time, rows and columns in a Qwen model."""
    return part(text_config, "rope_parameters").get("mrope_section")


def rotary_width(text_config: Any) -> int:
    """Values of an attention head that the rotary embedding turns: all of them, or the first ones."""
    return int(head_width(text_config) * part(text_config, "rope_parameters").get("partial_rotary_factor", 1))


LINEAR = "linear_attention"


def layer_types(text_config: Any) -> list[str]:
    """How each decoder layer mixes tokens: full_attention, sliding_attention or linear_attention."""
    named = getattr(text_config, "layer_types", None)
    if named:
        return list(named)
    kind = "sliding_attention" if getattr(text_config, "sliding_window", None) else "full_attention"
    return [kind] * part(text_config, "num_hidden_layers")


def takes_step_mask(model: Any) -> bool:
    """Whether every decoder layer can be given the mask of a single token as [batch, 1, 1, keys], True where visible.

    transformers passes such a mask on as it is. It reads one of [batch, keys] at each step.
    """
    text_config = part(model, "config.text_config")
    fused = part(text_config, "_attn_implementation") == "sdpa"
    return fused and set(layer_types(text_config)) == {"full_attention"}


def layer_group(text_config: Any) -> int:
    """Decoder layers after which the kinds of `layer_types` repeat: 1 where all are of one kind."""
    kinds = layer_types(text_config)
    return next(size for size in range(1, len(kinds) + 1) if kinds[size:] == kinds[:-size])


def expert_share(config: Any) -> float:
    """The share of the experts of a layer that one token is sent to: 1 without a mixture of experts."""
    experts = getattr(config.text_config, "num_experts", None)
    return config.text_config.num_experts_per_tok / experts if experts else 1.0


def is_of_experts(name: str) -> bool:
    """Whether a parameter of this name holds weights of the experts of a layer, not of what chooses between them."""
    return ".experts." in name


def keep_layer_types(text_config: Any, layers: int) -> None:
    """Shorten the list of layer types, which only some architectures have, to the first `layers`."""
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]


def vision_tower(model: Any) -> Any:
    """The encoder of a LLaVA or InternVL model."""
    return part(model, "model.vision_tower")


def vision_blocks(model: Any) -> Any:
    """The blocks of a Qwen model's vision encoder."""
    return part(model, "model.visual.blocks")


class _ReachedError(Exception):
    """Ends a forward pass whose rest is not needed."""


def _output_of(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a block returns when `run` calls it; nothing behind it is computed."""
    found: list[Tensor] = []

    def remember(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    handle = block.register_forward_hook(remember)
    try:
        run()
    except _ReachedError:
        return found[0]
    finally:
        handle.remove()
    raise changed(f"call of {type(block).__name__}")


def first_block_of_clip(model: Any, pixels: Tensor) -> Tensor:
    """The output of the first block of a LLaVA model's encoder: [images, 1 + patches, dim]."""
    return _output_of(part(vision_tower(model), "encoder.layers")[0], lambda: vision_tower(model)(pixels))


def first_block_of_internvl(model: Any, pixels: Tensor) -> Tensor:
    """The output of the first block of an InternVL model's encoder: [images, 1 + patches, dim]."""
    return _output_of(part(vision_tower(model), "encoder.layer")[0], lambda: vision_tower(model)(pixels))


def first_block_of_qwen(model: Any, pixels: Tensor, sizes: Tensor) -> Tensor:
    """The output of the first block of a Qwen model's encoder: [patches, dim]. sizes: as in `encode_qwen`."""
    features = part(model, "model.get_image_features")
    return _output_of(vision_blocks(model)[0], lambda: features(pixels, sizes))


def project(model: Any, features: Tensor) -> Tensor:
    """The projector of a LLaVA or InternVL model: [..., vision dim] to [..., dim]."""
    return part(model, "model.multi_modal_projector")(features)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass and its cache


def forward(model: Any, inputs: Mapping[str, Any], cache: Any = None) -> tuple[Tensor, Any]:
    """One forward pass of the whole model: logits of the last position, [batch, vocabulary], and the KV cache.

    inputs: arguments of the forward. cache: what was read before; None starts a new one.
    """
    known = {} if cache is None else cache_argument(model, cache)
    _reads.kinds = set()
    out = call(model, **inputs, **known, use_cache=True, logits_to_keep=1)
    for kind in inputs.get("mm_encoder_outputs", ()):
        if kind not in _reads.kinds:
            raise changed(f"key {kind!r} in the 'mm_encoder_outputs' of {type(model).__name__}")
    return _output(out, "logits")[:, -1], cache_of(out)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The KV cache as an argument of the model's forward."""
    return {_cache_name(_parameters(type(model).forward)): cache}


def cache_of(output: Any) -> Any:
    """The KV cache that a forward pass has filled."""
    return output[_cache_name(output.keys())]


def _cache_name(names: Any) -> str:
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise changed("argument or output " + " or ".join(repr(name) for name in CACHE_NAMES) + " for the KV cache")


def encoded_images(
    rows: Sequence[Tensor],
    videos: Sequence[bool] = (),
    *,
    deepstack: Sequence[Sequence[Tensor]] | None = None,
    stacked: bool = False,
    stacked_videos: bool = False,
) -> dict[str, Any]:
    """Arguments of a forward pass whose images are encoded already.

    rows: [kept, dim] of each image. videos: which of them are videos, if any. stacked, stacked_videos: the architecture
    takes one tensor of all images, or of all videos, not a list. deepstack: for each of the first decoder layers,
    [kept, dim] of each image. Made for each call, since beam search changes them in place.
    """

    def output(chosen: Sequence[int], stacked: bool) -> Any:
        mine = [rows[i] for i in chosen]
        if deepstack is None:
            images = torch.cat(mine)[None] if stacked else mine
            return imported("modeling_outputs", "BaseModelOutputWithPooling")(pooler_output=images)
        kind = imported("models.qwen3_vl.modeling_qwen3_vl", "BaseModelOutputWithDeepstackFeatures")
        return kind(pooler_output=mine, deepstack_features=[[layer[i] for i in chosen] for layer in deepstack])

    films = [i for i, is_video in enumerate(videos) if is_video]
    images = [i for i in range(len(rows)) if i not in films]
    found = {"image": output(images, stacked)} if images or not films else {}
    return {"mm_encoder_outputs": _Encoded(found | ({"video": output(films, stacked_videos)} if films else {}))}


_reads = threading.local()  # kinds: the encoder outputs that this thread's forward pass has read


def _note_read(kind: str) -> None:
    if hasattr(_reads, "kinds"):
        _reads.kinds.add(kind)


class _Encoded(dict[str, Any]):
    """Outputs of encoders by modality. A forward pass that looked for another key would ignore the images."""

    def get(self, key: str, default: Any = None) -> Any:
        _note_read(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        _note_read(key)
        return super().__getitem__(key)


def is_plain_cache(cache: Any) -> bool:
    """Whether every layer of the cache grows with what it is given, or keeps a state, whatever the others hold."""
    kinds = [imported("cache_utils", name) for name in ("DynamicCache", "DynamicLayer", "LinearAttentionLayer")]
    return type(cache) is kinds[0] and all(type(each) in kinds[1:] for each in part(cache, "layers"))


def cached_tokens(cache: Any) -> int:
    """Tokens that the first layer of the cache that keeps any holds."""
    return int(part(cache, "get_seq_length")())


def cached_keys(cache: Any, layer: int) -> Tensor:
    """The keys of a decoder layer, after the rotary embedding: [batch, KV heads, tokens, head dim]."""
    keys: Tensor = part(part(cache, "layers")[layer], "keys")
    return keys


def cached_bytes(cache: Any) -> list[int]:
    """Bytes of the keys and values of each decoder layer that has any; of linear attention, those of its states."""
    linear = imported("cache_utils", "LinearAttentionCacheLayerMixin")
    sizes = []
    for layer in part(cache, "layers"):
        if isinstance(layer, linear):
            tensors = [*part(layer, "conv_states").values(), *part(layer, "recurrent_states").values()]
        else:
            tensors = [part(layer, "keys"), part(layer, "values")]
        if tensors[0] is not None:
            sizes.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Decoder layers


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with, as its forward pre-hook sees it.

    hidden: [batch, tokens, dim]. mask: the attention mask in the kernel's form. position_ids: [batch or 1, tokens].
    rotary: cosine and sine, [batch or 1, tokens, head dim] each.
    """

    hidden: Tensor
    mask: Tensor | None
    position_ids: Tensor | None
    rotary: Rotary
    cache: Any

    @staticmethod
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
        """Raises MMTokError where an argument is missing; those that may be None must be there too."""
        missing = [name for name in ("attention_mask", "position_ids", "position_embeddings") if name not in kwargs]
        if missing:
            raise changed(f"argument {missing[0]!r} in the calls of decoder layers")
        return LayerCall(
            hidden=hidden_of(args, kwargs),
            mask=kwargs["attention_mask"],
            position_ids=kwargs["position_ids"],
            rotary=kwargs["position_embeddings"],
            cache=kwargs[_cache_name(kwargs)],
        )


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def layer_arguments(mask: Tensor | None, position_ids: Tensor | None, rotary: Rotary) -> dict[str, Any]:
    """Arguments of a decoder layer by their names; see LayerCall."""
    return {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": rotary}


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a module is called with."""
    if args:
        return args[0]
    if "hidden_states" not in kwargs:
        raise changed("argument 'hidden_states' in the calls of layers")
    return kwargs["hidden_states"]


def first_norm(layer: Any) -> Any:
    """The norm before a decoder layer's attention."""
    return part(layer, "input_layernorm")


def final_norm(language: Any) -> Any:
    """The norm after a language model's last layer."""
    return part(language, "norm")


def normed(language: Any, rows: Tensor) -> Tensor:
    """Rows [..., dim] through the norm after a language model's last layer, past any hooks on it."""
    return final_norm(language).forward(rows).to(rows.device)


def mixes_by_attention(layer: Any) -> bool:
    """Whether a decoder layer has attention over all tokens; if not, it has linear attention, which keeps no rows."""
    if hasattr(layer, "linear_attn"):
        return False
    part(layer, "self_attn")
    return True


def linear_mask(live: Tensor | None) -> Tensor | None:
    """The mask of a layer of linear attention, [batch, tokens]. live: which tokens are no padding; None is all."""
    return None if live is None else live.long()


def rotary_embedding(language: Any, hidden: Tensor, position_ids: Tensor, device: torch.device) -> Rotary:
    """Cosine and sine, [batch, tokens, head dim] each, of positions, on a device. hidden says the data type."""
    cos, sin = part(language, "rotary_emb")(hidden, position_ids)
    return cos.to(device), sin.to(device)


def device_of(module: nn.Module) -> torch.device:
    """Where a decoder layer or norm has its weights."""
    return next(module.parameters()).device


def queries(layer: Any, hidden: Tensor, rotary: Rotary) -> Tensor:
    """A decoder layer's queries after the rotary embedding: [heads, tokens, head dim]. hidden: [tokens, dim]."""
    return _projected(layer, hidden, rotary, "q_proj", "q_norm")


def keys(layer: Any, hidden: Tensor, rotary: Rotary) -> Tensor:
    """A decoder layer's keys after the rotary embedding: [KV heads, tokens, head dim]. hidden: [tokens, dim]."""
    return _projected(layer, hidden, rotary, "k_proj", "k_norm")


def attention_width(layer: Any) -> int:
    """Values per attention head of a decoder layer."""
    return int(part(layer, "self_attn.head_dim"))


def attention_scale(layer: Any) -> float:
    return float(part(layer, "self_attn.scaling"))


def rotate(layer: Any, rows: Tensor, rotary: Rotary) -> Tensor:
    """The architecture's own rotary embedding. rows: [heads, tokens, head dim]; cosine and sine: [tokens, head dim]."""
    apply = _sibling(part(layer, "self_attn"), "apply_rotary_pos_emb")
    rotated: Tensor = apply(rows[None], rows[None], rotary[0][None], rotary[1][None])[0][0]
    return rotated


def _projected(layer: Any, hidden: Tensor, rotary: Rotary, projection: str, norm: str) -> Tensor:
    attention = part(layer, "self_attn")
    has_norms = _members(attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
    width = part(attention, "head_dim")
    projected = part(attention, projection)(first_norm(layer)(hidden))
    if projection == "q_proj":  # the values that scale the output of a head stand behind its query
        heads = part(attention, "o_proj.in_features") // width
        split = projected.unflatten(-1, (heads, -1))
        if split.shape[-1] not in (width, 2 * width):
            raise changed(f"{projection} of {type(attention).__name__} with {width} values per head")
        split = split[..., :width]
    else:
        split = projected.unflatten(-1, (-1, width))
    if has_norms:
        split = part(attention, norm)(split)
    return rotate(layer, split.transpose(0, 1), rotary)


def _members(attention: nn.Module, projections: set[str], norms: Set[str] = frozenset()) -> bool:
    """Whether an attention module has the norms beside the projections, as some architectures do.

    Raises MMTokError for modules and parameters other than these: they would take part in the attention without being
    known here.
    """
    members = {name for name, _ in [*attention.named_children(), *attention.named_parameters(recurse=False)]}
    if members not in (projections, projections | norms):
        raise MMTokError(
            f"the attention of {type(attention).__name__} is not supported: it differs in "
            f"{', '.join(sorted(members ^ projections))}",
            or_tested(
                "use a method that does not read attention, or a model whose language model is a Llama, Mistral or Qwen"
            ),
        )
    return members != projections


def _sibling(module: nn.Module, name: str) -> Any:
    """A function of the file that a module is defined in."""
    return part(sys.modules[type(module).__module__], name)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP encoders


def clip_hidden_states(model: Any, pixels: Tensor, layers: Sequence[int], *, interpolate: bool) -> list[Tensor]:
    """Hidden states [images, 1 + patches, dim] of a LLaVA model's encoder, those of `layers`, which the model reads.

    interpolate: fit the position embedding to images of another size.
    """
    out = call(
        vision_tower(model), pixels, output_hidden_states=True, interpolate_pos_encoding=interpolate, return_dict=True
    )
    states = _output(out, "hidden_states")
    # Recent releases leave out the layers that the model does not read.
    if any(states[layer] is None for layer in layers):
        raise changed("hidden state of the layer that the vision features come from")
    return [states[layer] for layer in layers]


def clip_attention(model: Any, index: int) -> Any:
    """The attention module of an encoder layer."""
    return part(part(vision_tower(model), "encoder.layers")[index], "self_attn")


def clip_queries(attention: Any, hidden: Tensor) -> Tensor:
    """[images, heads, tokens, head dim]. hidden: [images, tokens, dim], what the module is called with."""
    return _clip_heads(attention, part(attention, "q_proj")(hidden))


def clip_keys(attention: Any, hidden: Tensor) -> Tensor:
    """[images, heads, tokens, head dim]. hidden: [images, tokens, dim], what the module is called with."""
    return _clip_heads(attention, part(attention, "k_proj")(hidden))


def clip_attention_scale(attention: Any) -> float:
    return float(part(attention, "scale"))


def _clip_heads(attention: Any, projected: Tensor) -> Tensor:
    _members(attention, {"q_proj", "k_proj", "v_proj", "out_proj"})
    shape = part(attention, "num_heads"), part(attention, "head_dim")
    return projected.unflatten(-1, shape).transpose(1, 2)


def clip_text_parts(clip: Any) -> tuple[Any, Any, Any, Any]:
    """The text model, its projection, the norm after the encoder and the encoder's projection of a CLIP model."""
    names = ("text_model", "text_projection", "vision_model.post_layernorm", "visual_projection")
    text_model, text_projection, post_layernorm, visual_projection = (part(clip, name) for name in names)
    return text_model, text_projection, post_layernorm, visual_projection


def pooled(text_model: Any, ids: Tensor) -> Tensor:
    """CLIP's summary of a text, [batch, dim]. ids: [batch, length]."""
    summary: Tensor = _output(text_model(ids), "pooler_output")
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP encoders, whose modules are named as those of CLIP, and Gemma 3


def siglip_depth(model: Any) -> int:
    """Layers of the encoder."""
    return len(part(vision_tower(model), "encoder.layers"))


def siglip_features(model: Any, pixels: Tensor, *, interpolate: bool) -> Tensor:
    """What the encoder makes of images, after its last norm: [images, patches, dim].

    interpolate: fit the position embedding to images of another size.
    """
    out = call(vision_tower(model), pixels, interpolate_pos_encoding=interpolate, return_dict=True)
    features: Tensor = _output(out, "last_hidden_state")
    return features


def project_gemma(model: Any, features: Tensor) -> Tensor:
    """What Gemma's projector does behind its pooling: [..., vision dim] to [..., dim]."""
    projector = part(model, "model.multi_modal_projector")
    weight = part(projector, "mm_input_projection_weight")
    return part(projector, "mm_soft_emb_norm")(features.to(weight.dtype)) @ weight


def bidirectional(of_images: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass in which the tokens of an image attend to each other in both directions.

    of_images: [batch, length], True for tokens of images. Those of different images must not be adjacent.
    """
    return {"token_type_ids": of_images.long()}


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-NeXT


def crop_grid(height: int, width: int, pinpoints: Sequence[Sequence[int]], side: int) -> tuple[int, int]:
    """(rows, columns) of the crops of `side` pixels that an image is cut into."""
    grid = imported("models.llava_next.modeling_llava_next", "get_anyres_image_grid_shape")
    rows, columns = grid((height, width), pinpoints, side)
    return rows, columns


def pack_crops(model: Any, features: Tensor, height: int, width: int, newline: Tensor | None = None) -> Tensor:
    """The rows of an image's crops as the model packs them: [total, dim].

    features: [crops, tokens of a crop, dim]. newline: [dim], ends each line; the model's own unless given.
    """
    inner = part(model, "model")
    packed, _ = call(
        part(inner, "pack_image_features"),
        [features],
        [(height, width)],
        vision_feature_select_strategy="default",
        image_newline=part(inner, "image_newline") if newline is None else newline,
    )
    rows: Tensor = packed[0]
    return rows


UNBOUNDED = "anyres_max_1000000"  # crops' worth of tokens


def pack_onevision(
    model: Any, features: Tensor, height: int, width: int, newline: Tensor | None = None, *, whole: bool = False
) -> Tensor:
    """The same for LLaVA-OneVision, which scales many crops down. whole: it does not."""
    inner = part(model, "model")
    packed, _ = call(
        part(inner, "pack_image_features"),
        [features],
        [(height, width)],
        image_newline=part(inner, "image_newline") if newline is None else newline,
        vision_aspect_ratio=UNBOUNDED if whole else part(inner, "config.vision_aspect_ratio"),
    )
    rows: Tensor = packed[0]
    return rows


def pool_frames(model: Any, features: Tensor) -> Tensor:
    """LLaVA-OneVision's rows of a video's frames, made fewer: [frames, patches, dim] to [frames, tokens, dim]."""
    rows: Tensor = call(part(model, "model.apply_pooling"), features)
    return rows


def newline(model: Any) -> Tensor:
    """The row that ends a line of an image, or a whole video: [dim]."""
    row: Tensor = part(model, "model.image_newline")
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Qwen-VL


@dataclass(frozen=True)
class QwenEncoded:
    """What Qwen's vision encoder makes of several images.

    patches: [patches of all images, dim], after the last block, in the order of the encoder's windows.
    tokens: [tokens, dim] of each image, in raster order. deepstack: for each of the first decoder layers, the same.
    """

    patches: Tensor
    tokens: Sequence[Tensor]
    deepstack: Sequence[Sequence[Tensor]]


def encode_qwen(model: Any, pixels: Tensor, sizes: Tensor, *, deepstack: bool) -> QwenEncoded:
    """sizes: [images, 3], the time, rows and columns of each image in patches."""
    out = call(part(model, "model.get_image_features"), pixels, sizes, return_dict=True)
    layers = _output(out, "deepstack_features") if deepstack else ()
    return QwenEncoded(_output(out, "last_hidden_state"), _output(out, "pooler_output"), layers)


def qwen_positions(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    placeholders: Sequence[int],
    sizes: Tensor,
    videos: Sequence[bool],
    seconds: Sequence[float] | None,
) -> Tensor:
    """Positions of a prompt in time, row and column: [3, batch, length].

    placeholders: ids of the tokens that stand for images and for videos. sizes: as in `encode_qwen`. videos: which of
    them are videos. seconds: from one slice of each video to the next, where the model asks for them.
    """
    kinds = torch.zeros_like(input_ids, dtype=torch.int)
    for kind, token in enumerate(placeholders, start=1):
        kinds[input_ids == token] = kind
    of_video = torch.tensor(videos, dtype=torch.bool, device=sizes.device)
    options = {} if seconds is None else {"second_per_grid_ts": torch.tensor(seconds, device=sizes.device)}
    positions, _ = call(
        part(model, "model.get_rope_index"),
        input_ids,
        mm_token_type_ids=kinds,
        image_grid_thw=sizes[~of_video],
        video_grid_thw=sizes[of_video],
        attention_mask=attention_mask,
        **options,
    )
    found: Tensor = positions
    return found


def qwen_window_order(config: Any, sizes: Tensor) -> Tensor:
    """The raster number of each vision token in the order of the encoder's windows. config: of the encoder."""
    index, _ = call(
        imported("vision_utils", "get_vision_window_index"),
        sizes,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
    )
    return torch.as_tensor(index)


def qwen_size(height: int, width: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """(height, width) to which the image processor scales an image: multiples of `factor` with between `fewest` and
    `most` pixels. Raises ValueError for an image that is too thin."""
    resize = imported("models.qwen2_vl.image_processing_pil_qwen2_vl", "smart_resize")
    scaled = call(resize, height, width, factor, min_pixels=fewest, max_pixels=most)
    return scaled[0], scaled[1]


def vision_attention(block: Any) -> Any:
    """The attention module of a block of Qwen's vision encoder."""
    return part(block, "attn")


def vision_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Rotary]:
    """The hidden states and the rotary embedding that such an attention module is called with."""
    if "position_embeddings" not in kwargs:
        raise changed("argument 'position_embeddings' in the calls of vision attention")
    return hidden_of(args, kwargs), kwargs["position_embeddings"]


def vision_queries_and_keys(attention: Any, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """[heads, patches, head dim] each, after the rotary embedding. hidden: [patches, dim]."""
    _members(attention, {"qkv", "proj"})
    split = part(attention, "qkv")(hidden).unflatten(-1, (3, part(attention, "num_heads"), -1))
    found_queries, found_keys, _ = split.unbind(1)
    apply = _sibling(attention, "apply_rotary_pos_emb_vision")
    found_queries, found_keys = apply(found_queries, found_keys, *rotary)
    return found_queries.transpose(0, 1), found_keys.transpose(0, 1)


def vision_attention_scale(attention: Any) -> float:
    return float(part(attention, "scaling"))


# ---------------------------------------------------------------------------------------------------------------------
# InternVL


def tile_grid(height: int, width: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(rows, columns) of the tiles of `side` pixels that an image is cut into, between `fewest` and `most` of them."""
    canvas = imported("models.got_ocr2.image_processing_pil_got_ocr2", "get_optimal_tiled_canvas")
    columns, rows = canvas((height, width), (side, side), fewest, most)
    return rows, columns


def encode_internvl(model: Any, pixels: Tensor, patches: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Features [tiles, tokens, vision dim] and projected tokens [tiles, tokens, dim]. patches: (rows, columns)."""
    hidden = _output(call(vision_tower(model), pixels, return_dict=True), "last_hidden_state")[:, 1:]
    inner = part(model, "model")
    ratio = part(inner, "config.downsample_ratio")
    shuffled = call(part(inner, "pixel_shuffle"), hidden.unflatten(1, patches), scale_factor=ratio)
    features = shuffled.flatten(1, 2)
    return features, project(model, features)


def internvl_attention(model: Any, index: int) -> Any:
    """The attention module of an encoder layer."""
    return part(part(vision_tower(model), "encoder.layer")[index], "attention")


def internvl_queries_and_keys(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, float]:
    """[tiles, heads, 1 + patches, head dim] each, and the scale. hidden: [tiles, 1 + patches, dim], its input."""
    projections = {"q_proj", "k_proj", "v_proj", "projection_layer", "projection_dropout"}
    _members(attention, projections | {"q_norm", "k_norm"})
    shape = part(attention, "num_heads"), part(attention, "head_dim")
    found = [
        part(attention, norm)(part(attention, projection)(hidden)).unflatten(-1, shape).transpose(1, 2)
        for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm"))
    ]
    return found[0], found[1], float(part(attention, "scale"))
