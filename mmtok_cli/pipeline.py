"""Where a model and a method meet: sample -> prepare -> encode -> select -> prefill -> decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmtok_cli import hooks
from mmtok_cli.budget import Budget, TokenCounts, UnmetBudgetError
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import cache_bytes, decode, prefill, require_finite
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import ImagePlan, cuts_of, layer_average, plan_images, planned_cuts
from mmtok_cli.image_scale import encoded_grids
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Grid, Prompt, VisionLanguageModel, without_values
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage
from mmtok_cli.rules import AUTO, ImageScale, Positions, Rules, Track
from mmtok_cli.stages import CHECK, Stage, unwatched
from mmtok_cli.tokens import Crops, Cut, Selection, TextTokens, VisionTokens, all_eligible
from mmtok_cli.values import deferred, mirrored, on_host
from mmtok_cli.video import Visual

RELEASED = Rules()


@dataclass(frozen=True)
class ReducedImage:
    """One image on its way into the language model.

    plan: its `keep` is lower than planned where fewer tokens are eligible. vision: its encoded tokens. eligible:
    [tokens], those that the method may keep under the rules in force.
    selection: what enters the language model. cuts: where the image is cut down further inside it.
    """

    plan: ImagePlan
    vision: VisionTokens
    eligible: Tensor
    selection: Selection
    cuts: tuple[Cut, ...]

    @property
    def kept(self) -> int:
        """Vision tokens after the last reduction."""
        return self.cuts[-1].keep if self.cuts else self.selection.kept

    @property
    def short(self) -> bool:
        """Whether the budget is not met. A smaller image may have a few less than planned."""
        less = self.kept < self.plan.keep < self.plan.total and self.plan.grid is None
        return self.plan.short or less


@dataclass(frozen=True)
class Encoded:
    """Encoded images, from which several methods and budgets may select.

    prompt: with placeholders for all vision tokens. vision: the tokens of each image, in the prompt's order. picks: the
    selections of nested methods at the largest budget so far, by method, image and crop; None where they are not kept.
    """

    prompt: Prompt
    vision: list[VisionTokens]
    picks: dict[tuple[Method, int, int], Selection] | None = None


@dataclass(frozen=True)
class Reduced:
    """A prompt on its way into the language model.

    images: in the prompt's order. inputs: arguments of the model's forward. cuts: what `inside` needs of each image;
    empty if none is cut inside the language model. tokens: one for each sample.
    """

    prompt: Prompt
    images: list[ReducedImage]
    inputs: dict[str, Any]
    cuts: list[CutImage]
    positions: Positions
    tokens: list[TokenCounts]

    @property
    def vision(self) -> list[VisionTokens]:
        return [image.vision for image in self.images]

    @property
    def selections(self) -> list[Selection]:
        """What entered the language model of each image."""
        return [image.selection for image in self.images]

    def without_encodings(self) -> Reduced:
        """The same without pixels and encoder outputs, whose memory is then free.

        What enters the language model is kept, and what methods that act inside it may read of an image.
        """
        images = []
        for image in self.images:
            seen = image.vision
            bare = replace(without_values(seen.eligible, seen.grid), image_id=seen.image_id, slices=seen.slices)
            images.append(replace(image, vision=bare))
        return replace(self, prompt=replace(self.prompt, pixel_values=()), images=images, cuts=[*self.cuts])


@dataclass(frozen=True)
class Answers:
    """A model's answers to a batch of samples.

    texts: one for each sample. token_ids: [batch, steps], padded after the end of each answer. first_logits: [batch,
    vocabulary], those of the first new token. kv_cache_bytes: the keys and values of all layers after the last token.
    selections: what was kept of each image after the last reduction. missing_kv_cache_bytes: the part of
    `kv_cache_bytes` that belongs to layers that were not run. drafts: first answers that the method read.
    """

    texts: list[str]
    token_ids: Tensor
    first_logits: Tensor
    kv_cache_bytes: int
    selections: list[Selection]
    reduced: Reduced
    missing_kv_cache_bytes: int
    drafts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SelectionTask:
    """One image, or one crop of it, of which a method keeps `budget` tokens."""

    vision: VisionTokens
    text: TextTokens
    budget: int


@torch.inference_mode()
def reduce(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    rules: Rules = RELEASED,
    stage: Stage = unwatched,
    grids: Sequence[Grid] | None = None,
    drafts: Sequence[str] = (),
    image_scale: ImageScale = 1,
) -> Reduced:
    """Encode the samples' images and keep the vision tokens that the method chooses before the language model.

    budget: may be None for methods that take none. An image that cannot meet it, because it has fewer tokens or fewer
    that are not padding, is reduced as far as possible. grids: one for each image, in place of the model's own choice;
    a budget is then one of the grid's tokens. drafts: one for each sample, which methods read behind the question; the
    model does not. image_scale: the method selects from smaller versions of the images (see image_scale.py), and a
    budget is one of the tokens at their own size. Tokens that the method drops inside the language model are dropped by
    the forward pass within `inside`. Raises MMTokError where the method cannot be followed, and MethodFaultError where
    it does not do what a method must.
    """
    _positions(model, method, rules)
    smaller = encoded_grids(model, images_of(samples), image_scale, stage)
    with stage("prepare"):
        plans = plan_images(model, method, images_of(samples), budget, rules, grids, smaller=smaller)
        prompt = prepare(model, samples, plans)
        if drafts:
            pairs = zip(prompt.questions, drafts, strict=True)
            prompt = replace(
                prompt,
                questions=tuple(f"{question} {draft}".strip() if draft else question for question, draft in pairs),
            )
    with stage("encode"):
        vision = model.encode(prompt, method.signals_among(model.signals), stage=stage)
    return reduce_encoded(model, method, Encoded(prompt, vision), plans, rules, stage)


def images_of(samples: Sequence[Sample]) -> list[Visual]:
    """The images and videos of all samples, in the order of the prompts."""
    return [image for sample in samples for image in sample.images]


def prepare(model: VisionLanguageModel, samples: Sequence[Sample], plans: Sequence[ImagePlan]) -> Prompt:
    """The prompt of a batch of samples, whose images are encoded at the grids of their plans."""
    left = iter(plans)
    images = [
        [image if (plan := next(left)).slices is None else model.shortened(image, plan.slices) for image in s.images]
        for s in samples
    ]
    return model.prepare(
        [sample.question for sample in samples],
        images,
        [sample.image_ids for sample in samples],
        [plan.grid for plan in plans],
    )


@torch.inference_mode()
def reduce_encoded(
    model: VisionLanguageModel,
    method: Method,
    encoded: Encoded,
    plans: Sequence[ImagePlan],
    rules: Rules = RELEASED,
    stage: Stage = unwatched,
    earlier: Sequence[Selection] = (),
) -> Reduced:
    """Keep the vision tokens that the method chooses of encoded images. plans: of each image, for this method.

    earlier: what is kept of each image in any case, beside the choice.
    """
    prompt, positions = encoded.prompt, _positions(model, method, rules)
    images = _reduce_images(model, method, encoded, plans, rules, stage)
    with stage("select"), deferred() as settle:
        if earlier:
            images = [
                replace(image, selection=before.united(image.selection, image.vision))
                for image, before in zip(images, earlier, strict=True)
            ]
        inputs = model.assemble(prompt, encoded.vision, [image.selection for image in images], positions)
        cuts = _cut_images(model, method, images, inputs)
        tokens = _count_tokens(prompt, images, inputs, model.layer_count)
        with stage(CHECK):
            settle()
    return Reduced(prompt, images, inputs, cuts, positions, tokens)


def check_budget(
    model: VisionLanguageModel,
    method: Method,
    samples: Iterable[Sample],
    budget: Budget | None,
    rules: Rules = RELEASED,
    grids: Sequence[Grid] | None = None,
    image_scale: ImageScale = 1,
) -> None:
    """Refuse a budget that none of the samples can meet, before anything is encoded.

    Samples are read one by one until one can meet it. Neither padding nor sizes that images choose are known yet.
    Raises UnmetBudgetError, or MMTokError for a method that cannot be followed on the model.
    """
    fixed = 1 if image_scale == AUTO else image_scale
    unmet: UnmetBudgetError | None = None
    for sample in samples:
        try:
            smaller = encoded_grids(model, sample.images, fixed)
            for plan in plan_images(model, method, sample.images, budget, rules, grids, smaller=smaller, strict=True):
                if planned_cuts(method, plan, model):
                    model.require_hooks()
        except UnmetBudgetError as error:
            unmet = unmet or error
        else:
            return
    if unmet:
        raise unmet


def check_sample(model: VisionLanguageModel, sample: Sample, max_new_tokens: int, *, ignore_eos: bool = False) -> None:
    """Refuse a sample that the unreduced model cannot read. Raises MMTokError.

    Its image may have a shape that the model cannot see, its question too many markers, or the prompt may be too long.
    """
    tokens = model.tokenize([sample.question], [sample.images], [None] * len(sample.images))
    require_room(model, tokens["input_ids"].shape[1], max_new_tokens, ignore_eos=ignore_eos)


def require_room(model: VisionLanguageModel, length: int, max_new_tokens: int, *, ignore_eos: bool = False) -> None:
    """Refuse a prompt of `length` tokens that does not fit into the context with its answer. Raises MMTokError."""
    if length + max_new_tokens > model.context_length:
        too_long, lower = "does not fit", "--budget"
        if ignore_eos:
            too_long, lower = f"and {max_new_tokens} new ones do not fit", "--prompt-tokens, --new-tokens or --budget"
        elif max_new_tokens:
            too_long, lower = f"and an answer of up to {max_new_tokens} do not fit", "--budget or --max-new-tokens"
        raise MMTokError(
            f"the prompt of {length} tokens {too_long} into the {model.context_length} tokens that {model.name} "
            "can read",
            f"shorten the question, or lower {lower}",
        )


def inside(
    model: VisionLanguageModel, reduced: Reduced, *, stage: Stage = unwatched
) -> AbstractContextManager[Inside | None]:
    """The context within which forward passes and `generate` must run on a reduced prompt.

    Time spent on choosing tokens inside the language model is spent in `stage("select")`. The context's value is None
    where the method makes no cut there. Use it within `torch.inference_mode()` or `torch.no_grad()`.
    """
    if not reduced.cuts:
        return nullcontext()
    return model.inside(reduced.inputs["attention_mask"], reduced.cuts, reduced.positions, stage)


@torch.inference_mode()
def answer(
    model: VisionLanguageModel,
    method: Method,
    samples: Sequence[Sample],
    budget: Budget | None,
    *,
    rules: Rules = RELEASED,
    max_new_tokens: int = 32,
    ignore_eos: bool = False,
    stage: Stage = unwatched,
    drafts: Sequence[str] = (),
    image_scale: ImageScale = 1,
    encodings: bool = True,
) -> Answers:
    """Answer a batch of questions greedily from reduced images. drafts, image_scale: see `reduce`.

    encodings: whether the result holds pixels and encoder outputs; otherwise their memory is free before prefill, or,
    where cuts inside the language model may read them, after it.
    ignore_eos: every answer has exactly `max_new_tokens` tokens; those that end an answer do not.
    Raises MMTokError where a budget cannot be met or the prompt is longer than the model can read.
    """
    reduced = reduce(model, method, samples, budget, rules=rules, stage=stage, drafts=drafts, image_scale=image_scale)
    if not encodings:
        reduced = reduced.without_encodings()
    answers = answer_reduced(model, reduced, max_new_tokens, stage, ignore_eos=ignore_eos, encodings=encodings)
    return replace(answers, drafts=tuple(drafts))


@torch.inference_mode()
def answer_reduced(
    model: VisionLanguageModel,
    reduced: Reduced,
    max_new_tokens: int,
    stage: Stage = unwatched,
    *,
    ignore_eos: bool = False,
    encodings: bool = True,
) -> Answers:
    """Answer a reduced prompt greedily. encodings: False takes from its cuts what they hold of the encoder, in the end.

    Raises MMTokError where the prompt is longer than the model can read.
    """
    require_room(model, reduced.inputs["input_ids"].shape[1], max_new_tokens, ignore_eos=ignore_eos)
    with stage("select"):
        context = inside(model, reduced, stage=stage)
    with context as cut:
        with stage("prefill"):
            first_logits, cache = prefill(model, reduced.inputs)
            if not encodings:
                reduced.cuts[:] = [replace(each, vision=None) for each in reduced.cuts]  # the context's own list
            with stage(CHECK):
                require_finite(model, first_logits)
        with stage("decode"):
            token_ids = decode(model, reduced.inputs, first_logits, cache, max_new_tokens, ignore_eos=ignore_eos)
            texts = [text.strip() for text in model.tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
            with stage(CHECK):
                selections = _left(reduced.selections, cut)
    kv_cache = cache_bytes(cache, model.layer_count - model.loaded_layers, model.layer_group)
    missing_kv_cache = kv_cache - cache_bytes(cache)
    return Answers(texts, token_ids, first_logits, kv_cache, selections, reduced, missing_kv_cache)


def _left(entered: Sequence[Selection], cut: Inside | None) -> list[Selection]:
    """What is left of each image after the last reduction, by places in the image."""
    if cut is None:
        return list(entered)
    pairs = zip(entered, cut.selections, strict=True)  # those of the latter count the tokens that entered
    return [Selection(before.indices[left.indices], merged=left.merged) for before, left in pairs]


def _positions(model: VisionLanguageModel, method: Method, rules: Rules) -> Positions:
    """The position policy of a method on a model. Raises MMTokError for one that the model cannot follow."""
    if rules.positions is None:
        usual = model.positions[0] if rules.track == "harmonised" else method.positions
        return usual if usual in model.positions else model.positions[0]
    if rules.positions not in model.positions:
        raise MMTokError(
            f"positions of the {model.family} family cannot be renumbered: they encode image coordinates",
            "use --positions keep",
        )
    return rules.positions


def _reduce_images(
    model: VisionLanguageModel,
    method: Method,
    encoded: Encoded,
    plans: Sequence[ImagePlan],
    rules: Rules,
    stage: Stage,
) -> list[ReducedImage]:
    """What the method keeps of each image before the language model, and its cuts there."""
    vision = encoded.vision
    with stage("select"):
        texts = model.text_tokens(encoded.prompt, rules.track)
    plans, tasks = selection_tasks(method, vision, texts, plans, rules, stage)
    images = []
    selections = select(method, tasks, stage, encoded.picks)
    for plan, tokens, task, kept in zip(plans, vision, tasks, selections, strict=True):
        cuts = cuts_of(method, kept.kept, min(plan.keep, kept.kept), model)
        image = ReducedImage(plan, tokens, task.vision.eligible, kept, cuts)
        hook = "select" if type(method).cuts is Method.cuts else "cuts"
        hooks.check_kept(method, image.kept, plan.keep, tokens, hook)
        images.append(image)
    return images


def selection_tasks(
    method: Method,
    vision: Sequence[VisionTokens],
    texts: Sequence[TextTokens],
    plans: Sequence[ImagePlan],
    rules: Rules,
    stage: Stage = unwatched,
) -> tuple[list[ImagePlan], list[SelectionTask]]:
    """What `select` is to keep of each image, and the plans, which ask for no more tokens than are eligible."""
    with stage("select"):
        if rules.budget_per == "frame":
            vision = [_in_slices(tokens, method) for tokens in vision]
        seen = [_as_seen(tokens, method, rules.track) for tokens in vision]
        reachable = [_within_reach(plan, tokens, method) for plan, tokens in zip(plans, seen, strict=True)]
        return reachable, [
            SelectionTask(tokens, text, _entering(method, plan, tokens))
            for plan, tokens, text in zip(reachable, seen, texts, strict=True)
        ]


def _within_reach(plan: ImagePlan, seen: VisionTokens, method: Method) -> ImagePlan:
    """The plan of an image that was encoded at its own size: unless all are kept, no more tokens than are eligible."""
    if plan.keep == plan.total or plan.grid:
        return plan
    eligible = _eligible(seen, method)
    return plan if plan.keep <= eligible else replace(plan, keep=eligible, short=True)


def _entering(method: Method, plan: ImagePlan, seen: VisionTokens) -> int:
    """How many tokens of an image `select` keeps. A smaller image may have fewer tokens than the budget."""
    keep = min(plan.keep, seen.total)
    tokens = hooks.entering(method, seen.total, keep)
    return min(tokens, _eligible(seen, method)) if keep < tokens < seen.total else tokens


def _eligible(seen: VisionTokens, method: Method) -> int:
    """How many tokens of an image the method may keep."""
    parts = seen.crops.tokens if seen.crops and method.per_crop else (seen,)
    return sum(part.eligible_count for part in parts)


def select(
    method: Method,
    tasks: Sequence[SelectionTask],
    stage: Stage = unwatched,
    picks: dict[tuple[Method, int, int], Selection] | None = None,
) -> list[Selection]:
    """What the method keeps of each image; crop by crop where the model cuts images and the method sees crops.

    Images of which everything is kept stay whole, with the line ends that no crop has. picks: as in Encoded.
    """
    in_crops = any(task.vision.crops and not task.vision.slices for task in tasks)
    if method.selects() and method.signals and not method.per_crop and in_crops:
        raise hooks.fault(
            method,
            "per_crop",
            "must be True: the method reads signals of the encoder, which this model has for each crop of an image",
        )
    joint = {number: task for number, task in enumerate(tasks) if _crops_are_joint(method, task)}
    together = {number: _select_crops(method, task, stage) for number, task in joint.items()}
    if len(together) == len(tasks):
        return [*together.values()]
    with stage("select"):
        parts = [[] if number in joint else _crop_tasks(method, task) for number, task in enumerate(tasks)]
        # A crop without a share of the budget is not shown to the method.
        shown: dict[tuple[int, int], SelectionTask] = {}
        for number, (task, crops) in enumerate(zip(tasks, parts, strict=True)):
            if number not in joint:
                places = enumerate(crops or [task])
                shown |= {(number, place): crop for place, crop in places if crop.budget or not crops}
    chosen, selections = iter(_select_shown(method, shown, stage, picks)), []
    with stage("select"):
        for number, (task, crops) in enumerate(zip(tasks, parts, strict=True)):
            if number in together:
                selections.append(together[number])
            elif task.vision.crops is None or not crops:
                selections.append(next(chosen))
            else:
                nothing = Selection(torch.empty(0, dtype=torch.int64, device=task.vision.projected.device))
                selections.append(task.vision.crops.join([next(chosen) if crop.budget else nothing for crop in crops]))
    return selections


def _select_shown(
    method: Method,
    shown: dict[tuple[int, int], SelectionTask],
    stage: Stage,
    picks: dict[tuple[Method, int, int], Selection] | None,
) -> list[Selection]:
    """What the method keeps of each image or crop, by the numbers of image and crop."""
    known = [picks.get((method, *place)) for place in shown] if picks else []
    if known and all(k and k.kept >= task.budget for k, task in zip(known, shown.values(), strict=True)):
        return [k.first(task.budget) for k, task in zip(known, shown.values(), strict=True) if k]
    tasks = list(shown.values())
    vision, budgets = [task.vision for task in tasks], [task.budget for task in tasks]

    def given() -> list[Tensor]:
        return [tensor for each in vision for tensor in (each.projected, each.eligible)]

    with stage("select"), hooks.unchanged(method, given, stage), deferred() as settle:
        selected = hooks.select(method, vision, [task.text for task in tasks], budgets)
        with stage(CHECK):
            hooks.check_selections(method, vision, budgets, selected)
            settle()
    if picks is not None and method.nested:
        found = zip(shown, selected, strict=True)
        picks |= {(method, *place): selection for place, selection in found if selection.order is not None}
    return selected


def _crops_are_joint(method: Method, task: SelectionTask) -> bool:
    """Whether the method chooses among all crops of the image at once."""
    overrides = type(method).select_crops is not Method.select_crops
    crops = method.per_crop and task.vision.crops is not None and not task.vision.slices
    return overrides and crops and task.budget < task.vision.total


def _select_crops(method: Method, task: SelectionTask, stage: Stage) -> Selection:
    crops = task.vision.crops
    assert crops is not None  # see `_crops_are_joint`

    def given() -> list[Tensor]:
        return [tensor for crop in crops.tokens for tensor in (crop.projected, crop.eligible)]

    with stage("select"):
        with hooks.unchanged(method, given, stage), deferred() as settle:
            chosen = hooks.select_crops(method, crops.tokens, task.text, task.budget)
            with stage(CHECK):
                hooks.check_selections(method, crops.tokens, [selection.kept for selection in chosen], chosen)
                settle()
        return crops.join(chosen)


def _crop_tasks(method: Method, task: SelectionTask) -> list[SelectionTask]:
    """One task for each crop, with its share of the budget; empty where the image is reduced as a whole."""
    crops, by_itself = task.vision.crops, method.per_crop or task.vision.slices
    if crops is None or not by_itself or task.budget == task.vision.total:
        return []
    parts = crops.tokens if task.vision.slices else hooks.across_crops(method, crops.tokens)
    seen = zip(parts, crops.split(task.budget), strict=True)
    return [SelectionTask(crop, task.text, share) for crop, share in seen]


def _in_slices(vision: VisionTokens, method: Method) -> VisionTokens:
    """The vision tokens of a video as if each of its slices in time was a crop; of an image, as they are.

    Raises MMTokError for a method that cannot reduce slices by themselves.
    """
    if not vision.slices:
        return vision
    if method.needs_video or type(method).cuts is not Method.cuts:
        why = "is for all frames of a video" if method.needs_video else "drops tokens inside the language model"
        raise MMTokError(
            f"{type(method).__name__} {why}, so it cannot reduce each frame by itself",
            "omit --budget-per frame, or use a method such as mmtok",
        )
    count = vision.total // vision.slices

    def part(number: int) -> VisionTokens:
        mine = slice(number * count, (number + 1) * count)
        return replace(
            vision,
            projected=vision.projected[mine],
            features=vision.features[mine],
            grid=(vision.grid[0] // vision.slices, vision.grid[1]),
            eligible=mirrored(on_host(vision.eligible)[mine], vision.projected.device),
            image_id=f"{vision.image_id}, slice {number}",
            signals={name: values[mine] for name, values in vision.signals.items()},
            deepstack=tuple(layer[mine] for layer in vision.deepstack),
            slices=0,
        )

    places = torch.arange(vision.total, device=vision.projected.device).view(vision.slices, count)
    return replace(vision, crops=Crops(tuple(map(part, range(vision.slices))), places, places))


def _as_seen(vision: VisionTokens, method: Method, track: Track) -> VisionTokens:
    """The vision tokens as the track shows them to the method."""
    if vision.crops and (method.per_crop or vision.slices):
        crops = [_as_seen(crop, method, track) for crop in vision.crops.tokens]
        if track == "released":  # no release leaves out the padding of crops
            whole = all_eligible(crops[0].total, crops[0].projected.device)
            crops = [replace(crop, eligible=whole) for crop in crops]
        return replace(vision, crops=replace(vision.crops, tokens=tuple(crops)))
    if track == "harmonised":
        signals = {name: signal.float() for name, signal in vision.signals.items()}
        return replace(vision, projected=vision.projected.float(), features=vision.features.float(), signals=signals)
    if method.keeps_padding:
        return replace(vision, eligible=all_eligible(vision.total, vision.projected.device))
    return vision


def _cut_images(
    model: VisionLanguageModel, method: Method, images: Sequence[ReducedImage], inputs: dict[str, Any]
) -> list[CutImage]:
    """What the context inside the language model needs of each image; nothing where no image is cut there."""
    if not any(image.cuts for image in images):
        return []
    vision, kept = [image.vision for image in images], [image.selection.kept for image in images]
    starts = model.image_starts(inputs["input_ids"], vision, kept)
    cut = []
    for (row, start), image in zip(starts, images, strict=True):
        seen, entered, eligible = image.vision, None, image.eligible
        if method.selects():
            entered = image.selection.indices
            eligible = eligible[entered] | (entered < 0)
        queries, choose = partial(hooks.queries, method), partial(hooks.choose, method)
        cut.append(CutImage(row, start, eligible, seen.image_id, image.cuts, queries, choose, seen, entered))
    return cut


def _count_tokens(
    prompt: Prompt, images: Sequence[ReducedImage], inputs: dict[str, Any], layers: int
) -> list[TokenCounts]:
    """The counts of each sample, over all its images."""
    counts = []
    for row, length in enumerate(on_host(inputs["attention_mask"]).sum(1).tolist()):
        mine = [image for image, owner in zip(images, prompt.owners, strict=True) if owner == row]
        counts.append(
            TokenCounts(
                total=sum(image.plan.total for image in mine),
                kept=sum(image.kept for image in mine),
                text=length - sum(image.selection.kept for image in mine),
                layer_average=sum(layer_average(image.selection.kept, image.cuts, layers) for image in mine),
                short=any(image.short for image in mine),
                encoded=_encoded(mine),
            )
        )
    return counts


def _encoded(images: Sequence[ReducedImage]) -> tuple[int, ...]:
    """Vision tokens of each image as it was encoded; nothing where all were encoded at their own size."""
    counts = tuple(image.vision.total for image in images)
    return () if counts == tuple(image.plan.total for image in images) else counts
