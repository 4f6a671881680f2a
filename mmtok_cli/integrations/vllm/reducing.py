"""The part of a request that the model sees: after the encoder, vision tokens are selected image by image."""

from __future__ import annotations

import json
import os
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank

from mmtok_cli.image_plan import ImagePlan
from mmtok_cli.integrations.vllm.processing import KEY
from mmtok_cli.integrations.vllm.request import ImageRequest
from mmtok_cli.methods.base import Method
from mmtok_cli.models import outline
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import select, selection_tasks
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens

RECORD = "MMTOK_RECORD"  # environment variable: a file to which a line is added for every batch of images


class Reducing:
    """Mixed into a model class of vLLM, whose `embed_multimodal` then gives the selected tokens of each image.

    A model must define `encode_images`. signals: what it can give to methods. mmtok_config: vLLM's configuration.
    """

    signals: tuple[str, ...] = ()
    _has_embedded = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.mmtok_config = vllm_config

    @cached_property
    def layout(self) -> VisionLanguageModel:
        """The model without its weights: tokenizer, chat template, how images are cut into crops."""
        return outline(self.mmtok_config.model_config.model, device="cpu", attention="sdpa")

    @abstractmethod
    def encode_images(self, requests: Sequence[ImageRequest], signals: Sequence[str], **inputs: Any) -> Any:
        """The vision tokens of each image, with the signals that any method reads. inputs: vLLM's."""

    def rows(self, vision: VisionTokens, selection: Selection) -> Tensor:
        """What enters the language model of an image, [kept, dim]."""
        tokens = vision.projected[selection.indices] if selection.tokens is None else selection.tokens
        return tokens.to(vision.projected.dtype)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        requests = [ImageRequest.read(each) for each in kwargs.pop(KEY, ())]
        clock = Clock(_device_of(self))
        if not any(request.method for request in requests):
            with clock("encode"):
                embedded = super().embed_multimodal(**kwargs)  # type: ignore[misc]
            clock.write(requests, [None] * len(requests))
            return embedded
        methods = {i: request.made() for i, request in enumerate(requests) if request.method}
        needed = {name for method in methods.values() for name in method.signals_among(self.signals)}
        with clock("encode"):
            vision = self.encode_images(requests, sorted(needed), **kwargs)
        with clock("select"):
            selections = self._select(requests, methods, vision)
            embedded = tuple(self.rows(v, s) for v, s in zip(vision, selections, strict=True))
        clock.write(requests, selections)
        return embedded

    def _select(
        self, requests: Sequence[ImageRequest], methods: dict[int, Method], vision: Sequence[VisionTokens]
    ) -> list[Selection]:
        """What is kept of each image. Those of one method are selected together."""
        if not self._has_embedded:
            # vLLM compiles its first look-up, which changes settings of the process that no method must be blamed for.
            self._embed_words(["word"])
            self._has_embedded = True
        selections = [Selection.everything(tokens) for tokens in vision]
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, method in methods.items():
            groups[method, requests[i].track].append(i)
        for (method, track), members in groups.items():
            shown = [vision[i] for i in members]
            texts = [self._text(requests[i]) for i in members]
            plans = [ImagePlan(vision[i].total, requests[i].budget, None) for i in members]
            _, tasks = selection_tasks(method, shown, texts, plans, Rules(track))
            for i, selection in zip(members, select(method, tasks), strict=True):
                if selection.kept != requests[i].keep:
                    raise RuntimeError(
                        f"{requests[i].method} kept {selection.kept} tokens, and there are {requests[i].keep} "
                        "placeholders"
                    )
                selections[i] = selection
        return selections

    def _text(self, request: ImageRequest) -> TextTokens:
        words = self.layout.released_words(request.question) if request.track == "released" else None
        return TextTokens(request.question, self._embed_words, words)

    def _embed_words(self, words: Sequence[str]) -> Tensor:
        language = self.get_language_model()  # type: ignore[attr-defined]
        return language.embed_input_ids(self.layout.word_ids(words).to(_device_of(self)))


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


class Clock:
    """Seconds of the stages of one batch of images; measured only if they are recorded."""

    def __init__(self, device: torch.device) -> None:
        self.path = os.environ.get(RECORD)
        self.device, self.seconds = device, dict[str, float]()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if not self.path:
            yield
            return
        start = self._now()
        yield
        self.seconds[stage] = self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def write(self, requests: Sequence[ImageRequest], selections: Sequence[Selection | None]) -> None:
        """Add a line to the record: what was kept of each image, None for those that were not reduced."""
        if not self.path or get_tensor_model_parallel_rank():
            return
        images = [
            {"image_id": r.image_id, "method": r.method or "full", "kept": None if s is None else s.indices.tolist()}
            for r, s in zip(requests, selections, strict=True)
        ]
        line = json.dumps({"time": time.time(), "seconds": self.seconds, "images": images})
        with Path(self.path).open("a", encoding="utf-8") as record:
            record.write(line + "\n")


@contextmanager
def watched(module: nn.Module, *, wanted: bool = True) -> Iterator[list[Any]]:
    """Collects (first argument, first output) of each call of a module while the context is open, if that is wanted.

    Modules that vLLM may compile are called without hooks; watch a layer inside them.
    """
    seen: list[Any] = []
    if not wanted:
        yield seen
        return
    handle = module.register_forward_hook(
        lambda _, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
    )
    try:
        yield seen
        if not seen:
            raise RuntimeError(
                f"mmtok cannot read the encoder: its {type(module).__name__} was not called as a module; start vLLM "
                "without a compiled encoder"
            )
    finally:
        handle.remove()
