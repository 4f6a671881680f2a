"""Loading a model by name, hub id or directory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.models.devices import choose_device, choose_dtype, require_attention
from mmtok_cli.models.sources import architecture, configuration, guiding_profile, profile_of, shortened, source_of

if TYPE_CHECKING:
    import torch

    from mmtok_cli.models.base import VisionLanguageModel

__all__ = ["FAMILIES", "guiding_profile", "load_model", "profile_of"]

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
    device_map: str | None = None,
) -> VisionLanguageModel:
    """Load a model with its processor, ready for inference.

    name: one of `mmtok models`, a hub id, or a directory in the hub's format.
    device: `auto` takes a GPU where there is one. dtype: `auto` takes float32 on a CPU, otherwise what the weights
    are stored in. weights: `random` builds the model's architecture without its weights; its answers are
    meaningless, but time and memory are as with trained weights. layers: load only the first so many decoder layers, to
    time a part of a model that does not fit. attention: sdpa, eager or flash_attention_2. device_map: `auto` spreads
    the model over all GPUs.

    Raises MMTokError for a name, device, data type or kernel that does not exist here, a model family that is not
    supported, a model that does not fit, and weights that are missing or damaged.
    """
    import torch

    from mmtok_cli.models.room import free_on_gpus, laid_out, needs_of, require_room

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    require_attention(attention, where, kind)
    for what, given, known in (("weights", weights, WEIGHTS), ("device map", device_map, (None, *DEVICE_MAPS))):
        if given not in known:
            raise MMTokError(f"there is no {what} {given!r}", f"choose one of {', '.join(filter(None, known))}")
    if device_map:
        _require_gpus(where)

    source, profile = source_of(name, weights=weights == "pretrained"), profile_of(name)
    config = architecture(name, source)
    if config.model_type not in FAMILIES:
        raise MMTokError(
            f"{name} is a {config.model_type!r} model, which is not supported",
            f"supported families: {', '.join(FAMILIES)}",
        )
    family, depth = FAMILIES[config.model_type](), config.text_config.num_hidden_layers
    if layers is not None:
        config = shortened(config, layers, name)
    stored = kind or (torch.bfloat16 if weights == "random" else torch.float16)
    layout = laid_out(config, stored, attention)
    gpus = free_on_gpus() if device_map else None
    vision_tokens = profile.vision_tokens if profile else VISION_TOKENS
    require_room(name, needs_of(layout, stored, vision_tokens, attention), stored, where, gpus)
    if weights == "random":
        processor = _processor_without_download(name, source, family, config)
        model = _random(layout, where, gpus)
    else:
        model, processor = _pretrained(name, source, family, kind, where, attention, layers, device_map)
    built = family(name, model.eval(), processor, **_text_tower(name))
    built.weights, built.depth = weights, depth
    return built


def _require_gpus(device: torch.device) -> None:
    from importlib.util import find_spec

    if device.type != "cuda":
        raise MMTokError(f"--device-map spreads a model over GPUs, but the device is {device}", "leave it out")
    if find_spec("accelerate") is None:
        raise MMTokError("--device-map needs the package accelerate", "pip install accelerate")


def _random(layout: Any, device: torch.device, gpus: Mapping[int, int] | None) -> Any:
    """A laid-out model with random weights; gpus: free bytes of those that it is to be spread over."""
    from mmtok_cli.models.random_weights import fill_randomly

    if gpus is None:
        return fill_randomly(layout, device)
    from accelerate import dispatch_model, infer_auto_device_map

    from mmtok_cli.models import hf

    # A sixth of each GPU is left for activations and the KV cache.
    room = {gpu: free * 5 // 6 for gpu, free in gpus.items()}
    places = infer_auto_device_map(layout, max_memory=room, no_split_module_classes=hf.unsplittable_modules(layout))
    return dispatch_model(fill_randomly(layout, device, places), places)


def _pretrained(
    name: str,
    source: str,
    family: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    attention: str,
    layers: int | None,
    device_map: str | None,
) -> tuple[Any, Any]:
    """Model and processor with the weights that were trained."""
    import torch
    from safetensors import SafetensorError

    from mmtok_cli.models import hf

    config = configuration(source, name)
    if layers is not None:
        config = shortened(config, layers, name)
    try:
        processor = family.load_processor(source)
        model, missing = hf.load_weights(source, config, dtype=dtype, attention=attention, device_map=device_map)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MMTokError(
            f"{name} could not be loaded: {first_line(error)}", hf.or_tested("check or download its files again")
        ) from error
    if missing:  # transformers would make them up
        raise MMTokError(f"the files of {name} lack {missing[0]}", hf.or_tested("check or download its files again"))
    if not processor.chat_template:
        raise MMTokError(f"{name} has no chat template", "download chat_template.jinja or chat_template.json as well")
    return model if device_map else model.to(device), processor


def _processor_without_download(name: str, source: str, family: Any, config: Any) -> Any:
    """The model's own processor if it is in the local cache, otherwise the family's stand-in."""
    profile = profile_of(name)
    try:
        return family.load_processor(source, local_files_only=True)
    except (OSError, ValueError) as error:
        if profile is None or profile.chat_template is None:
            raise MMTokError(
                f"the processor of {name} is not in the local cache: {first_line(error)}", "download its files"
            ) from error
        return family.stand_in_processor(config, profile.chat_template)


def _text_tower(name: str) -> dict[str, Any]:
    """The constructor's argument for a model whose profile names a text tower; nothing is loaded yet."""
    from mmtok_cli.models.clip_text import ClipText

    profile = profile_of(name)
    if profile is None or profile.text_tower is None:
        return {}
    return {"text_tower": partial(ClipText.load, profile.text_tower)}


def _internvl() -> Any:
    from mmtok_cli.models.internvl import InternVL

    return InternVL


def _llava() -> Any:
    from mmtok_cli.models.llava import Llava

    return Llava


def _llava_next() -> Any:
    from mmtok_cli.models.llava_next import LlavaNext

    return LlavaNext


def _qwen2_5_vl() -> Any:
    from mmtok_cli.models.qwen_vl import QwenVL

    return QwenVL


def _qwen3_vl() -> Any:
    from mmtok_cli.models.qwen_vl import Qwen3VL

    return Qwen3VL


# By transformers' name of the architecture. The modules are imported when a model of the family is loaded.
FAMILIES = {
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
