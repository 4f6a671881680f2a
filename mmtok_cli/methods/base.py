"""The base class of reduction methods.

How to write one
----------------

A method is a frozen dataclass, its fields are its parameters, and it overrides the hook of the place where it acts. It
works on tensors of one image and never sees the model:

    from dataclasses import dataclass
    from typing import ClassVar

    from mmtok_cli.methods.base import Method, attention_at, highest
    from mmtok_cli.tokens import Cut

    @dataclass(frozen=True)
    class LargestNorm(Method):
        '''Keeps the tokens of largest norm.'''      # printed by `mmtok methods largest-norm`

        summary: ClassVar[str] = "tokens of largest norm"   # printed by `mmtok methods`

        power: float = 2.0                                  # set by --set largest-norm.power=1

        def select(self, vision, text, budget):
            return highest(vision.projected.float().norm(p=self.power, dim=-1), vision.eligible, budget)

One that drops tokens inside the language model, before the decoder layer with index 2, by the attention that they
receive in the layer before:

    @dataclass(frozen=True)
    class AfterTwoLayers(Method):
        '''Keeps the tokens that the end of the prompt attends to most.'''

        summary: ClassVar[str] = "tokens attended to after two layers"

        def cuts(self, total, budget, layers):
            return (Cut(before=2, keep=budget, reads=1),) if budget < total else ()

        def choose(self, tokens, cut):
            return highest(attention_at(tokens).mean((0, 1)), tokens.eligible, cut.keep)

Hooks, in the order in which they are called
    resize    before the encoder: how many tokens a smaller version of the image has
    entering  for methods that override both `select` and `cuts`: how many tokens `select` leaves to the cuts
    select    between encoder and language model: `budget` of the image's tokens (see VisionTokens, TextTokens)
    cuts      inside the language model: before which decoder layers tokens are dropped, and how many stay (see Cut)
    queries   for cuts that read attention: the text tokens whose attention is read
    choose    at each cut: which tokens stay (see LayerTokens)
    `count` (how a percentage is rounded), `across_crops`, `select_crops`, `select_group` and `select_batch` are rarely
    needed.
    select and choose return a Selection: indices in ascending order, each once, exactly as many as asked for. What a
    hook returns is checked in every run, and whatever it raises is reported as the method's fault. Tensors that a hook
    is given must not be changed in place: rows of the method's own go into `Selection.tokens`.

What a method reads
    `vision.projected` and `vision.features` are always there. Name anything else in the class attribute `signals`; it
    is then computed and put into `vision.signals`. A family that does not offer a signal refuses the method.
    class_attention       [heads, tokens]    attention of the class token to each patch (encoders of CLIP, InternVL)
    class_feature         [vision dim]       the class token itself (encoders of CLIP)
    mean_keys             [tokens, head dim] keys of the encoder's attention, averaged over heads (all families)
    received_attention    [tokens]           attention that a patch receives in the same layer (all families)
    middle_attention      [tokens]           the same in a layer in the middle of the encoder (all families)
    clip_image_embeds     [tokens, clip dim] patches in the space of CLIP (LLaVA families with a known CLIP model)
    clip_text_embeds      [pieces, clip dim] the question there, one row for each piece that CLIP can read
    A cut inside the language model shows `tokens.hidden`, and the image as it left the encoder: `tokens.vision`, of
    which `tokens.places` are left. Anything else is named in the Cut and computed for it alone: the attention of a
    layer (`reads`), of the text tokens that `queries` chooses or on average over the prompt (`rows`), the layer's keys
    (`rows="none"` without its attention), and what earlier layers were called with (`earlier`).

Padding
    LLaVA-1.5 pads an image to a square. Tokens of padding are False in `vision.eligible` (and `tokens.eligible`) and
    must not be kept: rank with `highest` or `ranking`, which put them last. `budget` is never more than the number of
    eligible tokens. If everything is kept, `select` is not called.

Parameters
    Annotate each field: int, float, bool, str, a Literal, tuple[int, ...] (or of floats or str), or one of them or
    None. Values are converted and checked by the annotation. Check the range in `__post_init__` and raise ValueError
    (or MMTokError, to add a hint); either becomes one line and exit status 2. `require_layers` checks parameters that
    name decoder layers, within `cuts`: require_layers("after-two-layers.layer", (self.layer,), layers). A field
    `seed: int` receives --seed; `random_scores(self.seed, vision.image_id, vision.total)` draws from it such that an
    image is treated alike in every batch, in every process and on every device.

Extras
    `Selection.order` of `select` is the order of the picks, which `mmtok prune` numbers in its picture; `highest` fills
    it with the ranking by score. `Selection.gains`, what each pick added to the objective, is what `prune --gain-curve`
    plots.

Register the class in the package's pyproject.toml, and it works in every command:

    [project.entry-points."mmtok.methods"]
    largest-norm = "largest_norm:LargestNorm"

`mmtok_cli.methods.testing` has the checks that every method must pass. They take 10 to 60 seconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.rules import Positions
from mmtok_cli.tokens import Cut, LayerTokens, Selection, TextTokens, VisionTokens
from mmtok_cli.values import mirrored, on_host, to_device

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


RECORDED_OUTPUTS = "recorded outputs"  # of the authors' code
DESCRIPTION_ONLY = "description only"  # the paper's
GROUP_ENTRIES = 2**27  # of matrices [tokens, tokens] that are held at once for several images: 512 MiB in float32


@dataclass(frozen=True)
class Method:
    """One way to reduce vision tokens. Override the hook at which the method acts; the others keep everything.

    Class attributes, which `mmtok methods` prints:
    summary: a few words for the list. source: the paper, as in "arXiv 2403.06764". venue: where it was published, as in
        "ECCV 2024". licence: of the authors' release. checked: what this implementation was compared with,
        RECORDED_OUTPUTS or DESCRIPTION_ONLY. What is left empty is shown as not stated.
    reads_question: the choice depends on the question, so a second question may not find what it needs.
    training_free: works on a model as it is. takes_budget: False for methods whose count is fixed. exact: keeps as many
        tokens as the budget says; False for methods that may keep fewer, such as those that form rectangles.

    Class attributes about what the method reads and how its authors run it:
    signals: what the method reads of the encoder besides the tokens; nothing else is computed.
    alternative_signals: other sets of signals with which it works as well, for families that do not offer `signals`.
    nested: the picks at a smaller budget are the first picks at a larger one, in `Selection.order`; `compare --retain`
        then selects once for all budgets.
    per_crop: where a model cuts an image into crops, `select` is called for each crop with a part of the budget, as in
        methods that act on the encoder's output (see `across_crops`, and `select_crops` for one budget over all crops);
        otherwise once for the packed sequence of all crops, line ends included. A method whose `select` reads signals
        must set it; where a cut reads them, see `VisionTokens.scores`.
    positions: "keep" or "renumber": whether the authors' code leaves kept tokens at their positions in the whole
        prompt, as FastV's does, or numbers them consecutively.
    needs_video: the method compares frames, and is refused for images.
    keeps_padding: in the authors' code padding can be selected; the released track then shows all tokens as eligible.
    matrices: memory that `select` needs and that grows with the square of the tokens, as a number of float32 matrices
        [tokens, tokens]; `profile --scaling` uses it to predict whether a size fits.
    """

    summary: ClassVar[str]
    source: ClassVar[str] = ""
    venue: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    checked: ClassVar[str] = ""
    reads_question: ClassVar[bool] = False
    training_free: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    signals: ClassVar[tuple[str, ...]] = ()
    alternative_signals: ClassVar[tuple[tuple[str, ...], ...]] = ()
    nested: ClassVar[bool] = False
    per_crop: ClassVar[bool] = False
    positions: ClassVar[Positions] = "renumber"
    keeps_padding: ClassVar[bool] = False
    needs_video: ClassVar[bool] = False
    matrices: ClassVar[float] = 0

    @classmethod
    def acts(cls) -> str:
        """Where the method acts, which follows from the hooks that it overrides."""
        places = {
            "before the encoder": cls.sizes(),
            "between encoder and language model": cls.selects(),
            "inside the language model": cls.cuts is not Method.cuts,
        }
        return " and ".join(place for place, is_used in places.items() if is_used) or "nowhere"

    @classmethod
    def sizes(cls) -> bool:
        """Whether the method makes images smaller, or videos shorter, before they are encoded."""
        return cls.resize is not Method.resize or cls.keep_slices is not Method.keep_slices

    @classmethod
    def selects(cls) -> bool:
        """Whether the method keeps less than everything between encoder and language model."""
        return any(
            getattr(cls, hook) is not getattr(Method, hook) for hook in ("select", "select_group", "select_batch")
        )

    @classmethod
    def signals_among(cls, offered: Sequence[str]) -> tuple[str, ...]:
        """What the method reads of a model that offers these signals.

        The first of `signals` and `alternative_signals` that is offered as a whole. Without any, `signals`, which the
        model refuses.
        """
        choices = (cls.signals, *cls.alternative_signals)
        return next((names for names in choices if set(names) <= set(offered)), cls.signals)

    def count(self, share: float, total: int, signals: Sequence[str] = ()) -> int:
        """How many of `total` vision tokens a share (0.1 for 10%) keeps, rounded as in the authors' code.

        signals: those that the method reads of the model, where the authors have different code for different models.
        Used on the released track; the harmonised track rounds down for every method. Default: MMTok's rule, which
        truncates the floating-point product (0.29 of 100 is 28).
        """
        return int(share * total)

    def video_count(self, share: float, slices: int, tokens: int) -> int:
        """`count` for a video of `slices` slices in time of `tokens` vision tokens each."""
        return self.count(share, slices * tokens)

    def resize(self, total: int, budget: int) -> int | None:
        """How many vision tokens a smaller version of the image has when it is encoded; None keeps its size.

        total: vision tokens of the image at its own size. The model resizes the image and keeps its aspect ratio as far
        as it can.
        """
        return None

    def keep_slices(self, slices: int, tokens: int, budget: int) -> int | None:
        """How many of a video's `slices` slices in time, of `tokens` vision tokens each, are encoded; None is all.

        The model takes evenly spaced ones.
        """
        return None

    def entering(self, total: int, budget: int) -> int:
        """How many of an image's `total` vision tokens enter the language model where `budget` are left at its end.

        `select` is asked for so many, and `cuts` is told them as its `total`. Override it together with `select` and
        `cuts`; methods that act at one of these places need not.
        """
        return total if type(self).cuts is not Method.cuts and not self.selects() else budget

    def across_crops(self, crops: Sequence[VisionTokens]) -> Sequence[VisionTokens]:
        """The crops of one image as `select` sees them; override it where a choice depends on the other crops.

        Called once for each image, for methods that are `per_crop`. Put results into the crops' `signals`.
        """
        return crops

    def select_crops(self, crops: Sequence[VisionTokens], text: TextTokens, budget: int) -> list[Selection]:
        """Choose `budget` tokens of all crops of an image together: a Selection for each crop, which may be empty.

        Called in place of `across_crops` and `select` for methods that are `per_crop` and override it. Others get each
        crop with an even share of the budget.
        """
        raise NotImplementedError

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        """Choose `budget` of the image's vision tokens, fewer than `vision.total`."""
        whole = self.takes_budget and budget == vision.total
        if type(self).select_group is Method.select_group or whole:
            return Selection.everything(vision)
        return self.select_group([vision], [text], budget)[0]

    def select_group(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budget: int
    ) -> Sequence[Selection]:
        """`select` for several images of one grid, of which equally many tokens are eligible.

        Override it in place of `select` where they can be computed at once. text: the question of each image. Returns
        a Selection for each image, in their order. Results must not differ from those of single images.
        """
        return [self.select(v, t, budget) for v, t in zip(vision, text, strict=True)]

    def select_batch(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
    ) -> list[Selection]:
        """`select` for each image of which some tokens are dropped; the others keep everything.

        Images go to `select_group` by their grids and budgets, unless a subclass overrides `select` alone.
        """
        nearest = next(kind for kind in type(self).__mro__ if {"select", "select_group"} & vars(kind).keys())
        if nearest is Method or "select_group" not in vars(nearest):
            return [
                Selection.everything(v) if self.takes_budget and budget == v.total else self.select(v, t, budget)
                for v, t, budget in zip(vision, text, budgets, strict=True)
            ]

        def select(members: list[int]) -> Sequence[Selection]:
            images, questions = [vision[i] for i in members], [text[i] for i in members]
            selections = self.select_group(images, questions, budgets[members[0]])
            if not isinstance(selections, (list, tuple)) or len(selections) != len(members):
                raise ValueError(f"select_group must return a list of {len(members)} selections, one for each image")
            return selections

        by_size = [(image.grid, image.eligible_count) for image in vision]
        return in_groups(vision, budgets, by_size.__getitem__, select, reduced_only=self.takes_budget)

    def cuts(self, total: int, budget: int, layers: int) -> tuple[Cut, ...]:
        """Where inside the language model an image of `total` vision tokens is reduced to `budget`.

        layers: number of decoder layers. Cuts are in ascending order of layers, and the last one keeps `budget`. Return
        () where nothing is dropped (`budget == total`).
        Raises MMTokError where the model has too few layers for the method's parameters (see `require_layers`).
        """
        return ()

    def queries(self, vision: Tensor, text: Tensor) -> Tensor:
        """The text tokens whose attention to the image a cut reads. Default: the last.

        Their indices, [queries], or bool [text tokens]: the host reads the masks of all images at once.

        vision: [tokens, dim]; text: [text tokens, dim], the tokens after the image. Embeddings as they enter the first
        decoder layer.
        """
        import torch

        return torch.arange(len(text) - 1, len(text), device=text.device)

    def choose(self, tokens: LayerTokens, cut: Cut) -> Selection:
        """Choose `cut.keep` of the vision tokens that are left at a cut; indices count those tokens."""
        raise MMTokError(
            f"{type(self).__name__} defines cuts but does not override choose",
            "this is a defect of the method: it must override `choose`",
        )


def package_of(kind: type[Method]) -> str:
    """The package that a method comes from, as it is imported."""
    return kind.__module__.partition(".")[0]


def require_layers(parameter: str, given: Sequence[int], layers: int, first: int = 1) -> None:
    """Check a parameter that names decoder layers.

    parameter: METHOD.PARAMETER, for the message. given: its values, which must ascend. layers: number of decoder
    layers. first: the lowest value allowed; the highest leaves one layer after the last cut.
    Raises MMTokError with the range that works.
    """
    last = layers - 2 + first
    if not given or sorted(set(given)) != list(given) or not first <= given[0] <= given[-1] <= last:
        example = ",".join(str(first + i) for i in range(min(len(given), last - first + 1)))
        raise MMTokError(
            f"{parameter}={','.join(map(str, given))} does not fit a language model of {layers} layers",
            f"choose {'a layer' if len(given) == 1 else 'layers'} from {first} to {last}"
            f"{', ascending' if len(given) > 1 else ''}, as in --set {parameter}={example}",
        )


def attention_at(tokens: LayerTokens) -> Tensor:
    """The attention at a cut, [heads, queries, tokens]. Raises ValueError if `Cut.reads` is None."""
    if tokens.attention is None:
        raise ValueError("choose reads attention, but Cut.reads is None")
    return tokens.attention


def known(value: T | None, name: str) -> T:
    """A field of LayerTokens that has a value at the cuts of a model. Raises ValueError where it is None."""
    if value is None:
        raise ValueError(f"choose reads LayerTokens.{name}, which is None" + (" without Cut.reads" * (name == "keys")))
    return value


def ranking(scores: Tensor, eligible: Tensor) -> Tensor:
    """Indices of all tokens [tokens] by descending score, those that are not eligible last.

    scores: [tokens], or [images, tokens] for several. Equal scores keep the order of the image, on every device.
    """
    return scores.float().masked_fill(~eligible, float("-inf")).argsort(dim=-1, descending=True, stable=True)


def ranked_from(noise: Tensor, order: Tensor, ranks: Tensor) -> Tensor:
    """Picks [images, kept] up to where they become noise, then the other tokens by descending rank.

    noise: [images, kept], True from the first pick on that is any token, even one picked before.
    ranks: [images, tokens], float32.
    """
    import torch

    number = noise.cumsum(1)  # of each pick that is noise, from 1 on
    left = ranks.scatter_reduce(1, order, torch.where(noise, torch.inf, -torch.inf), "amin")  # of the real picks
    best = left.argsort(dim=1, descending=True, stable=True)
    return torch.where(noise, best.gather(1, (number - 1).clamp(min=0)), order)


def highest(scores: Tensor, eligible: Tensor, keep: int) -> Selection:
    """The `keep` tokens of highest score [tokens] among those that are eligible."""
    order = ranking(scores, eligible)[:keep]
    return Selection(order.sort().values, order=order)


def engine_count(share: float, total: int, fewest: int) -> int:
    """How many of a video's `total` tokens vLLM 0.32 keeps at a `video_pruning_rate` of 1 - share, at least `fewest`.

    It truncates after floating-point arithmetic: a share of 0.2 of 1,000 tokens is 199.
    """
    rate = round(1 - share, 12)  # as it is written in the engine's settings
    return max(fewest, min(total, int(total * (1 - rate))))


def in_groups(
    vision: Sequence[VisionTokens],
    budgets: Sequence[int],
    key: Callable[[int], Hashable],
    select: Callable[[list[int]], Sequence[Selection]],
    *,
    reduced_only: bool = True,
) -> list[Selection]:
    """`Method.select_batch` for images that can be computed together.

    key: equal for the numbers of images that belong together. select: their selections, by their numbers. As many go
    together as `GROUP_ENTRIES` allows. reduced_only: an image whose budget is all of its tokens keeps them, without
    being computed; False where the budget means nothing.
    """
    found: dict[int, Selection] = {}
    groups: dict[tuple[int, int, Hashable], list[int]] = {}
    for number, (image, budget) in enumerate(zip(vision, budgets, strict=True)):
        if reduced_only and budget == image.total:
            found[number] = Selection.everything(image)
        else:
            groups.setdefault((budget, image.total, key(number)), []).append(number)
    for (_, total, _), members in groups.items():
        most = max(1, GROUP_ENTRIES // total**2)
        for start in range(0, len(members), most):
            together = members[start : start + most]
            found |= dict(zip(together, select(together), strict=True))
    return [found[number] for number in range(len(vision))]


def by_order(order: Tensor, gains: Tensor | None = None) -> list[Selection]:
    """A selection of each image from its picks, [images, kept] indices, and their gains."""
    parts = (order.sort(1).values, order) if gains is None else (order.sort(1).values, order, gains)
    return [Selection(*of_image) for of_image in zip(*parts, strict=True)]


def stacked(values: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy of a single one."""
    import torch

    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(list(values))


def eligible_places(vision: Sequence[VisionTokens]) -> Tensor:
    """[images, eligible], `VisionTokens.eligible_places` of images of which equally many tokens are eligible."""
    import torch

    places = torch.stack([on_host(image.eligible).nonzero().squeeze(1) for image in vision])
    return to_device(places, vision[0].projected.device)


def excluded_of(vision: Sequence[VisionTokens]) -> Tensor:
    """[images, tokens], True for tokens of images of one size that are never to be kept."""
    import torch

    return mirrored(~torch.stack([on_host(image.eligible) for image in vision]), vision[0].projected.device)


def random_scores(seed: int, image_id: str, count: int) -> Tensor:
    """Scores [count] between 0 and 1 that depend only on the seed and the name of the image, drawn on the CPU."""
    import torch

    key = f"{seed}:{image_id}".encode(errors="surrogateescape")
    return torch.rand(count, generator=torch.Generator().manual_seed(zlib.crc32(key)))
