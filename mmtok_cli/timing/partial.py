"""Estimates for the whole model where only its first decoder layers are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel

Mark = TypeVar("Mark")


def missing_layers(model: VisionLanguageModel) -> int:
    """How many decoder layers of the model are not run."""
    return model.layer_count - model.loaded_layers


def missing_groups(model: VisionLanguageModel) -> float:
    """How many groups of decoder layers are not run; a group is one layer where all are of one kind."""
    return missing_layers(model) / model.layer_group


def last_group(model: VisionLanguageModel) -> Any:
    """The last group of decoder layers that are run."""
    return hf.decoder_layers(hf.language_model(model.model))[-model.layer_group :]


@contextmanager
def last_layer(model: VisionLanguageModel, read: Callable[[], Mark]) -> Iterator[list[tuple[str, Mark, Mark]]]:
    """Collects the values of `read` where the last group of loaded layers begins and ends, in prefill and in decode.

    Does nothing where all layers are run. A layer begins with its first norm, so that the work of a method before the
    layer does not count as the layer's.
    """
    spans: list[tuple[str, Mark, Mark]] = []
    if not missing_layers(model):
        yield spans
        return
    layers = last_group(model)
    started: list[Mark] = []

    def begin(*_: Any) -> None:
        started.append(read())

    def end(_: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        spans.append(("prefill" if hidden.shape[1] > 1 else "decode", started.pop(), read()))

    handles = [hf.first_norm(layers[0]).register_forward_pre_hook(begin), layers[-1].register_forward_hook(end)]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def of_whole_model(measured: Mapping[str, float], last: Mapping[str, float], missing: float) -> dict[str, float]:
    """Figures by stage with the missing layers added, assuming that each group costs as much as the last that is run.

    A group of one layer comes after every cut, like the missing ones. A part of a larger one may come before a cut, and
    the estimate is then too high. measured: by stage. last: the share of prefill and decode of the last group of
    layers. missing: groups. The measured values are kept as `measured_prefill` and `measured_decode`.
    """
    if not missing:
        return dict(measured)
    estimate = dict(measured)
    for stage in ("prefill", "decode"):
        if stage in measured:
            estimate[stage] += missing * last.get(stage, 0.0)
            estimate[f"measured_{stage}"] = measured[stage]
    return estimate
