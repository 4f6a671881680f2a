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


@contextmanager
def last_layer(model: VisionLanguageModel, read: Callable[[], Mark]) -> Iterator[list[tuple[str, Mark, Mark]]]:
    """Collects the values of `read` where the last loaded layer begins and ends, in prefill and in decode.

    Does nothing where all layers are run. The layer begins with its first norm, so that the work of a method before the
    layer does not count as the layer's.
    """
    spans: list[tuple[str, Mark, Mark]] = []
    if not missing_layers(model):
        yield spans
        return
    layer = hf.decoder_layers(hf.language_model(model.model))[-1]
    started: list[Mark] = []

    def begin(*_: Any) -> None:
        started.append(read())

    def end(_: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        spans.append(("prefill" if hidden.shape[1] > 1 else "decode", started.pop(), read()))

    handles = [hf.first_norm(layer).register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def of_whole_model(measured: Mapping[str, float], last: Mapping[str, float], missing: int) -> dict[str, float]:
    """Figures by stage with the missing layers added, assuming that each costs as much as the last one that is run.

    That layer comes after every cut, like the missing ones. measured: by stage. last: the layer's share of prefill and
    decode. The measured values are kept as `measured_prefill` and `measured_decode`.
    """
    if not missing:
        return dict(measured)
    estimate = dict(measured)
    for stage in ("prefill", "decode"):
        if stage in measured:
            estimate[stage] += missing * last.get(stage, 0.0)
            estimate[f"measured_{stage}"] = measured[stage]
    return estimate
