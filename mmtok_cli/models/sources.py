"""Finding a model by name: its profile, files, family and configuration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from mmtok_cli.errors import MMTokError, first_line, suggestion
from mmtok_cli.profiles import Profile, known_profiles


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
    family = family or configuration(source_of(name, weights=False), name).model_type
    related = (p for p in known_profiles().values() if p.family == family and not p.location.startswith("package:"))
    return next(related, None)


def source_of(name: str, *, weights: bool = True) -> str:
    """The directory or hub id that `name` stands for; a directory must hold a model; weights: with weights."""
    profile = known_profiles().get(name)
    if profile:
        return profile.source
    if not name.strip():
        raise MMTokError("no model was named", "`mmtok models` lists those that are known by name")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MMTokError(
                f"{name} is not a model directory: config.json is missing", "name a directory in the hub's format"
            )
        if weights and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise MMTokError(
                f"{name} has no weights: there is no .safetensors file in it", "copy the weights there too"
            )
        return str(path)
    if path.exists():
        raise MMTokError(f"{name} is a file, not a model", "name a directory in the hub's format")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MMTokError(f"there is no model {name!r}", suggestion(name, known_profiles(), "mmtok models"))
    return name


def configuration(source: str, name: str) -> Any:
    """The configuration of a directory or hub id. Raises MMTokError where there is none."""
    from mmtok_cli.models import hf

    try:
        return hf.load_config(source)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if Path(source).is_dir():
            raise MMTokError(
                f"the config.json of {name} cannot be read: {first_line(error)}", "download it again"
            ) from error
        raise MMTokError(
            f"{name} is not in the local cache and could not be fetched from the hub",
            "check the spelling and the network, download it elsewhere and name its directory, or time a known model "
            "with --weights random",
        ) from error


def architecture(name: str, source: str) -> Any:
    """The configuration that a model has, from its profile if that knows it all, without any download then."""
    from mmtok_cli.models import hf

    profile = profile_of(name)
    if profile and profile.architecture:
        return hf.make_config(profile.family, copy.deepcopy(profile.architecture))
    return configuration(source, name)


def shortened(config: Any, layers: int, name: str) -> Any:
    """The configuration with the first `layers` decoder layers alone. Raises MMTokError for more than there are."""
    from mmtok_cli.models import hf

    text = config.text_config
    if not 1 <= layers <= text.num_hidden_layers:
        raise MMTokError(f"{name} has {text.num_hidden_layers} decoder layers, not {layers}", "choose fewer --layers")
    text.num_hidden_layers = layers
    hf.keep_layer_types(text, layers)
    return config
