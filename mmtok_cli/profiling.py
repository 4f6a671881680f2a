"""Profiling: time every stage of each case, trace it in a separate run, and measure the device's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from mmtok_cli.cases import Case, release_memory
from mmtok_cli.configuration import cases_of, configured_model, with_writer
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.fallback import Plan, plan_profile
from mmtok_cli.lengths import of_prompt_length
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Reduced, check_sample, require_room
from mmtok_cli.progress import Progress
from mmtok_cli.results.profile import ProfileResult, ScalingPoint, launch_bound
from mmtok_cli.results.records import TimedRun
from mmtok_cli.results.schedule import Turn, interleaved
from mmtok_cli.results.schema import CaseResult, Flops, LargestBatch, Schedule, cases_without_draft, equivalents_of
from mmtok_cli.settings import FULL_SIZE, ProfileSettings
from mmtok_cli.stages import ALL_STAGES, unwatched
from mmtok_cli.timing.capacity import largest_batch
from mmtok_cli.timing.ceilings import achieved, measure_ceilings, weights_read
from mmtok_cli.timing.clock import Clock
from mmtok_cli.timing.flops import measure_flops
from mmtok_cli.timing.machine import Machine
from mmtok_cli.timing.partial import last_layer, missing_groups, of_whole_model
from mmtok_cli.timing.runner import reserved_memory, run_case, run_round
from mmtok_cli.timing.scaling import check_scaling, growth_of, measure_size, shortened, smallest_size
from mmtok_cli.timing.summary import summarise_case, summarise_machine, with_slowdown
from mmtok_cli.timing.traces import Trace, trace_case
from mmtok_cli.tokens import Selection

Result = TypeVar("Result")

SELECTION_STAGES = ALL_STAGES[: ALL_STAGES.index("decode")]


@dataclass(frozen=True)
class Profiled:
    """A profile with its traces, what its notes need to know of the model, and the errors that left parts of it out.

    planned_rounds: those that it would have without an interruption or an error.
    """

    profile: ProfileResult
    planned_rounds: int
    traces: list[Trace]
    context_length: int
    problems: list[MMTokError]


class Remainder:
    """What follows the first round. No part of it may cost what was measured before: an error leaves that part out, and
    an interruption all parts from there on."""

    def __init__(self) -> None:
        self.interrupted = False
        self.problems: list[MMTokError] = []

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """The result of a part; None if it is left out."""
        if self.interrupted:
            return None
        try:
            return work()
        except KeyboardInterrupt:
            self.interrupted = True
        except MMTokError as error:
            self.problems.append(MMTokError(f"{name}: {error.message}", error.hint))
        except Exception as error:
            self.problems.append(MMTokError(f"{name} failed with {type(error).__name__}: {first_line(error)}"))
        return None


@dataclass(frozen=True)
class Selected:
    """A sample's image reduced. selection: what is left of it. seconds: by stage, up to prefill."""

    reduced: Reduced
    selection: Selection
    seconds: dict[str, float]


def profile(
    settings: ProfileSettings,
    sample: Sample,
    data: str,
    trace_dir: Path,
    progress: Progress | None = None,
    *,
    scaling_sizes: Sequence[int] = (),
    longest: Sample | None = None,
) -> Profiled:
    """Profile the cases of the settings on one sample; a batch repeats it. data: what the sample is called.

    scaling_sizes: numbers of vision tokens at which selection and prefill are timed as well; of a video, numbers of
    frames. longest: the sample with as many frames of its video as the largest of them.

    An interrupted profile keeps its complete rounds and all parts that were measured by then, and so does one of which
    a part or a later round fails. Raises KeyboardInterrupt before the end of the first round, and MMTokError for what
    cannot be run.
    """
    progress = progress or Progress()
    if scaling_sizes and settings.draft:
        raise MMTokError("--scaling does not measure drafts", "omit --draft")
    if scaling_sizes and settings.image_scale != FULL_SIZE:
        raise MMTokError(
            "--scaling measures given numbers of vision tokens, not those of --image-scale", "omit one of them"
        )
    cases = with_writer(cases_of(settings), settings, progress)
    plan = plan_profile(settings, cases, sample, progress)
    settings = plan.settings
    model = configured_model(settings, progress, settings.layers, plan.vision_tokens, compiled=settings.compile_model)
    if settings.prompt_tokens is not None:
        sample = of_prompt_length(model, sample, settings.prompt_tokens)
        check_sample(model, sample, **settings.timed_length)
    scaled = _scaled_samples(model, longest or sample, scaling_sizes)
    for tokens, one in scaled.items():
        check_scaling(model, cases, one, [tokens])
    for case in cases:
        case.check(model, [sample])
    order = interleaved(len(cases), plan.rounds, settings.seed)
    remainder = Remainder()
    rounds = _time(model, cases, sample, order, plan, progress, remainder)
    planned_rounds = plan.rounds if remainder.interrupted or remainder.problems else len(rounds)
    flops: list[Flops | None] = []
    reserved: list[int | None] = []
    traces: dict[str, Trace] = {}
    with progress.task("tracing", len(cases)) as update:
        for number, case in enumerate(cases, 1):
            samples = [sample] * case.batch_size
            count = partial(measure_flops, model, case, samples, **settings.timed_length)
            flops.append(remainder.attempt(f"the FLOPs of {case.id.label}", count))
            hold = partial(reserved_memory, model, case, samples, **settings.timed_length)
            reserved.append(remainder.attempt(f"the reserved memory of {case.id.label}", hold))
            run = partial(trace_case, model, case, samples, trace_dir, **settings.timed_length)
            if trace := remainder.attempt(f"the trace of {case.id.label}", run):
                traces[case.id.label] = trace
            update(number)
    with progress.task("measuring ceilings"):
        ceilings = remainder.attempt("the ceilings", partial(measure_ceilings, model.device, model.dtype))
    kernels = [each for trace in traces.values() for each in trace.kernels]
    exact = settings.new_tokens is not None
    results, read = _results(cases, rounds, flops, reserved, exact_length=exact), weights_read(model)
    if settings.find_batch:
        results = _with_largest_batch(model, cases, results, sample, settings, progress, remainder)
    sizes = list(settings.batch_size)
    found = ProfileResult(
        model=settings.model,
        parameters=model.parameter_count,
        rules=settings.rules,
        environment=environment_of(model).model_copy(update={"fallback": plan.fallback}),
        schedule=Schedule(
            data=data,
            seed=settings.seed,
            max_new_tokens=settings.timed_length["max_new_tokens"],
            samples=1,
            batch_size=sizes[0] if len(sizes) == 1 else sizes,
            rounds=len(rounds),
            warmup=plan.warmup,
            order=order[: len(rounds)],
            runs=settings.runs,
            new_tokens=settings.new_tokens,
            prompt_tokens=settings.prompt_tokens,
            image_size=sample.images[0].size,
            sampling=settings.sampling.described if sample.has_video else None,
        ),
        interrupted=remainder.interrupted,
        cases=results,
        stage_peaks={label: trace.peaks for label, trace in traces.items()},
        memory=[trace.memory for trace in traces.values() if trace.memory],
        operators=[operator for trace in traces.values() for operator in trace.operators],
        trace=str(trace_dir),
        ceilings=ceilings,
        weights_read=read,
        achieved=achieved(results, read, experts=hf.expert_share(model.model.config) < 1),
        machine=summarise_machine(rounds),
        equivalents=equivalents_of([case.id for case in cases]),
        kernels=kernels,
        launch_bound=launch_bound(kernels, results),
    )
    if scaled:
        found = _with_scaling(model, cases, scaled, found, progress, remainder)
    problems = [*remainder.problems, *(trace.problem for trace in traces.values() if trace.problem)]
    return Profiled(found, planned_rounds, list(traces.values()), model.context_length, problems)


def time_selection(model: VisionLanguageModel, case: Case, sample: Sample) -> Selected:
    """Reduce the sample's image, after a first run that is not timed.

    What a method drops inside the language model is known only when the prompt has been read, so it is read then.
    """
    first = case.reduce(model, [sample])
    require_room(model, first.inputs["input_ids"].shape[1], max_new_tokens=0)
    cuts_inside = bool(first.cuts)
    if cuts_inside:
        case.answer(model, [sample], 1, unwatched)
    clock = Clock(*model.devices)
    with last_layer(model, clock.now) as spans:
        if cuts_inside:
            answers = case.answer(model, [sample], 1, clock.stage, encodings=True)
            reduced, selection = answers.reduced, answers.selections[0]
        else:
            reduced = case.reduce(model, [sample], clock.stage)
            selection = reduced.selections[0]
    stages = of_whole_model(clock.stages(), clock.sums(spans), missing_groups(model))
    return Selected(reduced, selection, {stage: s for stage, s in stages.items() if stage in SELECTION_STAGES})


def _time(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    sample: Sample,
    order: Sequence[Sequence[int]],
    plan: Plan,
    progress: Progress,
    remainder: Remainder,
) -> list[list[TimedRun]]:
    """The complete rounds, each with its runs in the order of cases. A round that fails or is interrupted ends them,
    unless it is the first, whose errors are raised."""
    settings = plan.settings
    with progress.task("warming up", len(cases) * plan.warmup) as update:
        for number in range(len(cases) * plan.warmup):
            case = cases[number // plan.warmup]
            run_case(model, case, [sample] * case.batch_size, **settings.timed_length)
            update(number + 1)
    batches = {size: [[sample] * size] for size in settings.batch_size}
    machine = Machine()

    def time_round(number: int) -> list[TimedRun]:
        turns = [Turn(case, 0) for case in order[number]]
        runs = run_round(model, cases, batches, number, turns, runs=settings.runs, **settings.timed_length)
        watched = [run.model_copy(update={"machine": machine.state()}) for run in runs]
        return sorted(watched, key=lambda run: run.case)

    with progress.task("timing", len(order)) as update:
        rounds = [time_round(0)]
        update(1)
        for number in range(1, len(order)):
            if plan.is_over(number):
                break
            runs = remainder.attempt(f"round {number + 1} of {len(order)}", partial(time_round, number))
            if runs is None:
                release_memory(model.device)
                break
            rounds.append(runs)
            update(number + 1)
    return rounds


def _results(
    cases: Sequence[Case],
    rounds: Sequence[Sequence[TimedRun]],
    flops: Sequence[Flops | None],
    reserved: Sequence[int | None],
    *,
    exact_length: bool,
) -> list[CaseResult]:
    """One result for each case; its baseline is the first case of the same batch size."""
    runs = [[each[i] for each in rounds] for i in range(len(cases))]
    first = {case.batch_size: i for i, case in reversed(list(enumerate(cases)))}
    without_draft = cases_without_draft([case.id for case in cases])
    results = []
    for i, case in enumerate(cases):
        baseline = None if first[case.batch_size] == i else runs[first[case.batch_size]]
        counted = flops[i]
        stages, coverage = (counted.stages, counted.coverage) if counted else ({}, None)
        result = summarise_case(
            case.id, runs[i], baseline, stages, coverage, reserved=reserved[i], exact_length=exact_length
        )
        plain = without_draft.get(i)
        results.append(result if plain is None else with_slowdown(result, runs[i], runs[plain]))
    return results


def _with_largest_batch(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    results: Sequence[CaseResult],
    sample: Sample,
    settings: ProfileSettings,
    progress: Progress,
    remainder: Remainder,
) -> list[CaseResult]:
    """The results with the largest batch that fits, found once for each method and budget."""
    found: dict[Case, LargestBatch | None] = {}
    with progress.task("finding the largest batch", len(cases)) as update:
        for number, case in enumerate(cases, 1):
            key = replace(case, batch_size=1)
            if key not in found:
                find = partial(largest_batch, model, key, sample, settings.timed_length)
                found[key] = remainder.attempt(f"the largest batch of {case}", find)
            update(number)
    return [
        result.model_copy(update={"largest_batch": found[replace(case, batch_size=1)]})
        for case, result in zip(cases, results, strict=True)
    ]


def _scaled_samples(model: VisionLanguageModel, sample: Sample, sizes: Sequence[int]) -> dict[int, Sample]:
    """The sample at which each size is measured, by its vision tokens. sizes: these, or frames of a video."""
    return shortened(model, sample, sizes) if sample.has_video else dict.fromkeys(sizes, sample)


def _with_scaling(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    samples: Mapping[int, Sample],
    found: ProfileResult,
    progress: Progress,
    remainder: Remainder,
) -> ProfileResult:
    """The profile with the times at each number of tokens, as far as they could be measured.

    samples: by their number of tokens.
    """
    first = next(iter(samples.values()))
    smallest = smallest_size(model, cases, first, list(samples))
    numbers = [*filter(None, [smallest]), *samples]
    points: dict[int, list[ScalingPoint]] = {}
    schedule = found.schedule
    for place, tokens in enumerate(numbers, 1):
        measure = partial(
            measure_size,
            model,
            cases,
            samples.get(tokens, first),
            tokens,
            runs=schedule.rounds,
            warmup=schedule.warmup,
            seed=schedule.seed,
        )
        with progress.task(f"{tokens} tokens ({place} of {len(numbers)})"):
            measured = remainder.attempt(f"the times at {tokens} tokens", measure)
        if measured is not None:
            points[tokens] = measured
    fixed = points.pop(smallest, []) if smallest else []
    scaling = [point for measured in points.values() for point in measured]
    return found.model_copy(
        update={
            "interrupted": remainder.interrupted,
            "scaling": scaling,
            "growth": list(growth_of(scaling, fixed)),
            "fixed": fixed,
        }
    )
