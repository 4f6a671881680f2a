"""Engines that answer: transformers in this process, or a serving engine. Which options go with which of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Literal, get_args

from mmtok_cli.errors import MMTokError

Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

# Options that vLLM cannot follow, by the parameter of the command, and why. `mmtok profile` and `mmtok compare` have
# further ones.
VLLM: Mapping[str, str] = {
    "attention": "vLLM chooses its attention kernel",
    "encoder_attention": "vLLM chooses its attention kernel",
    "device_map": "vLLM places models itself",
    "quantization": "vLLM serves checkpoints that are quantized already: name one with --model",
    "positions": "the engine keeps the positions of each model family",
    "budget_means": "methods inside the language model, which it is for, do not run in vLLM",
    "budget_per": "videos are not sent to vLLM yet",
    "frames": "videos are not sent to vLLM yet",
    "fps": "videos are not sent to vLLM yet",
    "folder_fps": "videos are not sent to vLLM yet",
    "draft": "vLLM selects vision tokens before there is an answer to read",
    "draft_tokens": "vLLM selects vision tokens before there is an answer to read",
    "turn": "vLLM answers single questions here",
    "turns": "vLLM answers single questions here",
    "encode_again": "vLLM answers single questions here",
    "compile_model": "vLLM has its own compilation",
    "image_scale": "vLLM encodes images at the size that the model's processor gives them",
    "pixels": "vLLM encodes images at the size that the model's processor gives them",
    "batch_size": "vLLM forms batches itself: see --concurrency of `mmtok profile`",
    "find_batch": "vLLM forms batches itself",
}
OF_COMMAND: Mapping[str, Mapping[str, str]] = {
    "profile": {
        "runs": "raise --requests or --rounds",
        "strict": "an engine is measured as it is",
        "max_time": "lower --requests or --rounds",
        "scaling": "the numbers of vision tokens are those of the images",
        "scaling_tokens": "the numbers of vision tokens are those of the images",
        "scaling_frames": "videos are not sent to vLLM yet",
        "plot": "it draws the results of --scaling",
        "trace_dir": "an engine is not traced",
        "top": "an engine is not traced",
    },
    "compare": dict.fromkeys(
        ("runs", "new_tokens", "prompt_tokens", "warmup", "rounds", "min_time", "fail_below", "fail_below_stage"),
        "with an engine, `mmtok profile` measures time and `mmtok compare` quality",
    )
    | dict.fromkeys(("run_dir", "resume", "dry_run"), "answers of an engine are not kept in a run directory")
    | dict.fromkeys(("tasks", "include_path"), "tasks of lmms-eval are evaluated with transformers")
    | {
        "layers": "answers of a part of a model mean nothing",
        "retain": "budgets are searched with transformers only",
        "by": "budgets are searched with transformers only",
        "no_quality": "nothing else is measured: `mmtok profile --engine vllm` measures time",
        "plot": "it draws times as well, which `mmtok profile` measures",
    },
}
ONLY_ENGINES = {"concurrency", "requests", "data"}  # parameters of `mmtok profile` that transformers ignores


def require_engine(name: str) -> Engine:
    """The engine of this name. Raises MMTokError for one that does not exist or is not installed."""
    engine = next((each for each in ENGINES if each == name), None)
    if engine is None:
        near = get_close_matches(name.lower(), ENGINES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MMTokError(f"there is no engine {name!r}", f"{hint}choose one of {', '.join(ENGINES)}")
    if engine == "vllm" and find_spec("vllm") is None:
        raise MMTokError("--engine vllm needs vLLM, which is not installed here", "pip install 'mmtok[vllm]'")
    return engine


def require_options(engine: Engine, command: str, given: Mapping[str, str]) -> None:
    """Refuse options that the engine cannot follow.

    given: the parameters of the command that were spelled out, and the names of their options. Raises MMTokError.
    """
    if engine == "transformers":
        for parameter in _first(given, ONLY_ENGINES if command == "profile" else ()):
            raise MMTokError(f"{given[parameter]} needs a serving engine", "add --engine vllm, or omit it")
        return
    refused = {**VLLM, **OF_COMMAND.get(command, {})}
    for parameter in _first(given, refused):
        option = given[parameter]
        raise MMTokError(f"{option} does not go with --engine {engine}: {refused[parameter]}", f"omit {option}")


def _first(given: Mapping[str, str], refused: Iterable[str]) -> list[str]:
    known = set(refused)
    return [parameter for parameter in given if parameter in known][:1]
