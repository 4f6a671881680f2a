"""Finding a model by name: its profile, files, family and configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok_cli.errors import MMTokError, suggestion
from mmtok_cli.profiles import Profile, is_cached, known_profiles

if TYPE_CHECKING:
    import torch

HUB_SECONDS = 10  # that the hub may take to answer


def profile_of(name: str) -> Profile | None:
    """The profile of a model, by its name or by its hub id."""
    profiles = known_profiles()
    return profiles.get(name) or next((p for p in profiles.values() if p.location == name), None)


def guiding_profile(name: str, family: str | None = None) -> Profile | None:
    """The profile of a model, or one of its family: its method parameters apply to the whole family.

    family: read from the model's configuration unless given. Raises MMTokError for a model that is not there.
    """
    known = profile_of(name)
    if known:
        return known
    family = family or configuration(source_of(name), name).model_type
    related = (p for p in known_profiles().values() if p.family == family and not p.location.startswith("package:"))
    return next(related, None)


def source_of(name: str) -> str:
    """The directory or hub id that `name` stands for; a directory must hold a model, if only its configuration."""
    profile = known_profiles().get(name)
    if profile:
        return profile.source
    if not name.strip():
        raise MMTokError("no model was named", "`mmtok models` lists those that are known by name")
    try:
        path = Path(name).expanduser()
        found = path.exists()
        if path.is_dir():
            _require_model_files(path, name)
            return str(path)
    # The name is too long or has a null byte, permission is denied, or it begins with ~ and an unknown user.
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MMTokError(
            f"there is no model {name[:80]!r}: {reason}", "`mmtok models` lists those known by name"
        ) from error
    if found:
        raise MMTokError(f"{name} is a file, not a model", "name a directory in the hub's format")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MMTokError(f"there is no model {name!r}", suggestion(name, known_profiles(), "mmtok models"))
    return name


def _require_model_files(directory: Path, name: str) -> None:
    for path in directory.iterdir():  # opening a pipe would wait for its writer, and a device may never end
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise MMTokError(f"{path.name} of {name} is a device, a pipe or a socket, not a file", "remove it")
    if not (directory / "config.json").exists():
        raise MMTokError(
            f"{name} is not a model directory: config.json is missing", "name a directory in the hub's format"
        )


def missing_weights(name: str, source: str) -> str | None:
    """Why there are no weights to load: none in the directory, or neither in the local cache nor within reach.

    Whether they are whole and undamaged is not looked at.
    """
    if Path(source).is_dir():
        found = any(Path(source).glob("*.safetensors"))
        return None if found else f"{name} has no weights: there is no .safetensors file in it"
    if is_cached(source) or _is_within_reach(source):
        return None
    return f"{name} has no weights here: they are not in the local cache, and cannot be fetched from the hub"


def _is_within_reach(hub_id: str) -> bool:
    """Whether the hub answers with a file of a model. Loading a model asks again and again, for minutes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json"), timeout=HUB_SECONDS)
    except Exception:  # of the network, of the hub, or offline mode: their releases have various classes for them
        return False
    return True


def configuration(source: str, name: str) -> Any:
    """The configuration of a directory or hub id. Raises MMTokError where there is none, or none that can be used."""
    from mmtok_cli.models import hf
    from mmtok_cli.models.checkpoint import check_config
    from mmtok_cli.models.foreign_errors import COMPARE, errors_as

    if Path(source).is_dir():
        check_config(Path(source), name)
    with errors_as(f"config.json of {name} cannot be used", hf.or_tested(COMPARE)):
        try:
            return hf.load_config(source)
        except OSError as error:
            raise MMTokError(
                f"{name} is not in the local cache and could not be fetched from the hub",
                "check the spelling and the network, download it elsewhere and name its directory, or measure a model "
                "that is known by name: mmtok profile --model qwen2.5-vl-7b",
            ) from error


def architecture(name: str, source: str) -> Any:
    """The configuration that a model has, from its profile if that knows it all, without any download then."""
    from mmtok_cli.models import hf

    profile = profile_of(name)
    if profile and profile.architecture:
        return hf.make_config(profile.family, copy.deepcopy(profile.architecture))
    return configuration(source, name)


def weights_dtype(name: str, source: str, config: Any) -> torch.dtype:
    """The data type in which weights are loaded that keep their own: what config.json says, or else the widest type
    that a directory holds; float32 where neither is known, so that a model is not thought to fit that does not.

    config: of `architecture`, which may come from a profile.
    """
    import torch

    from mmtok_cli.models import hf
    from mmtok_cli.models.checkpoint import stored_floats

    found = hf.stored_dtype(config)
    if found is None and not Path(source).is_dir():
        found = hf.stored_dtype(configuration(source, name))
    if found is not None:
        return found
    stored = stored_floats(Path(source), name) if Path(source).is_dir() else set()
    return max(stored, key=lambda dtype: dtype.itemsize, default=torch.float32)


def shortened(config: Any, layers: int, name: str) -> Any:
    """The configuration with the first `layers` decoder layers alone. Raises MMTokError for more than there are."""
    from mmtok_cli.models import hf

    text = config.text_config
    if not 1 <= layers <= text.num_hidden_layers:
        raise MMTokError(f"{name} has {text.num_hidden_layers} decoder layers, not {layers}", "choose fewer --layers")
    group = hf.layer_group(text)
    if layers % group:
        kinds = " and ".join(dict.fromkeys(kind.replace("_", " ") for kind in hf.layer_types(text)))
        raise MMTokError(
            f"the decoder layers of {name} come in groups of {group}, with {kinds}: {layers} of them do not represent "
            "the whole model",
            f"choose a multiple of {group} for --layers",
        )
    text.num_hidden_layers = layers
    hf.keep_layer_types(text, layers)
    return config
