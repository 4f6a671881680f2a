"""The checks that every reduction method must pass, for methods of other packages as well.

With pytest, one test for each check, family and track:

    from mmtok_cli.methods.testing import MethodTests

    class TestUnlike(MethodTests):
        method = Unlike(pivots=2)

Without it, `check_method(Unlike(pivots=2))` raises AssertionError with what is wrong. The models are tiny, built from
configurations with random weights; nothing is downloaded. Their language models have four decoder layers, so set
parameters that name layers to values that fit: cuts can be before layer 1, 2 or 3.

A method with `needs_video` is given videos of changing blocks, on the families that see videos; its budget is about a
third of their tokens.

The checks: identity at the full budget, the exact number of tokens, their order without duplicates, no padding, batches
equal single samples, nested picks where the method says so, bfloat16, the same choice every time, the model left as it
was, and tokens removed inside the language model equal tokens masked there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import plan_images
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.declaration import declaration_fault
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.tiny import tiny_families, tiny_model
from mmtok_cli.pipeline import Answers, Encoded, answer, inside, prepare, reduce, reduce_encoded
from mmtok_cli.rules import Rules, Track
from mmtok_cli.video import Video

BUDGET = Budget(count=8)
CROPPED = ("llava_next", "llava_onevision")  # families whose images are cut into crops with padding
EVERYTHING = Budget(percent=100)
TRACKS: tuple[Track, ...] = get_args(Track)
Check = Callable[[Method, VisionLanguageModel, Track], None]


class NotOfferedError(Exception):
    """The method reads what the family does not offer, so that there is nothing to check."""


class MethodTests:
    """Subclass it in a test file, set `method`, and pytest runs every check on every family and track.

    A family that does not offer what the method reads, a signal or videos, is skipped.
    """

    method: ClassVar[Method]

    def method_for(self, family: str) -> Method:
        """The method to check on a family; override it where families need different parameters."""
        return self.method

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "check" in metafunc.fixturenames:
            metafunc.parametrize("check,family,track", list(product(CHECKS, tiny_families(), TRACKS)))

    def test_declaration(self) -> None:
        check_declaration(self.method)

    def test_method(self, check: str, family: str, track: Track) -> None:
        import pytest

        try:
            CHECKS[check](self.method_for(family), shared_model(family), track)
        except NotOfferedError as error:
            pytest.skip(str(error))
        except (AssertionError, MMTokError) as error:
            pytest.fail(_with_hint(error), pytrace=False)


def check_method(method: Method, families: Sequence[str] | None = None) -> list[str]:
    """Run every check on tiny models of the families, of all by default.

    Returns those that do not offer what the method reads. Raises AssertionError naming the check and the family.
    """
    check_declaration(method)
    left_out = []
    for family in tiny_families() if families is None else families:
        try:
            for name, track in product(CHECKS, TRACKS):
                try:
                    CHECKS[name](method, shared_model(family), track)
                except (AssertionError, MMTokError) as error:
                    raise AssertionError(f"{name} on {family}, {track} track: {_with_hint(error)}") from error
        except NotOfferedError:
            left_out.append(family)
    return left_out


def _with_hint(error: AssertionError | MMTokError) -> str:
    return f"{error}\nhint: {error.hint}" if isinstance(error, MMTokError) and error.hint else str(error)


def check_declaration(method: Method) -> None:
    """The class is a frozen dataclass with a summary, a docstring and parameters that the command line can set."""
    assert not isinstance(method, type), f"pass an instance: {getattr(method, '__name__', method)}()"
    fault = declaration_fault(type(method))
    assert fault is None, fault
    known = {signal for family in tiny_families() for signal in shared_model(family).signals}
    unknown = {name for names in (method.signals, *method.alternative_signals) for name in names} - known
    assert not unknown, f"no family offers {', '.join(sorted(unknown))}; signals are {', '.join(sorted(known))}"
    hash(method)  # cases are kept in sets: a parameter that is a list has to be a tuple


def check_full_budget(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """A budget of all tokens gives exactly what the unreduced model gives, whatever the shape of the image."""
    if not method.takes_budget:
        return
    from mmtok_cli.methods.full import Full

    for sample in _given(method, model)[0]:
        reduced = _answer(model, method, [sample], track, EVERYTHING)
        whole = _answer(model, Full(), [sample], track, None)
        tokens = reduced.reduced.tokens[0]
        assert tokens.kept == tokens.total, f"{tokens.kept} of {tokens.total} tokens are kept at 100%"
        assert torch.equal(reduced.first_logits, whole.first_logits), "logits differ from the unreduced model's"


def check_count(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """As many tokens are kept as the budget says. Their order and range are checked in every run."""
    batch, given = _given(method, model)
    answers = _answer(model, method, batch, track, given)
    for sample, selection, tokens in zip(batch, answers.selections, answers.reduced.tokens, strict=True):
        assert tokens.kept == selection.kept
        if method.takes_budget:  # an encoder of native resolution meets a budget from below
            budget = model.keep(sample.images[0], given, track)
            lowest = budget if method.exact else 0.85 * budget
            if type(method).keep_slices is not Method.keep_slices:  # as many whole slices as fit
                lowest = budget - model.total(sample.images[0]) // model.slices(sample.images[0]) + 1
            assert lowest <= selection.kept <= budget, f"{selection.kept} tokens are kept at a budget of {budget}"


def check_padding(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """No token is kept that shows nothing but padding, unless the authors' code keeps it."""
    if not method.takes_budget or (track == "released" and (method.keeps_padding or model.family in CROPPED)):
        return  # no release leaves out the padding of crops
    batch, budget = _given(method, model)
    answers = _answer(model, method, batch, track, budget)
    prompt = answers.reduced.prompt
    for image, grid, selection in zip(prompt.images, prompt.grids, answers.selections, strict=True):
        shown = {  # tokens whose patch covers some of the image; those at the ends of lines have no patch
            token
            for panel in model.panels(image, grid)
            for token, (left, top, right, bottom) in zip(panel.tokens, panel.boxes, strict=True)
            if left < image.width and top < image.height and right > 0 and bottom > 0
        }
        padding = set(selection.places.tolist()) - shown
        assert not padding, "padding is kept: choose among vision.eligible, as `highest` and `ranking` do"


def check_batch(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """A sample is reduced and answered in a batch as it is alone."""
    batch, budget = _given(method, model)
    together = _answer(model, method, batch, track, budget, new_tokens=3)
    for i, sample in enumerate(batch):
        alone = _answer(model, method, [sample], track, budget, new_tokens=3)
        assert together.selections[i].indices.equal(alone.selections[0].indices), "other tokens are kept in a batch"
        torch.testing.assert_close(together.first_logits[i], alone.first_logits[0], atol=5e-5, rtol=1e-5)


def check_repeatable(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """The same tokens are kept every time, whatever the state of the random generators."""
    batch, budget = _given(method, model)
    chosen = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            chosen.append(_answer(model, method, batch, track, budget).selections)
    same = all(a.indices.equal(b.indices) for a, b in zip(*chosen, strict=True))
    assert same, "the choice changes: draw with `random_scores`, or a generator seeded with vision.image_id"


def check_nested(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """A method that says it is nested picks at a smaller budget what it picks first at a larger one."""
    if not method.nested:
        return
    (batch, given), rules = _given(method, model), Rules(track)
    large, small = Budget(count=2 * (given.count or 0)), Budget(count=(given.count or 0) - 1)
    images = [image for sample in batch for image in sample.images]
    with _signals(model):
        plans = [plan_images(model, method, images, budget, rules) for budget in (large, small)]
        prompt = prepare(model, batch, plans[0])
        vision = model.encode(prompt, method.signals_among(model.signals))
        encoded = Encoded(prompt, vision, picks={})
        kept = [reduce_encoded(model, method, encoded, plan, rules).selections for plan in plans]
        afresh = reduce_encoded(model, method, Encoded(prompt, vision), plans[1], rules).selections
    assert encoded.picks, "nested methods must return Selection.order"
    same = all(a.indices.equal(b.indices) for a, b in zip(kept[1], afresh, strict=True))
    assert same, "nested is True, but other tokens are picked at a smaller budget"


def check_narrow_dtype(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """The method works on a model in bfloat16."""
    narrow = shared_model(model.family, torch.bfloat16)
    batch, budget = _given(method, model)
    answers = _answer(narrow, method, batch, track, budget)
    counts = [tokens.kept for tokens in answers.reduced.tokens]
    assert counts == [tokens.kept for tokens in _answer(model, method, batch, track, budget).reduced.tokens]
    assert bool(answers.first_logits.isfinite().all()), "logits in bfloat16 are not finite"


def check_model_unchanged(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """Afterwards the model answers as before, bit by bit, and has no hook more."""
    from mmtok_cli.methods.full import Full

    batch, budget = _given(method, model)

    def state() -> tuple[Tensor, int]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())
        return _answer(model, Full(), batch, track, None).first_logits, hooks

    logits, hooks = state()
    _answer(model, method, batch, track, budget)
    logits_after, hooks_after = state()
    assert torch.equal(logits, logits_after), "the unreduced model answers differently afterwards"
    assert hooks == hooks_after, "hooks are left on the model"


@torch.inference_mode()
def check_removed_equals_masked(method: Method, model: VisionLanguageModel, track: Track) -> None:
    """Dropping tokens inside the language model equals hiding them from all others with an attention mask."""
    if not method.cuts(36, 8, model.layer_count) or model.linear_layers:
        return  # linear attention sees no token that is masked, but still sees where it stood
    if method.selects() and model.family in CROPPED and track == "released":
        return  # padding of crops may enter, which has no position to keep
    (batch, budget), rules = _given(method, model), Rules(track, positions="keep")
    with _signals(model):
        reduced = reduce(model, method, batch[1:2], budget, rules=rules)
    (image,) = reduced.cuts
    ids = reduced.inputs["input_ids"]
    ((_, places),) = model.image_places(ids, reduced.vision, [selection.kept for selection in reduced.selections])
    survivors = {}
    for number, cut in enumerate(image.cuts):
        up_to = replace(reduced, cuts=[replace(image, cuts=image.cuts[: number + 1])])
        with inside(model, up_to) as watched:
            found, _ = hf.forward(model.model, reduced.inputs)
        selection = watched.selections[0] if watched else None
        assert selection is not None and len(selection.indices) == cut.keep
        if selection.merged is not None and bool(selection.merged.any()):
            return  # merged tokens have no masked counterpart
        survivors[cut.before] = torch.ones(ids.shape[1], dtype=torch.bool)
        survivors[cut.before][places] = False
        survivors[cut.before][places[selection.indices]] = True
    with _masked(model, survivors):
        expected, _ = hf.forward(model.model, reduced.inputs)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


CHECKS: dict[str, Check] = {
    "full_budget": check_full_budget,
    "count": check_count,
    "padding": check_padding,
    "repeatable": check_repeatable,
    "batch": check_batch,
    "nested": check_nested,
    "narrow_dtype": check_narrow_dtype,
    "model_unchanged": check_model_unchanged,
    "removed_equals_masked": check_removed_equals_masked,
}


@cache
def shared_model(family: str, dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    """The tiny model of a family, built once."""
    return tiny_model(family, dtype)


@cache
def samples() -> tuple[Sample, ...]:
    """A square, a wide and a tall image of coloured blocks, with questions of different lengths."""
    sizes = ((168, 168), (220, 130), (130, 200))
    questions = ("Is there a red circle in the image?", "What digit is on the blue square?", "How many stars?")
    made = []
    for number, ((width, height), question) in enumerate(zip(sizes, questions, strict=True)):
        draw = np.random.default_rng(number)
        blocks = draw.integers(0, 256, (height // 7, width // 7, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        made.append(Sample((image,), question, (f"picture-{number}",)))
    return tuple(made)


@cache
def videos() -> tuple[Sample, ...]:
    """A square, a wide and a tall video of blocks that change, with questions of different lengths."""
    made = []
    for number, (still, frames) in enumerate(zip(samples(), (6, 8, 7), strict=True)):
        (image,) = still.images
        draw, blocks = np.random.default_rng(number), np.asarray(image, dtype=np.float32)
        changes = draw.uniform(-60, 60, (frames, *blocks.shape[:2], 1))
        pictures = tuple(Image.fromarray((blocks + each).clip(0, 255).astype(np.uint8)) for each in changes)
        video = Video.of(pictures, tuple(map(float, range(frames))), 1.0)
        made.append(Sample((video,), still.question, (f"video-{number}",)))
    return tuple(made)


def _given(method: Method, model: VisionLanguageModel) -> tuple[tuple[Sample, ...], Budget]:
    """What a method is checked with on a model, and its budget. Raises NotOfferedError for a model without videos."""
    if not method.needs_video:
        return samples(), BUDGET
    if not model.sees_videos:
        raise NotOfferedError(f"{model.family}: sees no videos")
    seen = [sample.images[0] for sample in videos()]
    slices = [model.total(video) // model.slices(video) for video in seen]
    return videos(), Budget(count=max(min(map(model.total, seen)) // 3, *slices))


def _answer(
    model: VisionLanguageModel,
    method: Method,
    batch: Sequence[Sample],
    track: Track,
    budget: Budget | None,
    new_tokens: int = 1,
) -> Answers:
    with _signals(model):
        return answer(model, method, batch, budget, rules=Rules(track), max_new_tokens=new_tokens)


@contextmanager
def _signals(model: VisionLanguageModel) -> Iterator[None]:
    """Raise NotOfferedError in place of the error for what the family lacks: a signal, the attention of a layer, or a
    video without text between its frames."""
    try:
        yield
    except MMTokError as error:
        lacking = "does not offer", "text tower", "linear attention", "has text between the frames"
        if any(words in error.message for words in lacking):
            raise NotOfferedError(f"{model.family}: {error.message}") from error
        raise


@contextmanager
def _masked(model: VisionLanguageModel, survivors: dict[int, Tensor]) -> Iterator[None]:
    """From each layer of `survivors` on, hide the other tokens of the prompt [tokens] from all but themselves."""

    def hide(survive: Tensor) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            width = len(survive)
            visible = (torch.ones(width, width, dtype=torch.bool).tril() & survive) | torch.eye(width, dtype=torch.bool)
            mask = torch.zeros(width, width).masked_fill(~visible, torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": mask[None, None]}

        return hook

    handles = []
    for number, layer in enumerate(hf.decoder_layers(hf.language_model(model.model))):
        before = [cut for cut in survivors if cut <= number]
        if before:
            handles.append(layer.register_forward_pre_hook(hide(survivors[max(before)]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
