"""What a request to the engine asks of the plug-in, and what the model is told of each image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.configuration import configured_method
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.parameters import as_tuples
from mmtok_cli.methods.settings import read_settings
from mmtok_cli.models import qwen_signals
from mmtok_cli.rules import Track

CLIP_SIGNALS = ("class_feature", "class_attention", "mean_keys")
# What the models of vLLM can give to methods, by family. The text tower of CLIP is a second model.
SIGNALS = {
    "llava": CLIP_SIGNALS,
    "llava_next": CLIP_SIGNALS,
    "qwen2_5_vl": qwen_signals.SIGNALS,
    "qwen3_vl": qwen_signals.SIGNALS,
}


class Options(BaseModel):
    """Keys of `mm_processor_kwargs` that belong to the plug-in; all others go to the model's own processor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("full", description="method of `mmtok methods`")
    budget: str | None = Field(None, description="vision tokens to keep of each image: 64, or 10%")
    set: tuple[str, ...] = Field((), description="parameters of the method, as in mmtok.alpha=0.5")
    seed: int = Field(0, description="seed of methods that draw")
    track: Track = Field("released", description="released or harmonised")
    question: str | None = Field(None, description="what methods read; default: the prompt's last question")
    image_ids: tuple[str, ...] | None = Field(None, description="names from which seeded methods draw; default: a hash")
    image_aspect_ratio: str | None = Field(None, description="pad: LLaVA-1.5 sees the image padded to a square")


@dataclass(frozen=True)
class Reduction:
    """A request for fewer vision tokens, resolved and checked.

    parameters: all of the method's. question: empty for methods that do not read it, so that the images of two
    questions share what vLLM caches. pad: images are padded to a square.
    """

    method: str
    parameters: Mapping[str, Any]
    budget: str | None
    track: Track
    question: str = ""
    image_ids: tuple[str, ...] | None = None
    pad: bool = False

    @property
    def reduces(self) -> bool:
        return self.method != "full"

    def made(self) -> Method:
        return method_of(self.method, self.parameters)

    def text(self) -> str:
        """As one line of JSON, a part of the hash of each image."""
        return json.dumps(asdict(self), sort_keys=True)

    def of_images(self, numbers: Sequence[int]) -> Reduction:
        """The request with some of the images alone."""
        ids = self.image_ids
        return self if ids is None else replace(self, image_ids=tuple(ids[number] for number in numbers))

    @staticmethod
    def read(text: str) -> Reduction:
        values = json.loads(text)
        ids = values.pop("image_ids")
        return Reduction(**values, image_ids=None if ids is None else tuple(ids))


@dataclass(frozen=True)
class ImageRequest:
    """What the model is told of one image, as a tensor that travels with its pixels.

    budget: how many vision tokens the method is to keep. keep: how many placeholders there are: as many, or fewer for
    methods that do not keep as many as they are asked for. padded_from: width and height of the image, if it was padded
    to a square. The other fields are those of `Reduction`. An image that is not reduced has no method.
    """

    method: str = ""
    parameters: Mapping[str, Any] | None = None
    track: Track = "released"
    question: str = ""
    image_id: str = ""
    budget: int = 0
    keep: int = 0
    padded_from: tuple[int, int] | None = None

    def made(self) -> Method:
        return method_of(self.method, self.parameters or {})

    def tensor(self) -> Tensor:
        """[bytes], uint8."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @staticmethod
    def read(tensor: Tensor) -> ImageRequest:
        values = json.loads(tensor.cpu().numpy().tobytes())
        padded = values.pop("padded_from")
        return ImageRequest(**values, padded_from=None if padded is None else tuple(padded))


def method_of(name: str, parameters: Mapping[str, Any]) -> Method:
    """A method with all its parameters."""
    return _made(name, json.dumps(dict(parameters), sort_keys=True))


@lru_cache(maxsize=256)
def _made(name: str, parameters: str) -> Method:
    return make_method(name, **{key: as_tuples(value) for key, value in json.loads(parameters).items()})


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plug-in's keys of `mm_processor_kwargs`, and the others."""
    own = {key: value for key, value in given.items() if key in Options.model_fields}
    return own, {key: value for key, value in given.items() if key not in own}


def combined(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The plug-in's keys among the server's defaults, overridden by those of a request.

    Of the defaults, parameters of other methods than the one that is asked for have no effect, and neither has a budget
    where no method is asked for.
    """
    given = {**defaults, **asked}
    if given.get("method") is None and "budget" not in asked:
        given.pop("budget", None)
    texts = [given["set"]] if isinstance(given.get("set"), str) else given.get("set")
    if "set" not in asked and isinstance(texts, (list, tuple)):
        others = {*method_names()} - {given.get("method") or "full"}
        given["set"] = [text for text in texts if str(text).partition(".")[0].strip() not in others]
    return given


def check_others(others: Mapping[str, Any], known: set[str]) -> None:
    """Refuse a key that is nobody's and looks like one of the plug-in's. known: keys of the model's own processor."""
    for key in others:
        near = get_close_matches(key, Options.model_fields, n=1, cutoff=0.75)
        if near and key not in known:
            raise MMTokError(f"mm_processor_kwargs has no {key!r}", f"did you mean {near[0]!r}?")


def resolved(given: Mapping[str, Any], model: str, family: str, images: int) -> Reduction:
    """The request that the plug-in's keys describe.

    given: see `combined`. images: how many the prompt has. The question is
    left empty unless it is given. Raises MMTokError for what cannot be followed.
    """
    values = {key: value for key, value in given.items() if value is not None}
    if isinstance(values.get("budget"), int) and not isinstance(values["budget"], bool):
        values["budget"] = str(values["budget"])
    if isinstance(values.get("set"), str):
        values["set"] = [values["set"]]
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        about = Options.model_fields[key].description if key in Options.model_fields else ""
        raise MMTokError(f"{key} in mm_processor_kwargs cannot be {first['input']!r}", f"{key}: {about}") from error
    if options.image_aspect_ratio not in (None, "pad"):
        raise MMTokError(
            f"image_aspect_ratio in mm_processor_kwargs cannot be {options.image_aspect_ratio!r}",
            "pad, or leave it out for the processor's own way",
        )
    if options.image_aspect_ratio == "pad" and family != "llava":
        raise MMTokError(f"images of the {family} family are not padded to a square", "leave out image_aspect_ratio")
    if options.image_ids is not None and len(options.image_ids) != images:
        raise MMTokError(
            f"image_ids in mm_processor_kwargs names {len(options.image_ids)} images, and the prompt has {images}",
            "give one name for each image, or leave it out",
        )
    method = _configured(options.method, options.set, options.seed, model, family)
    if method.takes_budget:
        if options.budget is None:
            raise MMTokError(f"{options.method} needs a budget", 'add "budget": 64, or "10%", to mm_processor_kwargs')
        Budget.parse(options.budget)
    elif options.method == "full" and "budget" in given and "method" not in given:
        raise MMTokError("mm_processor_kwargs has a budget and no method", 'add "method": "mmtok"')
    return Reduction(
        method=options.method,
        parameters=dict(vars(method)),
        budget=options.budget if method.takes_budget else None,
        track=options.track,
        question=options.question or "",
        image_ids=options.image_ids,
        pad=options.image_aspect_ratio == "pad",
    )


@lru_cache(maxsize=256)
def _configured(name: str, settings: tuple[str, ...], seed: int, model: str, family: str) -> Method:
    try:
        parameters = read_settings(settings, [name]).get(name)
    except MMTokError as error:
        raise MMTokError(error.message.replace("--set ", "set "), error.hint.replace("--set ", "set ")) from error
    return configured_method(name, model, parameters, seed=seed, family=family)


def require_family(family: str) -> None:
    """Refuse a family whose images the plug-in does not reduce. Raises MMTokError."""
    if family not in SIGNALS:
        raise MMTokError(
            f"images of the {family} family are not reduced in vLLM",
            f"those of {', '.join(SIGNALS)} are; leave out --engine vllm for others",
        )


def require_supported(name: str, method: Method, family: str) -> None:
    """Refuse a method that the engine cannot run on the models of a family. Raises MMTokError."""
    place, signals = method.acts(), SIGNALS[family]
    if "inside" in place:
        problem = "drops tokens inside the language model, and vLLM lays out the KV cache before its first layer runs"
    elif "encoder" in place and "before" in place:
        problem = "makes the image smaller before it is encoded"
    elif not method.takes_budget and name != "full":
        problem = "has no budget, and the number of placeholders must be known"
    elif missing := [signal for signal in method.signals_among(signals) if signal not in signals]:
        problem = f"reads {', '.join(missing)}, which is not to be had in vLLM for this model"
    else:
        return
    raise MMTokError(f"{name} {problem}", "choose a method such as mmtok, divprune or random")
