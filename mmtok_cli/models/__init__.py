"""Loading a model by name, hub id or directory."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MMTokError, suggestion
from mmtok_cli.profiles import Profile, known_profiles

if TYPE_CHECKING:
    import torch

    from mmtok_cli.models.base import VisionLanguageModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("pretrained", "random")
DEVICES = ("auto", "cpu", "cuda", "mps")


def load_model(
    name: str = "demo", *, device: str = "auto", dtype: str = "auto", weights: str = "pretrained"
) -> VisionLanguageModel:
    """Load a model with its processor, ready for inference.

    name: one of `mmtok models`, a hub id, or a directory in the hub's format.
    device: `auto` takes a GPU where there is one. dtype: `auto` takes float32 on a CPU, otherwise what the weights
    are stored in. weights: `random` builds the model's architecture without its weights; what it answers means
    nothing, but time and memory do not depend on that.

    Raises MMTokError for a name, device or data type that does not exist here, a model family that is not supported,
    a model that does not fit, and weights that are missing or damaged.
    """
    where = choose_device(device)
    if weights not in WEIGHTS:
        raise MMTokError(f"there are no weights {weights!r}", f"choose one of {', '.join(WEIGHTS)}")
    if weights == "random":
        return _random_model(name, where, dtype)
    source = _source(name)
    known, kind = profile_of(name), choose_dtype(dtype, where)
    if known:
        import torch

        from mmtok_cli.models.room import require_room

        require_room(name, known.parameters, torch.float16 if isinstance(kind, str) else kind, where)
    family = _family(name, source)

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=kind)
        processor = family.load_processor(source)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MMTokError(
            f"{name} could not be loaded: {_first_line(error)}", "check or download its files again"
        ) from error
    if not processor.chat_template:
        raise MMTokError(f"{name} has no chat template", "download chat_template.jinja or chat_template.json as well")
    return family(name, model.to(where).eval(), processor, **_text_tower(name))


def profile_of(name: str) -> Profile | None:
    """The profile of a model, by its name or by its hub id."""
    profiles = known_profiles()
    return profiles.get(name) or next((p for p in profiles.values() if p.location == name), None)


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the best there is for `auto`. Raises MMTokError where it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise MMTokError(f"there is no device {name!r}", f"choose one of {', '.join(DEVICES)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MMTokError("no CUDA device is available", "use --device cpu, or install a CUDA build of torch")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MMTokError("no MPS device is available", "use --device cpu")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise MMTokError(f"device {name!r} cannot be used: {_first_line(error)}", "use --device auto") from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The data type called `name`; `auto` is float32 on a CPU, otherwise that of the stored weights."""
    import torch

    if name not in DTYPES:
        raise MMTokError(f"there is no data type {name!r}", f"choose one of {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def _random_model(name: str, device: torch.device, dtype: str) -> VisionLanguageModel:
    """The architecture of a model under random weights, with its own processor if that is in the local cache."""
    import torch
    from transformers import AutoConfig

    from mmtok_cli.models.random_weights import build_random

    profile, source, kind = profile_of(name), _source(name, weights=False), choose_dtype(dtype, device)
    if profile and profile.architecture:
        family = FAMILIES[profile.family]()
        config = AutoConfig.for_model(profile.family, **copy.deepcopy(profile.architecture))
    else:
        family = _family(name, source)
        config = AutoConfig.from_pretrained(source)
    model = build_random(name, config, torch.bfloat16 if isinstance(kind, str) else kind, device)
    try:
        processor = family.load_processor(source, local_files_only=True)
    except (OSError, ValueError) as error:
        if profile is None or profile.chat_template is None:
            raise MMTokError(
                f"the processor of {name} is not in the local cache: {_first_line(error)}", "download its files"
            ) from error
        processor = family.stand_in_processor(config, profile.chat_template)
    built = family(name, model.eval(), processor, **_text_tower(name))
    built.weights = "random"
    return built


def _source(name: str, *, weights: bool = True) -> str:
    """The directory or hub id that `name` stands for; a directory must hold a model, with its weights if asked for."""
    profile = known_profiles().get(name)
    if profile:
        return profile.source
    if not name.strip():
        raise MMTokError("no model was named", "`mmtok models` lists those that are known by name")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MMTokError(
                f"{name} holds no model: there is no config.json in it", "name a directory in the hub's format"
            )
        if weights and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise MMTokError(
                f"{name} holds no weights: there is no .safetensors file in it", "copy the weights there too"
            )
        return str(path)
    if path.exists():
        raise MMTokError(f"{name} is a file, not a model", "name a directory in the hub's format")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MMTokError(f"there is no model {name!r}", suggestion(name, known_profiles(), "mmtok models"))
    return name


def _text_tower(name: str) -> dict[str, Any]:
    """The constructor's argument for a model whose profile names a text tower; nothing is loaded yet."""
    from mmtok_cli.models.clip_text import ClipText

    profile = profile_of(name)
    if profile is None or profile.text_tower is None:
        return {}
    return {"text_tower": partial(ClipText.load, profile.text_tower)}


def _family(name: str, source: str) -> Any:
    from transformers import AutoConfig

    try:
        model_type = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if Path(source).is_dir():
            raise MMTokError(
                f"the config.json of {name} cannot be read: {_first_line(error)}", "download it again"
            ) from error
        raise MMTokError(
            f"{name} is not in the local cache and could not be fetched from the hub",
            "check the spelling and the network, or download it elsewhere and name its directory",
        ) from error
    if model_type not in FAMILIES:
        raise MMTokError(
            f"{name} is a {model_type!r} model, which is not supported", f"supported families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]()


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


# By transformers' name of the architecture; imported when asked for.
FAMILIES = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
