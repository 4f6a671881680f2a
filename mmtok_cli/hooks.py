"""Calls of the hooks of methods: what a hook returns is checked, and its faults are reported as the method's own.

Methods may come from other packages. Nothing else in this package calls their hooks.
"""

from __future__ import annotations

import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mmtok_cli.errors import MethodFaultError, MMTokError, first_line, is_out_of_memory
from mmtok_cli.methods.base import Method, package_of
from mmtok_cli.methods.isolation import GlobalStateError, isolated
from mmtok_cli.stages import CHECK, Stage
from mmtok_cli.tokens import PADDING, Cut, LayerTokens, Rows, Selection, TextTokens, VisionTokens
from mmtok_cli.values import deferred, require

PACKAGE = __name__.partition(".")[0]


def count(method: Method, share: float, total: int, signals: Sequence[str] = ()) -> int:
    """`Method.count`: a number of tokens up to `total`."""
    with _calling(method, "count"):
        kept = method.count(share, total, signals)
    if not _is_int(kept) or not 0 <= kept <= total:
        raise fault(method, "count", f"must return a number from 0 to {total}, not {_shown(kept)}")
    return kept


def video_count(method: Method, share: float, total: int, slices: int) -> int:
    """`Method.video_count`: a number of tokens up to `total`, which are those of `slices` equal slices."""
    with _calling(method, "video_count"):
        kept = method.video_count(share, slices, total // slices)
    if not _is_int(kept) or not 0 <= kept <= total:
        raise fault(method, "video_count", f"must return a number from 0 to {total}, not {_shown(kept)}")
    return kept


def resize(method: Method, total: int, budget: int) -> int | None:
    """`Method.resize`: a number of tokens up to `total`, or None."""
    with _calling(method, "resize"):
        tokens = method.resize(total, budget)
    if tokens is not None and not (_is_int(tokens) and 1 <= tokens <= total):
        raise fault(method, "resize", f"must return None or a number from 1 to {total}, not {_shown(tokens)}")
    return tokens


def keep_slices(method: Method, slices: int, tokens: int, budget: int) -> int | None:
    """`Method.keep_slices`: a number of slices, or None."""
    with _calling(method, "keep_slices"):
        kept = method.keep_slices(slices, tokens, budget)
    if kept is not None and not (_is_int(kept) and 1 <= kept <= slices):
        raise fault(method, "keep_slices", f"must return None or a number from 1 to {slices}, not {_shown(kept)}")
    return kept


def entering(method: Method, total: int, budget: int) -> int:
    """`Method.entering`: a number of tokens from `budget` to `total`; the latter where nothing is dropped."""
    if budget == total:
        return total
    with _calling(method, "entering"):
        tokens = method.entering(total, budget)
    if not _is_int(tokens) or not budget <= tokens <= total:
        raise fault(method, "entering", f"must return a number from {budget} to {total}, not {_shown(tokens)}")
    return tokens


def across_crops(method: Method, crops: Sequence[VisionTokens]) -> list[VisionTokens]:
    """`Method.across_crops`: one VisionTokens for each crop."""
    with _calling(method, "across_crops"):
        seen = list(method.across_crops(crops))
    same = len(seen) == len(crops) and all(isinstance(crop, VisionTokens) for crop in seen)
    if not same or any(a.total != b.total for a, b in zip(seen, crops, strict=True)):
        raise fault(method, "across_crops", f"must return the {len(crops)} crops, each with its tokens")
    return seen


def select(
    method: Method, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
) -> list[Selection]:
    """`Method.select_batch`: one Selection for each image. `check_selections` checks what they hold."""
    with _calling(method, "select"):
        selections = method.select_batch(vision, text, budgets)
    _require_one_each(method, "select_batch", selections, len(vision), "image")
    for tokens, selection in zip(vision, selections, strict=True):
        _check_shapes(method, "select", selection, tokens.projected)
    return list(selections)


def select_crops(method: Method, crops: Sequence[VisionTokens], text: TextTokens, budget: int) -> list[Selection]:
    """`Method.select_crops`: one Selection for each crop, `budget` tokens in all."""
    with _calling(method, "select_crops"):
        selections = method.select_crops(crops, text, budget)
    _require_one_each(method, "select_crops", selections, len(crops), "crop")
    for tokens, selection in zip(crops, selections, strict=True):
        _check_shapes(method, "select_crops", selection, tokens.projected)
    return list(selections)


def check_selections(
    method: Method, vision: Sequence[VisionTokens], budgets: Sequence[int], selections: Sequence[Selection]
) -> None:
    """Check what `select` returned; where checks are `deferred`, values on a device are read when they are settled."""
    for tokens, budget, selection in zip(vision, budgets, selections, strict=True):
        check_kept(method, selection.kept, budget, tokens, "select")
        if selection.kept != tokens.total or selection.tokens is not None:
            _check_values(method, "select", selection, tokens.eligible)


def check_kept(method: Method, kept: int, budget: int, tokens: VisionTokens, hook: str) -> None:
    """Check the number of tokens that a hook leaves of an image."""
    if method.takes_budget and (kept > budget or (method.exact and kept < budget)):
        raise fault(method, hook, f"kept {kept} tokens of {tokens.image_id} at a budget of {budget}")
    if kept > tokens.total:
        raise fault(method, hook, f"kept {kept} tokens of {tokens.image_id}, which has {tokens.total}")


@contextmanager
def unchanged(method: Method, given: Callable[[], list[Tensor]], stage: Stage) -> Iterator[None]:
    """Refuse a method of another package that changes what it was given, since the model would see it.

    given: the tensors, as the objects that the method gets hold them now.
    """
    if package_of(type(method)) == PACKAGE:
        yield
        return
    with stage(CHECK):
        tensors = given()
        before = [tensor.clone() for tensor in tensors]
    yield
    with stage(CHECK):
        same = all(
            now is tensor and bool(((tensor == copy) | (copy != copy)).all())
            for now, tensor, copy in zip(given(), tensors, before, strict=True)
        )
    if not same:
        raise fault(method, "select", "changed its input in place: return rows of your own in Selection.tokens")


def cuts(method: Method, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
    """`Method.cuts`: a tuple of Cut."""
    with _calling(method, "cuts"):
        found = method.cuts(total, budget, layers)
    if not isinstance(found, (list, tuple)) or not all(_is_cut(cut) for cut in found):
        raise fault(method, "cuts", f"must return a tuple of Cut, not {_shown(found)}")
    return tuple(found)


def queries(method: Method, vision: Tensor, text: Tensor, stage: Stage) -> Tensor:
    """`Method.queries`: indices of text tokens, or bool [text tokens]."""
    with _calling(method, "queries"):
        found = method.queries(vision, text)
    is_tensor = isinstance(found, Tensor) and found.ndim == 1 and found.numel()
    is_mask = is_tensor and found.dtype == torch.bool and len(found) == len(text)
    if not is_mask and not (is_tensor and found.dtype == torch.int64):
        raise fault(method, "queries", "must return the indices of text tokens, an int64 tensor [queries], or a mask")
    if found.device != text.device:
        raise fault(method, "queries", f"returned a tensor on {found.device}, and the text is on {text.device}")
    with stage(CHECK):
        if is_mask:
            require(found.any(), fault(method, "queries", "chose no text token"))
        else:
            error = fault(method, "queries", f"returned an index beyond the {len(text)} text tokens")
            require(((found >= 0) & (found < len(text))).all(), error)
    return found


def choose(method: Method, tokens: LayerTokens, cut: Cut, stage: Stage) -> Selection:
    """`Method.choose`: `cut.keep` of the tokens that are left."""

    def given() -> list[Tensor]:
        seen = [tokens.hidden, tokens.eligible, *tokens.earlier.values()]
        return seen if tokens.vision is None else [*seen, tokens.vision.projected, *tokens.vision.signals.values()]

    with unchanged(method, given, stage), deferred() as settle:
        with _calling(method, "choose"):
            selection = method.choose(tokens, cut)
        _check_shapes(method, "choose", selection, tokens.hidden)
        if selection.kept != cut.keep:
            problem = f"kept {selection.kept} of {tokens.image_id}, and `cuts` announced {cut.keep}"
            raise fault(method, "choose", problem)
        with stage(CHECK):
            _check_values(method, "choose", selection, tokens.eligible)
            settle()
    return selection


def fault(method: Method, hook: str, problem: str) -> MethodFaultError:
    """The error for a hook that does not do what it must."""
    return MethodFaultError(f"{type(method).__name__}.{hook} {problem}", package_of(type(method)))


@contextmanager
def _calling(method: Method, hook: str) -> Iterator[None]:
    """What a hook prints goes to standard error, and what it raises becomes one line that names the place."""
    try:
        with isolated():
            yield
    except (MMTokError, KeyboardInterrupt):
        raise
    except GlobalStateError as error:
        raise fault(method, hook, str(error)) from error
    except BaseException as error:  # SystemExit as well
        if is_out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(sys.modules.get(type(method).__module__), "__file__", None)
        frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise fault(method, hook, f"failed: {type(error).__name__}: {first_line(error)} ({where})") from error


def _require_one_each(method: Method, hook: str, selections: Any, count: int, what: str) -> None:
    """Check that a hook returned a list with one selection for each image or crop."""
    if not isinstance(selections, (list, tuple)) or len(selections) != count:
        raise fault(method, hook, f"must return a list of {count} selections, one for each {what}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_cut(value: Any) -> bool:
    return (
        isinstance(value, Cut)
        and _is_int(value.before)
        and _is_int(value.keep)
        and (value.reads is None or _is_int(value.reads))
        and value.rows in get_args(Rows)
        and isinstance(value.earlier, tuple)
        and all(_is_int(layer) for layer in value.earlier)
    )


def _check_shapes(method: Method, hook: str, selection: Selection, rows: Tensor) -> None:
    """Check what is known without reading values from the device. rows: [tokens, dim], what is chosen from."""
    if not isinstance(selection, Selection):
        raise fault(method, hook, f"must return a Selection, not {type(selection).__name__}")
    kept = selection.indices
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.ndim != 1 or kept.layout != torch.strided:
        raise fault(method, hook, f"must return indices as an int64 tensor [kept], not {_described(kept)}")
    for name in ("indices", "order", "gains", "tokens", "merged"):
        value = getattr(selection, name)
        if value is None:
            continue
        shape = (selection.kept, rows.shape[1]) if name == "tokens" else (selection.kept,)
        if not isinstance(value, Tensor) or value.shape != shape:
            raise fault(method, hook, f"must return {name} of shape {list(shape)}, not {_described(value)}")
        if value.layout != torch.strided or value.requires_grad:
            raise fault(method, hook, f"must return {name} as a dense tensor without gradients")
        if value.device != rows.device:
            raise fault(method, hook, f"returned {name} on {value.device}, and the tokens are on {rows.device}")
    if selection.merged is not None and selection.merged.dtype != torch.bool:
        raise fault(method, hook, f"must return merged as booleans, not {selection.merged.dtype}")
    if selection.order is not None and selection.order.dtype != torch.int64:
        raise fault(method, hook, f"must return order as int64, not {selection.order.dtype}")
    if selection.tokens is not None and not selection.tokens.is_floating_point():
        raise fault(method, hook, f"must return tokens of a floating-point type, not {selection.tokens.dtype}")


def _check_values(method: Method, hook: str, selection: Selection, eligible: Tensor) -> None:
    """Require of indices and merged rows what every method must keep to. eligible: [tokens]."""
    indices, total = selection.indices, len(eligible)
    if not len(indices):
        return
    rising = indices if selection.merged is None else indices.sort().values
    steps = rising[1:] - rising[:-1]
    inside = (indices >= 0) & (indices < total)
    lowest = 0 if selection.tokens is None else PADDING
    own = inside if selection.merged is None else inside & ~selection.merged
    shown = eligible[indices.clamp(0, total - 1)]
    facts = {
        f"returned an index outside of the image's {total} tokens": ((indices >= lowest) & (indices < total)).all(),
        "returned a token twice": ((steps != 0) | (rising[1:] < 0)).all(),
        "returned indices that do not ascend: sort them first": (steps >= 0).all(),
        # The first of several cuts may keep more tokens than are eligible.
        "kept padding: choose among the tokens that are eligible": (
            (shown | ~own).all() | (shown.sum() == eligible.sum())
        ),
    }
    if selection.order is not None:
        facts["returned an order of other tokens than its indices"] = (
            selection.order.sort().values == indices.sort().values
        ).all()
    if selection.tokens is not None:
        facts["returned tokens that are not finite"] = selection.tokens.isfinite().all()
    for problem, holds in facts.items():
        require(holds, fault(method, hook, problem))


def _shown(value: Any) -> str:
    """The value in a few words, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:
        return type(value).__name__


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
