"""Loading a model by name, hub id or directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MMTokError
from mmtok_cli.models.devices import choose_device, choose_dtype, narrower, require_attention, require_compiler
from mmtok_cli.models.families import family_class, require_family
from mmtok_cli.models.sources import (
    architecture,
    guiding_profile,
    missing_weights,
    profile_of,
    shortened,
    source_of,
    weights_dtype,
)
from mmtok_cli.rules import NATIVE, fixed_tokens

if TYPE_CHECKING:
    import torch

    from mmtok_cli.models.base import VisionLanguageModel

__all__ = ["guiding_profile", "load_model", "outline", "profile_of"]

WEIGHTS = ("pretrained", "random")
DEVICE_MAPS = ("auto",)
VISION_TOKENS = 576  # per image, for the memory estimate of models without a profile


def load_model(
    name: str = "demo",
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "pretrained",
    layers: int | None = None,
    attention: str = "sdpa",
    encoder_attention: str | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
    compiled: bool = False,
    vision_tokens: Sequence[int] = (),
    pixels: str = NATIVE,
) -> VisionLanguageModel:
    """Load a model with its processor, ready for inference.

    name: one of `mmtok models`, a hub id, or a directory in the hub's format.
    device: `auto` takes a GPU where there is one. dtype: `auto` takes float32 on a CPU, otherwise what the weights
    are stored in. weights: `random` builds the model's architecture without its weights; its answers are
    meaningless, but time and memory are as with trained weights. layers: load only the first so many decoder layers, to
    time a part of a model that does not fit. attention: sdpa, eager or flash_attention_2. encoder_attention: that of
    the vision encoder, if it is to be another. device_map: `auto` spreads
    the model over all GPUs. quantization: int8, int4, bnb-8bit or bnb-4bit (see models/quantization.py). compiled:
    compile the language model with torch.compile, which takes minutes in the first runs. vision_tokens: of each prompt
    of a batch, for the estimate of memory; by default those of one image of usual size. pixels: the resolution of
    images, native or fixed:2048, at which every image has about 2048 vision tokens.

    Raises MMTokError for a name, device, data type or kernel that does not exist here, a model family that is not
    supported, a resolution that it does not have, a model that does not fit, and weights that are missing or damaged.
    """
    import torch

    from mmtok_cli.models import hf
    from mmtok_cli.models.foreign_errors import COMPARE, errors_as
    from mmtok_cli.models.pretrained import load_pretrained
    from mmtok_cli.models.quantization import quantize, require_quantization
    from mmtok_cli.models.room import free_on_gpus, laid_out, needs_of, needs_quantized, refusal
    from mmtok_cli.models.trial import try_processor

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    require_attention(attention, where, kind)
    if encoder_attention is not None:
        require_attention(encoder_attention, where, kind, "--encoder-attention")
    of_encoder = encoder_attention or attention
    kernels = hf.attention_kernels(attention, of_encoder)
    for what, given, known in (("weights", weights, WEIGHTS), ("device map", device_map, (None, *DEVICE_MAPS))):
        if given not in known:
            raise MMTokError(f"there is no {what} {given!r}", f"choose one of {', '.join(filter(None, known))}")
    if device_map:
        if layers is not None:
            raise MMTokError("--device-map runs whole models only", "leave out --device-map or --layers")
        _require_gpus(where)
    if quantization is not None:
        require_quantization(quantization, where, weights, device_map)
    if compiled:
        require_compiler(where, device_map)

    source, profile = source_of(name), profile_of(name)
    config = _checked_architecture(name, source, weights)
    missing = missing_weights(name, source) if weights == "pretrained" else None
    family, depth = family_class(config.model_type), config.text_config.num_hidden_layers
    family.require_resolution(name, fixed_tokens(pixels))
    if layers is not None:
        config = shortened(config, layers, name)
    stored = kind or (torch.bfloat16 if weights == "random" or missing else weights_dtype(name, source, config))
    with errors_as(f"no model can be built as config.json of {name} says", hf.or_tested(COMPARE)):
        layout = laid_out(config, stored, kernels)
        tokens = vision_tokens or (profile.vision_tokens if profile else VISION_TOKENS,)
        needs = {each: needs_of(layout, each, tokens, attention, of_encoder) for each in narrower(stored)}
        if quantization is not None and weights == "pretrained":  # random weights are quantized when all are drawn
            needs = {each: needs_quantized(need, layout, each, quantization) for each, need in needs.items()}
    gpus = free_on_gpus() if device_map else None
    if refused := refusal(name, needs, missing, where, gpus):
        raise refused
    places = _places(name, layout, gpus) if gpus is not None else None
    if weights == "random":
        processor = _processor_without_download(name, source, family, config)
        model = _random(layout, where, places)
        if quantization is not None:
            quantize(model, quantization)
    else:
        processor = _processor(name, source, family)
        model = load_pretrained(
            name,
            source,
            layers,
            dtype=kind,
            device=where,
            attention=kernels,
            places=places,
            quantization=quantization,
        )
    with errors_as(f"{name} cannot be used", hf.or_tested(COMPARE)):
        built = family(name, model.eval(), processor, **_text_tower(name))
    built.weights, built.depth, built.quantization, built.compiled = weights, depth, quantization, compiled
    built.fixed_tokens = fixed_tokens(pixels)
    try_processor(built, own_template=not (profile and profile.location.startswith("package:")))
    if compiled:
        hf.compile_language_model(model)
    return built


def outline(
    name: str, *, device: str, attention: str, own_processor: bool = False, pixels: str = NATIVE
) -> VisionLanguageModel:
    """A model that says how it would cut up images, without memory for its weights and without any download.

    own_processor: the model's processor is downloaded if need be, in place of a stand-in. pixels: as for `load_model`.
    Raises MMTokError for what `load_model` refuses, apart from the memory and the weights.
    """
    from mmtok_cli.models import hf
    from mmtok_cli.models.foreign_errors import COMPARE, errors_as
    from mmtok_cli.models.room import laid_out

    require_attention(attention, choose_device(device), None)
    source = source_of(name)
    config = _checked_architecture(name, source, "random")
    with errors_as(f"no model can be built as config.json of {name} says", hf.or_tested(COMPARE)):
        layout = laid_out(config, None, attention)
    family = family_class(config.model_type)
    family.require_resolution(name, fixed_tokens(pixels))
    if own_processor:
        processor = _processor(name, source, family)
    else:
        processor = _processor_without_download(name, source, family, config)
    with errors_as(f"{name} cannot be used", hf.or_tested(COMPARE)):
        built = family(name, layout.eval(), processor)
    built.fixed_tokens = fixed_tokens(pixels)
    return built


def _checked_architecture(name: str, source: str, weights: str) -> Any:
    """The configuration of a supported model whose files, if they are in a directory, are not damaged."""
    from mmtok_cli.models.checkpoint import check_directory, check_stored_weights

    config = architecture(name, source)
    require_family(config.model_type, name)
    if Path(source).is_dir():
        check_directory(Path(source), name)
        if weights == "pretrained" and missing_weights(name, source) is None:
            check_stored_weights(Path(source), name)
    return config


def _require_gpus(device: torch.device) -> None:
    from importlib.util import find_spec

    if device.type != "cuda":
        raise MMTokError(f"--device-map spreads a model over GPUs, but the device is {device}", "leave it out")
    if find_spec("accelerate") is None:
        raise MMTokError("--device-map needs the package accelerate", "pip install accelerate")


def _places(name: str, layout: Any, gpus: Mapping[int, int]) -> dict[str, int | str]:
    """The GPU of each part of a laid-out model. gpus: free bytes of each. Raises MMTokError where not all of it fits.

    accelerate would put the rest into host memory or on disk, and copy it to a GPU in every forward pass.
    """
    from accelerate import infer_auto_device_map

    from mmtok_cli.models import hf

    # A sixth of each GPU is left for activations and the KV cache.
    room = {gpu: free * 5 // 6 for gpu, free in gpus.items()}
    places = infer_auto_device_map(layout, max_memory=room, no_split_module_classes=hf.unsplittable_modules(layout))
    outside = [part for part, place in places.items() if place in ("cpu", "disk")]
    if outside:
        raise MMTokError(
            f"{name} does not fit on {len(gpus)} GPU{'s' * (len(gpus) > 1)} with room for activations: {outside[0]}"
            + (f" and {len(outside) - 1} more parts" if len(outside) > 1 else "")
            + " would be left in host memory or on disk",
            "use --dtype bfloat16, fewer --layers, a smaller model, or more GPUs",
        )
    return places


def _random(layout: Any, device: torch.device, places: Mapping[str, int | str] | None) -> Any:
    """A laid-out model with random weights; places: the GPU of each part, where it is spread over several."""
    from mmtok_cli.models.random_weights import fill_randomly

    if places is None:
        return fill_randomly(layout, device)
    from accelerate import dispatch_model

    return dispatch_model(fill_randomly(layout, device, places), dict(places))


def _processor(name: str, source: str, family: Any, *, local_files_only: bool = False) -> Any:
    """The model's own processor. Raises MMTokError for one that is missing, damaged or without a chat template."""
    from mmtok_cli.models import hf
    from mmtok_cli.models.foreign_errors import COMPARE, errors_as

    with errors_as(f"the processor of {name} cannot be loaded", hf.or_tested(COMPARE)):
        processor = family.load_processor(source, local_files_only=local_files_only)
    if not getattr(processor, "chat_template", None):
        raise MMTokError(f"{name} has no chat template", "download chat_template.jinja or chat_template.json as well")
    return processor


def _processor_without_download(name: str, source: str, family: Any, config: Any) -> Any:
    """The model's own processor if it is in the local cache, otherwise the family's stand-in."""
    profile = profile_of(name)
    try:
        return _processor(name, source, family, local_files_only=True)
    except MMTokError:
        if profile is None or profile.chat_template is None:
            raise
        return family.stand_in_processor(config, profile.chat_template)


def _text_tower(name: str) -> dict[str, Any]:
    """The constructor's argument for a model whose profile names a text tower; nothing is loaded yet."""
    from mmtok_cli.models.clip_text import ClipText

    profile = profile_of(name)
    if profile is None or profile.text_tower is None:
        return {}
    return {"text_tower": partial(ClipText.load, profile.text_tower)}
