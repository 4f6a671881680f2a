"""Known models: what differs between them and is not code, one TOML file each."""

from __future__ import annotations

import json
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from mmtok_cli.errors import MMTokError

PACKAGE = Path(__file__).parent


class Profile(BaseModel):
    """One known model.

    location: a hub id, or `package:PATH` for what comes with mmtok.
    parameters: their number. vision_tokens: per image; where it depends on the image, that of a 640 x 480 photograph.
    frame_tokens: per frame of a video of this size, for models that see videos.
    budgets: those published for the model.
    methods: parameters that differ from a method's defaults on this model, by method.
    architecture: the whole configuration of the model, and chat_template: its prompt, for building it without any
        download. "none" in the architecture is None, for which TOML has no word.
    text_tower: hub id or directory of the CLIP model that the vision encoder was taken from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str
    family: str
    location: str
    parameters: float
    vision_tokens: int
    frame_tokens: float | None = None
    budgets: tuple[str, ...]
    methods: dict[str, dict[str, Any]] = {}
    text_tower: str | None = None
    chat_template: str | None = None
    architecture: dict[str, Any] | None = None

    @field_validator("architecture", mode="before")
    @classmethod
    def _with_none(cls, value: Any) -> Any:
        return _with_none(value)

    @property
    def source(self) -> str:
        """The directory or hub id to load from."""
        if self.location.startswith("package:"):
            return str(PACKAGE / self.location.removeprefix("package:"))
        return self.location

    def is_here(self) -> bool:
        """Whether the weights can be loaded without a download."""
        return self.location.startswith("package:") or is_cached(self.location)


def is_cached(hub_id: str) -> bool:
    """Whether the weights of a model are in the local cache, all files of them."""
    from huggingface_hub import try_to_load_from_cache

    def path(file: str) -> str | None:
        found = try_to_load_from_cache(hub_id, file)
        return found if isinstance(found, str) else None

    if path("model.safetensors"):
        return True
    index = path("model.safetensors.index.json")
    if index is None:
        return False
    try:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return True  # a damaged index is an error of loading
    return all(isinstance(shard, str) and path(shard) for shard in shards)


def is_demo(model: str) -> bool:
    """Whether the name of a model stands for the one that comes with mmtok."""
    profile = known_profiles().get(model)
    return profile is not None and profile.location.startswith("package:")


def known_profiles() -> dict[str, Profile]:
    """All profiles by name, the demo model first, then by family and size.

    Raises MMTokError naming a file that does not parse.
    """
    profiles = [_read(path) for path in sorted(profile_directory().glob("*.toml"))]
    profiles.sort(key=lambda profile: (profile.name != "demo", profile.family, profile.parameters))
    return {profile.name: profile for profile in profiles}


def profile_directory() -> Path:
    """Where the profiles are: in the installed package, or beside it in a checkout."""
    installed = PACKAGE / "profiles"
    return installed if installed.is_dir() else PACKAGE.parent / "profiles"


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(part) for key, part in value.items()}
    return None if value == "none" else value


def _read(path: Path) -> Profile:
    try:
        return _parsed(path.read_text(encoding="utf-8")).model_copy(deep=True)
    except (OSError, ValueError) as error:  # damaged TOML, text that is not UTF-8 and wrong fields are ValueErrors
        reason = " ".join(str(error).split())
        raise MMTokError(f"{path} is not a profile: {reason}", "compare it with profiles/demo.toml") from error


@lru_cache(maxsize=64)
def _parsed(text: str) -> Profile:
    """Parsing takes far longer than reading, and a command needs the profiles several times."""
    return Profile(**tomllib.loads(text))
