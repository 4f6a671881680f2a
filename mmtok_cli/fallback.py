"""What `mmtok profile` measures where a model has no weights here, or does not fit.

Latency and memory depend on the architecture, not on the values of the weights. So the true architecture is measured
with random weights, in a narrower data type, or with fewer decoder layers, from which the whole model is estimated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmtok_cli.cases import Case, release_memory
from mmtok_cli.configuration import configured_model
from mmtok_cli.data.samples import Sample
from mmtok_cli.drafts import SELF
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import plan_images, planned_cuts
from mmtok_cli.lengths import of_prompt_length
from mmtok_cli.models import outline
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.devices import choose_device, choose_dtype, narrower
from mmtok_cli.models.quantization import QUANTIZATIONS
from mmtok_cli.models.room import Needs, dtype_name, free_for, needs_of, needs_quantized, widest_fit
from mmtok_cli.models.sources import architecture, missing_weights, source_of, weights_dtype
from mmtok_cli.profiles import is_cached
from mmtok_cli.progress import Progress
from mmtok_cli.settings import PROFILE_ROUNDS, PROFILE_WARMUP, ProfileSettings
from mmtok_cli.timing.runner import run_case

FEWEST_LAYERS = 2  # that are measured; the last of them stands for the missing ones
ROUNDS_OF_AN_INTERVAL = 6  # fewer give no interval
FEWEST_ROUNDS = 3
FURTHER_PASSES = 2  # over all cases, to count operations and to trace
QUICK = 0.05  # share of the time within which a first measurement is repeated, since it includes the warm-up


@dataclass(frozen=True)
class Plan:
    """How a profile is measured. settings: with weights, data type and layers that can be loaded.

    vision_tokens: of each prompt of the largest batch, with its text if that has a fixed length. fallback: what is
    measured in place of the model as it is, and why; None if it is measured as it is. end: time of `perf_counter` at
    which the rounds end.
    """

    settings: ProfileSettings
    rounds: int
    warmup: int
    vision_tokens: tuple[int, ...]
    fallback: str | None = None
    end: float | None = None

    def is_over(self, rounds: int) -> bool:
        """Whether no further round is to begin after so many, because the machine is slower than expected."""
        return self.end is not None and rounds >= FEWEST_ROUNDS and time.perf_counter() > self.end


def plan_profile(settings: ProfileSettings, cases: Sequence[Case], sample: Sample, progress: Progress) -> Plan:
    """Choose weights, data type, layers and rounds where the settings leave them open.

    What the settings spell out is kept; where it cannot be kept, `load_model` refuses it. Raises MMTokError for what
    cannot be run, and for files of the model that are damaged.
    """
    start = time.perf_counter()
    model = outline(settings.model, device=settings.device, attention=settings.attention, pixels=settings.pixels)
    for case in cases:
        case.check(model, [sample])
    tokens = sum(model.total(image) for image in sample.images) + (settings.prompt_tokens or 0)
    lengths = (tokens,) * max(settings.batch_size)
    usual = Plan(
        settings.model_copy(update={"weights": "pretrained"}) if settings.weights == "auto" else settings,
        settings.rounds or PROFILE_ROUNDS,
        PROFILE_WARMUP if settings.warmup is None else settings.warmup,
        lengths,
    )
    if settings.strict:
        return usual
    weights, why = _weights(settings, fits=True)
    needs = _needs(model, settings, lengths, weights)
    wanted, whole = next(iter(needs.items()))
    free = free_for(choose_device(settings.device), settings.device_map)
    dtype, layers = (wanted, whole.layers) if free is None else widest_fit(needs, free)
    if free is not None and layers < whole.layers:
        weights, why = _weights(settings, fits=False)
        needs = _needs(model, settings, lengths, weights)
        dtype, layers = widest_fit(needs, free)
    if why is None and (dtype, layers) == (wanted, whole.layers):
        return usual
    if layers < (settings.layers or 1):
        return usual  # nothing fits that the settings allow, which `load_model` says
    fewest = settings.layers or max(min(FEWEST_LAYERS, layers), _layers_until_last_cut(model, cases, sample))
    if whole_only := _option_of_whole_models(settings):
        if layers < model.layer_count:
            raise MMTokError(
                f"{whole_only} runs whole models only, and {settings.model} does not fit", f"omit {whole_only}"
            )
        fewest = layers
    if fewest > layers:
        raise MMTokError(
            f"the methods drop tokens before decoder layer {fewest} of {settings.model}, and only {layers} layers fit",
            "choose other --methods, or a machine with more memory",
        )
    # Trained weights keep the data type that they are stored in, where that was left open.
    kept = settings.dtype if dtype == wanted and weights == "pretrained" else dtype_name(dtype)
    found = settings.model_copy(update={"weights": weights, "dtype": kept})
    first = _measured(replace(usual, settings=found), cases, sample, fewest, progress)
    times = RunTimes(found, first, needs[dtype], fewest)
    measured = times.most_layers(layers)
    rounds = times.most_rounds(measured)
    parts = [why or f"does not fit: {weights} weights", *([dtype_name(dtype)] if kept != "auto" else [])]
    if measured < model.layer_count:
        found = found.model_copy(update={"layers": measured})
        parts.append(f"{measured} of {model.layer_count} layers measured, the rest estimated (~)")
    fallback = "; ".join(parts)
    progress.note(f"{settings.model}: {fallback}")
    more = max(1, round(times.seconds(measured, rounds) / 60))
    progress.note(f"{rounds} rounds, about {more} more minute{'s' * (more > 1)} (see --max-time)")
    end = None if settings.rounds else start + settings.max_time
    return Plan(found, rounds, times.warmup, lengths, fallback, end)


def _option_of_whole_models(settings: ProfileSettings) -> str | None:
    """The option among the settings that cannot be measured with a part of the model."""
    if settings.draft == SELF:
        return "--draft self"  # whose passes would be taken for those of the answer
    if settings.device_map is not None:
        return "--device-map"
    return "--compile" if settings.compile_model else None


def _needs(
    model: VisionLanguageModel, settings: ProfileSettings, tokens: Sequence[int], weights: str
) -> dict[torch.dtype, Needs]:
    """What the layers that the settings ask for need in each data type that they allow. Trained weights are quantized
    while they are loaded, random ones when all are drawn."""
    wanted = choose_dtype(settings.dtype, choose_device(settings.device))
    if wanted is None:
        source = source_of(settings.model)
        random = weights == "random" or missing_weights(settings.model, source) is not None
        config = architecture(settings.model, source)
        wanted = torch.bfloat16 if random else weights_dtype(settings.model, source, config)
    allowed = narrower(wanted) if settings.dtype == "auto" else (wanted,)
    needs = {
        dtype: needs_of(model.model, dtype, tokens, settings.attention, settings.encoder_attention) for dtype in allowed
    }
    if settings.quantization in QUANTIZATIONS and weights == "pretrained":  # others are refused by `load_model`
        needs = {
            dtype: needs_quantized(need, model.model, dtype, settings.quantization) for dtype, need in needs.items()
        }
    layers = settings.layers
    return needs if layers is None else {dtype: need.of_layers(layers) for dtype, need in needs.items()}


def _weights(settings: ProfileSettings, *, fits: bool) -> tuple[str, str | None]:
    """Which weights to measure with, and why it is not the trained ones, if it was left open."""
    if settings.weights != "auto":
        return settings.weights, None
    source = source_of(settings.model)
    if missing_weights(settings.model, source):
        return "random", "weights not found: random"
    if not fits and not (Path(source).is_dir() or is_cached(source)):
        return "random", "does not fit, weights not downloaded: random"
    return "pretrained", None


def _layers_until_last_cut(model: VisionLanguageModel, cases: Sequence[Case], sample: Sample) -> int:
    """Decoder layers up to and with the first one behind the last cut of every case."""
    return max(
        (
            cut.before + 1
            for case in cases
            for plan in plan_images(model, case.method, sample.images, case.budget, case.rules, None)
            for cut in planned_cuts(case.method, plan, model)
        ),
        default=1,
    )


@dataclass(frozen=True)
class FirstMeasurement:
    """Seconds: to load the model, of one run of all cases with the fewest layers, of one further layer in it, and of
    the measurement itself."""

    loading: float
    all_cases: float
    layer: float
    elapsed: float


def _measured(plan: Plan, cases: Sequence[Case], sample: Sample, layers: int, progress: Progress) -> FirstMeasurement:
    settings, start = plan.settings, time.perf_counter()
    model = configured_model(settings, progress, layers, plan.vision_tokens)
    loading = time.perf_counter() - start
    if settings.prompt_tokens is not None:
        sample = of_prompt_length(model, sample, settings.prompt_tokens)
    with progress.task("estimating the time"):
        for _ in range(2):
            begun = time.perf_counter()
            runs = [
                run_case(model, case, [sample] * case.batch_size, runs=settings.runs, **settings.timed_length)
                for case in cases
            ]
            elapsed = time.perf_counter() - begun
            if elapsed > QUICK * settings.max_time:
                break
    missing = model.layer_count - model.loaded_layers
    added = sum(
        run.seconds[name] - run.seconds.get(f"measured_{name}", run.seconds[name])
        for run in runs
        for name in ("prefill", "decode")
        if name in run.seconds
    )
    device = model.device
    del model
    release_memory(device)
    layer = settings.runs * added / missing if missing else 0.0
    return FirstMeasurement(loading, elapsed, layer, time.perf_counter() - start)


@dataclass(frozen=True)
class RunTimes:
    """How long a profile takes, computed from a first measurement with the fewest layers.

    Rounds are given up before layers, down to those of an interval; below that, only the fewest layers are left.
    """

    settings: ProfileSettings
    first: FirstMeasurement
    need: Needs
    fewest: int

    @property
    def warmup(self) -> int:
        """One pass where nothing else is asked for: the first measurement has warmed up as well."""
        return 1 if self.settings.warmup is None else self.settings.warmup

    def seconds(self, layers: int, rounds: int) -> float:
        """All that is left to do, with so many layers."""
        loading = self.first.loading * self.need.of_layers(layers).weights / self.need.of_layers(self.fewest).weights
        one_pass = self.first.all_cases + (layers - self.fewest) * self.first.layer
        return loading + (self.warmup + rounds + FURTHER_PASSES) * one_pass

    def most_layers(self, most: int) -> int:
        """As many as fit into the time, at most those that fit into memory."""
        rounds = self.settings.rounds or ROUNDS_OF_AN_INTERVAL
        fitting = (n for n in range(self.fewest, most + 1) if self.seconds(n, rounds) <= self._left)
        return max(fitting, default=self.fewest)

    def most_rounds(self, layers: int) -> int:
        """As many as fit into the time, unless the settings say how many."""
        fitting = (n for n in range(FEWEST_ROUNDS, PROFILE_ROUNDS + 1) if self.seconds(layers, n) <= self._left)
        return self.settings.rounds or max(fitting, default=FEWEST_ROUNDS)

    @property
    def _left(self) -> float:
        return self.settings.max_time - self.first.elapsed
