"""Selection and prefill against the number of vision tokens, and how fast they grow with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch

from mmtok_cli import hooks
from mmtok_cli.cases import Case, release_memory
from mmtok_cli.data.samples import Sample
from mmtok_cli.decoding import prefill
from mmtok_cli.encodings import SharedEncodings
from mmtok_cli.errors import MMTokError, is_out_of_memory
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.room import GIB, free_memory
from mmtok_cli.pipeline import Encoded, check_budget, inside, reduce_encoded
from mmtok_cli.results.profile import DOMINATES, FEWEST_POINTS, Growth, ScalingPoint
from mmtok_cli.results.schedule import interleaved
from mmtok_cli.results.schema import CONFIDENCE
from mmtok_cli.timing.clock import Clock
from mmtok_cli.timing.memory import peak_memory
from mmtok_cli.timing.partial import last_layer, missing_groups, of_whole_model
from mmtok_cli.timing.statistics import seconds_interval
from mmtok_cli.video import MOST_FRAMES, Sampling, Video

PATIENCE = 10.0  # seconds for a case at one number of tokens; there are fewer runs where it would take longer
FEWEST_RUNS = 3
NEVER_TWICE = 20.0  # seconds from which a run is not repeated, and counts although it was the first
SMALLEST_GRID = 8  # rows and columns at which fixed costs are measured
STAGES = ("select", "prefill")


@dataclass
class _Runs:
    """What was measured of one case at one number of tokens. wanted: runs that are to be counted."""

    wanted: int = 0
    kept: int = 0
    peak: int | None = None
    seconds: list[dict[str, float]] = field(default_factory=list)


def parse_tokens(text: str) -> list[int]:
    """Read "576,2304", ascending. Raises MMTokError for anything but square numbers."""
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or len(part.strip()) > 9 or int(part) < 1:
            raise MMTokError(
                f"{part.strip()!r} is not a number of vision tokens", "list square numbers, as in 576,2304"
            )
        number = int(part)
        side = math.isqrt(number)
        if side**2 != number:
            raise MMTokError(
                f"{number} vision tokens do not fill a square grid",
                f"the nearest that do are {side**2} and {(side + 1) ** 2}",
            )
        numbers.append(number)
    return sorted(set(numbers))


def parse_frames(text: str) -> list[int]:
    """Read "8,16,32", ascending. Raises MMTokError for anything but numbers of frames."""
    numbers = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= MOST_FRAMES:
            raise MMTokError(f"{part.strip()!r} is not a number of frames", f"list 1 to {MOST_FRAMES}, as in 8,16,32")
        numbers.add(int(part))
    return sorted(numbers)


def shortened(model: VisionLanguageModel, sample: Sample, frames: Sequence[int]) -> dict[int, Sample]:
    """The sample with so many evenly spaced frames of each of its videos, by its number of vision tokens.

    Raises MMTokError for more frames than there are.
    """
    found = {}
    for count in frames:
        images = []
        for image in sample.images:
            if isinstance(image, Video):
                if len(image) < count:
                    raise MMTokError(
                        f"the video has {len(image)} frames, and --scaling-frames asks for {count}",
                        f"use --scaling-frames with numbers up to {len(image)}",
                    )
                image = image.part(Sampling(frames=count).places(len(image), 0))
            images.append(image)
        found[sum(map(model.total, images))] = replace(sample, images=tuple(images))
    return found


def check_scaling(model: VisionLanguageModel, cases: Sequence[Case], sample: Sample, sizes: Sequence[int]) -> None:
    """Refuse numbers of tokens at which a budget cannot be met. Raises MMTokError that names case and number."""
    for tokens in sizes:
        for case in cases:
            try:
                _check(model, case, sample, tokens)
            except MMTokError as error:
                raise MMTokError(f"{case} at {tokens} vision tokens: {error.message}", error.hint) from error


def smallest_size(
    model: VisionLanguageModel, cases: Sequence[Case], sample: Sample, sizes: Sequence[int]
) -> int | None:
    """The fewest tokens, below all `sizes`, of which every case drops some: what a stage takes there is fixed.

    None where there is no such number, and for videos.
    """
    if sample.has_video:
        return None
    for side in range(SMALLEST_GRID, math.isqrt(min(sizes))):
        try:
            check_scaling(model, cases, sample, [side**2])
            if any(case.budget is not None and case.budget.resolve(side**2) == side**2 for case in cases):
                continue
        except MMTokError:
            continue
        return side**2
    return None


def measure_size(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    sample: Sample,
    tokens: int,
    *,
    runs: int,
    warmup: int,
    seed: int,
) -> list[ScalingPoint]:
    """Time all cases on the sample, encoded to `tokens` vision tokens, in rounds with an order of their own.

    The images are encoded once for all runs of the cases that encode them alike; again in each run of a method that
    reads signals of the encoder, to time what these need, which belongs to its selection.

    A case is run as often as fits into `PATIENCE`, at least `FEWEST_RUNS` and at most `runs` times, after `warmup`
    runs, or as many as fit into that time; one that takes `NEVER_TWICE` is run once. What the device has no memory
    for is refused, and not run.
    """
    refused: dict[int, str] = {}
    measured = {i: _Runs() for i in range(len(cases))}
    encodings = SharedEncodings(model, [sample], _grids(sample, tokens))
    for i, case in enumerate(cases):
        warm_up = partial(_warm_up, model, case, encodings, tokens, measured[i], runs, warmup)
        _unless_too_large(model.device, i, refused, warm_up)
    order = interleaved(len(cases), max(done.wanted for done in measured.values()), seed)
    for permutation in order:
        for i in permutation:
            if i not in refused and len(measured[i].seconds) < measured[i].wanted:
                _unless_too_large(model.device, i, refused, partial(_run, model, cases[i], encodings, measured[i]))
    frames = sum(len(image) for image in sample.images if isinstance(image, Video)) or None
    points = [_point(case, tokens, measured[i], refused.get(i)) for i, case in enumerate(cases)]
    return [point.model_copy(update={"frames": frames}) for point in points]


def growth_of(points: Sequence[ScalingPoint], fixed: Sequence[ScalingPoint]) -> Iterator[Growth]:
    """How select and prefill of each case grow with the tokens.

    A stage takes some time however few the tokens are (launching operations, waiting for each pick), which hides how
    it grows. The line is fitted, by least squares on logarithms of medians, to the points at which it takes at least
    `DOMINATES` times what the fastest run takes at the smallest grid; without such a measurement, to all. What keeps
    every token selects nothing.
    """
    floors = {str(point): point for point in fixed}
    for name, case in {str(point): point.case for point in points}.items():
        for stage in STAGES:
            floor = min(_values(floors[name], stage), default=None) if name in floors else None
            mine = [p for p in points if str(p) == name and (stage != "select" or p.kept != p.tokens)]
            timed = [(p.tokens, _seconds(p, stage)) for p in mine]
            used = [(n, s) for n, s in timed if s and s >= DOMINATES * (floor or 0)]
            exponent, low, high = fit_exponent(*zip(*used, strict=True)) if used else (None, None, None)
            yield Growth(
                case=case,
                stage=stage,
                exponent=exponent,
                low=low,
                high=high,
                fixed_seconds=floor,
                tokens=[n for n, _ in used],
            )


def fit_exponent(
    tokens: Sequence[float], seconds: Sequence[float]
) -> tuple[float, float, float] | tuple[None, None, None]:
    """The slope of log seconds over log tokens and its 95 % interval; nothing for fewer than `FEWEST_POINTS`.

    The interval is that of least squares: it tells how far the points lie from a line, whether by noise or by bending.
    """
    if len(tokens) < FEWEST_POINTS:
        return None, None, None
    from scipy.stats import linregress, t

    fit = linregress([math.log(n) for n in tokens], [math.log(s) for s in seconds])
    slope, half = float(fit.slope), float(t.ppf((1 + CONFIDENCE) / 2, len(tokens) - 2) * fit.stderr)
    return slope, slope - half, slope + half


def needed_memory(model: VisionLanguageModel, case: Case, tokens: int) -> int:
    """Bytes that a case takes above the weights, at least: the square matrices of its selection, or in prefill the KV
    cache, the widest activations and, under eager attention, one layer's weights."""
    config, width = model.model.config.text_config, model.dtype.itemsize
    kept = tokens if case.budget is None else case.budget.resolve(tokens)
    entering = hooks.entering(case.method, tokens, kept)
    head = hf.head_width(config)
    attending = model.loaded_layers - len(model.linear_layers)
    cache = 2 * attending * config.num_key_value_heads * head * entering * width
    activations = 3 * config.intermediate_size * entering * width
    attention = 2 * 4 * config.num_attention_heads * entering**2 if model.attention == "eager" else 0
    return max(int(4 * case.method.matrices * tokens**2), cache + activations + attention)


class _TooLargeError(Exception):
    """Not enough memory for a point, in words."""


def _unless_too_large(device: torch.device, number: int, refused: dict[int, str], run: Callable[[], object]) -> None:
    """Run a case; where memory does not suffice, before or in the run, note in `refused` why there is no result."""
    try:
        run()
        return
    except _TooLargeError as error:
        refused[number] = str(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        refused[number] = "needs more memory than is free"
    release_memory(device)  # only here, since the error holds on to the memory of the failed run


def _check(model: VisionLanguageModel, case: Case, sample: Sample, tokens: int) -> None:
    check_budget(model, case.method, [sample], case.budget, case.rules, _grids(sample, tokens))


def _grids(sample: Sample, tokens: int) -> list[tuple[int, int]] | None:
    """The grid at which each image is encoded. A video of so many tokens keeps its own."""
    return None if sample.has_video else [(math.isqrt(tokens), math.isqrt(tokens))] * len(sample.images)


def _warm_up(
    model: VisionLanguageModel,
    case: Case,
    encodings: SharedEncodings,
    tokens: int,
    done: _Runs,
    runs: int,
    warmup: int,
) -> None:
    """Run a case until it is warm, and settle how often it is to be run. Raises _TooLargeError."""
    needed, free = needed_memory(model, case, tokens), _free(model.device)
    if free is not None and needed > free:
        raise _TooLargeError(f"needs {needed / GIB:.3g} GiB, has {free / GIB:.3g}")
    spent: list[float] = []
    while not spent or (len(spent) < warmup and sum(spent) + spent[-1] <= PATIENCE):
        done.seconds.clear()
        spent.append(_run(model, case, encodings, done))
    if spent[-1] >= NEVER_TWICE:
        done.wanted = 1
    else:
        done.seconds.clear()
        done.wanted = min(runs, max(FEWEST_RUNS, int(PATIENCE / max(spent[-1], 1e-9))))


def _free(device: torch.device) -> int | None:
    """Bytes that torch can still get, those that it keeps for later use included."""
    free = free_memory(device)
    if free is not None and device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


@torch.inference_mode()
def _run(model: VisionLanguageModel, case: Case, encodings: SharedEncodings, done: _Runs) -> float:
    """One run from the encoded image to prefill, recorded in `done`: the seconds that all of it took."""
    encoded, plans = encodings.of(case)
    encoded = replace(encoded, picks=None)  # a nested method selects again in each run
    before = _seconds_of_signals(model, case, encoded)
    with peak_memory(*model.devices) as peak:
        clock = Clock(*model.devices)
        reduced = reduce_encoded(model, case.method, encoded, plans, case.rules, clock.stage).without_encodings()
        with clock.stage("select"):
            cuts = inside(model, reduced, stage=clock.stage)
        with last_layer(model, clock.now) as spans, cuts, clock.stage("prefill"):
            prefill(model, reduced.inputs)
        stages = clock.stages()
    stages |= {stage: stages.get(stage, 0.0) + seconds for stage, seconds in before.items()}
    done.seconds.append(of_whole_model(stages, clock.sums(spans), missing_groups(model)))
    done.kept = reduced.tokens[0].kept
    done.peak = max(filter(None, (done.peak, peak.bytes)), default=None)
    return sum(stages.values())


def _seconds_of_signals(model: VisionLanguageModel, case: Case, encoded: Encoded) -> dict[str, float]:
    """Seconds by stage of encoding again for a method that reads signals, which are part of its selection."""
    signals = case.method.signals_among(model.signals)
    if not signals:
        return {}
    clock = Clock(*model.devices)
    with clock.stage("encode"):
        model.encode(encoded.prompt, signals, stage=clock.stage)
    return clock.stages()


def _point(case: Case, tokens: int, done: _Runs, refused: str | None) -> ScalingPoint:
    if refused:
        return ScalingPoint(tokens=tokens, case=case.id, refused=refused)
    values = {stage: [run[stage] for run in done.seconds] for stage in STAGES}
    return ScalingPoint(
        tokens=tokens,
        kept=done.kept,
        case=case.id,
        select_seconds=median(values["select"]),
        prefill_seconds=median(values["prefill"]),
        select_values=values["select"],
        prefill_values=values["prefill"],
        peak=done.peak,
        select_interval=seconds_interval(values["select"]),
        prefill_interval=seconds_interval(values["prefill"]),
    )


def _seconds(point: ScalingPoint, stage: str) -> float | None:
    return point.select_seconds if stage == "select" else point.prefill_seconds


def _values(point: ScalingPoint, stage: str) -> list[float]:
    return point.select_values if stage == "select" else point.prefill_values
