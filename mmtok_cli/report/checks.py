"""Notes on a comparison: how to read it, what disturbed the measurements, what is missing, what failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

from mmtok_cli.errors import MMTokError
from mmtok_cli.report import tables
from mmtok_cli.report.columns import COMPARED, OPTIONAL, stages_of
from mmtok_cli.report.tables import (
    by_batch_size,
    equivalent_notes,
    inconclusive_notes,
    largest_batch_notes,
    layer_notes,
    lengths_text,
    plain_table,
)
from mmtok_cli.report.turns import turn_notes
from mmtok_cli.report.units import cpus, duration, plural, points, ratio, seconds, share

MOST_LEFT_OUT = 3  # lines on data that could not be used
FEW_QUESTIONS = 200
MOST_ROUNDS = 8  # that are listed
MANY_CALLS = 200  # per sample; an encoder that does not loop has a call for each of its 24 to 64 blocks

# From here on, what others take of the machine disturbs a measurement; a quiet machine is far below.
BUSY = 0.25  # CPUs
BUSY_SHARE = 0.1  # of the CPUs that are needed
STOLEN = 0.1  # CPUs
SLOWER = 0.1  # of the frequency
REMEDIES = {
    "out of memory": "lower --batch-size, or free memory",
    "refused": "change the case, or drop it",
    "error": "the traceback is in {directory}/failures",
}

if TYPE_CHECKING:
    from mmtok_cli.planning import Estimate
    from mmtok_cli.results.schema import CaseResult, Comparison, Environment, MachineUse


def notes(comparison: Comparison, *, ceilings: bool = True) -> list[str]:
    """All notes on a comparison. ceilings: whether to include the upper bounds of the speedup."""
    lines = []
    parts = by_batch_size(comparison)
    for part in parts:
        head = f"batch size {part.schedule.batch_size}: " if len(parts) > 1 else ""
        lines += [head + line for line in (tables.ceilings(part.results) if ceilings else ())]
        disturbed = (*outlier_notes(part.results, part.machine), *drift_notes(part.results))
        lines += [head + line for line in disturbed]
    lines += [*machine_notes(comparison.machine, comparison.environment), *kernel_notes(comparison.environment)]
    lines += [*failure_notes(comparison), *left_out_notes(comparison), *comparison.remarks]
    if comparison.results:
        lines += comparison_notes(comparison)
    lines += turn_notes(comparison)
    return [*lines, *encoder_notes(comparison.results), *flop_notes(comparison.results), *gpu_notes(comparison)]


def short_notes(results: Sequence[CaseResult], samples: int) -> list[str]:
    """Which cases miss their budget on some samples, those with the same number on one line."""
    cases: dict[int, list[str]] = defaultdict(list)
    for result in results:
        if result.short:
            cases[result.short].append(str(result))
    return [
        f"{short} of {plural(samples, 'sample')} cannot meet the budget: the other tokens are padding, there are no "
        f"more, or a video cannot be made smaller: {', '.join(names)}"
        for short, names in sorted(cases.items())
    ]


def left_out_notes(comparison: Comparison) -> list[str]:
    """Which data could not be used: the first few problems and the number of the others."""
    lines = comparison.left_out
    more = [f"… and {len(lines) - MOST_LEFT_OUT} more problems of the data"] if len(lines) > MOST_LEFT_OUT else []
    return [*lines[:MOST_LEFT_OUT], *more]


def failure_notes(comparison: Comparison) -> list[str]:
    """Why a case has no measurements, or was not evaluated."""
    lines = []
    for failed in comparison.unevaluated:
        lines.append(
            f"{failed}: {failed.reason} during evaluation with batch size {failed.case.batch_size}; "
            f"its answers are not scored: {failed.message}"
            + (f"; the traceback is in {comparison.run_directory}/predictions" if failed.reason == "error" else "")
        )
    for failed in comparison.failures:
        when = "during warm-up" if failed.round is None else f"in round {failed.round + 1}"
        lines.append(
            f"{failed} (batch size {failed.case.batch_size}): {failed.reason} {when}: {failed.message}; "
            f"{REMEDIES[failed.reason].format(directory=comparison.run_directory)}"
        )
    return lines


def comparison_notes(comparison: Comparison) -> list[str]:
    """How to read the tables, and what to do about inconclusive results."""
    others = [result for result in comparison.results if not result.case.is_baseline]
    methods = [result for result in others if not result.case.again]
    found = stages_of(result.seconds for result in others)
    further = "".join(f"{stage}, " for stage in OPTIONAL if stage in found)
    notes = [
        "times are medians over rounds, per batch; speedups are paired within rounds, with a 95 % interval",
        f"TTFT (time to first token): {further}prepare, encode, select and prefill. TPOT (time per output token): "
        "decode, per token after the first. KV cache and FLOPs are per sample",
    ]
    notes += [
        *draft_notes(methods),
        *scale_notes(methods),
        *overhead_notes([result for result in methods if result.case.method != "full"]),
        *short_notes(methods, comparison.schedule.samples),
        *layer_notes(methods),
        *largest_batch_notes(comparison.results),
        *position_notes(methods),
        *equivalent_notes(comparison.equivalents),
    ]
    for part in by_batch_size(comparison):
        head = f"batch size {part.schedule.batch_size}: " if part is not comparison else ""
        doubtful = [result for result in part.results if not result.case.is_baseline]
        notes += [head + note for note in inconclusive_notes(doubtful, ("prefill", "ttft", "tpot"))]
    return [*notes, *quality_notes(comparison), *interruption_notes(comparison)]


def quality_notes(comparison: Comparison) -> list[str]:
    """Explains scores, flips and fidelity, as far as they are shown."""
    results, schedule = comparison.results, comparison.schedule
    on = "" if schedule.timed is None else f" on {plural(schedule.timed, 'sample')}"
    timing = f"{plural(schedule.rounds, 'round')}{on}"
    notes = []
    if any(result.fidelity for result in results):
        notes += [
            f"timing: {timing}; evaluation, in a separate pass: {plural(schedule.samples, 'sample')}",
            "same: answers identical to those of the unreduced model. top-1, KL: agreement and divergence (nats) at "
            "each token of its answer",
        ]
    counts = next((result.score_counts for result in results if result.score_counts), None)
    if counts:
        title = f"score: {schedule.metric_title}; " if schedule.metric_title else ""
        score = f"{title}retention"
        notes.append(
            f"{score}: score / score of the unreduced model, with a 95 % interval over images. lost, gained: samples "
            "that only the unreduced model, or only the reduced model, answers correctly; p: probability of a "
            "difference this large by chance (McNemar's exact test)"
        )
        notes += [*repeat_notes(results), *group_notes(results), *unable_notes(results)]
        if counts.asked < FEW_QUESTIONS:
            notes.append(f"with only {plural(counts.asked, 'question')}, scores vary by several points: raise --limit")
    return notes


def repeat_notes(results: Sequence[CaseResult]) -> list[str]:
    """The mean score of each case that was drawn several times."""
    draws: dict[str, dict[int, float]] = defaultdict(dict)  # scores by the draw: all batch sizes have the same
    for result in results:
        if result.case.repeat is not None and result.score is not None:
            name = str(result.case.model_copy(update={"repeat": None}))
            draws[name].setdefault(result.case.repeat, result.score)
    return [
        f"{name}: mean score {share(fmean(scores.values()))} of {len(scores)} draws ({share(min(scores.values()))} to "
        f"{share(max(scores.values()))})"
        for name, scores in draws.items()
        if len(scores) > 1
    ]


def group_notes(results: Sequence[CaseResult]) -> list[str]:
    """Explains the groups of samples, if they are shown."""
    if not any(result.groups for result in results):
        return []
    return [
        "groups, of the samples that the unreduced model answers correctly (VTC-Bench): A, those that resize at the "
        "same budget answers incorrectly; B, those that it answers correctly. Group A is what tells methods apart"
    ]


def unable_notes(results: Sequence[CaseResult]) -> list[str]:
    """A warning if the unreduced model scores 0, so that there is nothing to retain."""
    unable = next((result for result in results if result.case.is_baseline and result.score == 0), None)
    if unable is None:
        return []
    if unable.yes_no and unable.yes_no.accuracy > 0:
        return ["warning: the unreduced model finds no answer yes, so F1 is 0 and there is no retention: read accuracy"]
    return [
        "warning: the unreduced model answers nothing right: it cannot do this task, and there is no retention. Check "
        "the model, --question, --max-new-tokens and --metric"
    ]


def interruption_notes(comparison: Comparison) -> list[str]:
    """How far an interrupted comparison came."""
    if not comparison.interrupted:
        return []
    schedule, planned = comparison.schedule, comparison.planned_rounds
    if schedule.planned_samples and 0 < (schedule.conversations or 0) < schedule.planned_samples:
        return [f"interrupted: {schedule.conversations} of {schedule.planned_samples} conversations were evaluated"]
    if planned and schedule.rounds >= planned and schedule.planned_samples:
        asked = schedule.samples if any(result.fidelity for result in comparison.results) else 0
        return [f"interrupted: {asked} of {schedule.planned_samples} samples were evaluated"]
    of = f" of {planned}" if planned else ""
    return [f"interrupted: {schedule.rounds}{of} rounds were completed"]


def draft_notes(results: Sequence[CaseResult]) -> list[str]:
    """What each draft is worth and what it costs, compared with the same case without it."""
    lines = []
    for result in results:
        draft, said = result.draft, []
        if draft is None:
            continue
        if draft.points is not None:
            interval = (
                f" ({points(draft.low)} to {points(draft.high)})"
                if draft.low is not None and draft.high is not None
                else ""
            )
            said.append(f"{points(draft.points)} points{interval}")
        if draft.gained is not None:
            said.append(f"{draft.gained} gained, {draft.lost} lost")
        if draft.slowdown:
            said.append(f"time to first token {ratio(draft.slowdown.median)}x")
        without = result.case.without_draft
        lines.append(f"{result}: with the draft ({result.case.draft}), compared with {without}: {', '.join(said)}")
    return lines


def scale_notes(results: Sequence[CaseResult]) -> list[str]:
    """How to read what smaller images save, if there are any."""
    if all(result.case.image_scale is None for result in results):
        return []
    return [
        "scale: factor on both sides of the images; encoded: vision tokens that the encoder makes of them, of those at "
        "scale 1; saved: seconds less than the unreduced model takes, median of the differences within rounds"
    ]


def overhead_notes(results: Sequence[CaseResult]) -> list[str]:
    """The overhead of each method, at the budget where it is largest."""
    largest: dict[str, float] = {}
    for result in results:
        method = result.case.title
        largest[method] = max(result.overhead, largest.get(method, 0.0))
    shares = ", ".join(f"{method} {share(value)}" for method, value in largest.items())
    return [f"selection overhead, as a share of encode and prefill: {shares}"] if shares else []


def position_notes(results: Sequence[CaseResult]) -> list[str]:
    """A warning if some methods keep the position ids of tokens and others renumber them."""
    keeping, renumbering = (
        {r.case.method: None for r in results if r.positions == policy} for policy in ("keep", "renumber")
    )
    if not keeping or not renumbering:
        return []
    return [
        f"position ids are kept by {', '.join(keeping)} and renumbered by {', '.join(renumbering)}, as released; use "
        "--track harmonised or --positions for the same policy everywhere"
    ]


def outlier_notes(results: Sequence[CaseResult], machine: MachineUse | None = None) -> list[str]:
    """A warning if single rounds took much longer than the others, with what other processes did in them."""
    disturbed = {str(result): result for result in results if result.outliers}
    if not disturbed:
        return []
    if all(result.outliers == [0] for result in disturbed.values()):
        return [f"the first round took much longer than the others ({', '.join(disturbed)}): raise --warmup"]
    worst = max(disturbed.values(), key=lambda result: max(result.seconds[result.checked].values))
    times = worst.seconds[worst.checked]
    until = "to the first token" if worst.checked == "ttft" else "in all"
    rounds = sorted({number for result in disturbed.values() for number in result.outliers})
    listed = ", ".join(str(number + 1) for number in rounds[:MOST_ROUNDS])
    more = f", … ({len(rounds)} in all)" if len(rounds) > MOST_ROUNDS else ""
    return [
        f"outliers: {'round' if len(rounds) == 1 else 'rounds'} {listed}{more} of {len(times.values)} took up to "
        f"{seconds(max(times.values))} {until}, with a median of {seconds(times.median)} "
        f"({', '.join(disturbed)}){_others_then(rounds, machine)}. Medians are hardly affected; to have fewer, close "
        "other programs and run again, or raise --rounds"
    ]


def _others_then(rounds: Sequence[int], machine: MachineUse | None) -> str:
    """How busy other processes were in some rounds, if that was more than in the others."""
    if machine is None or not all(number < len(machine.others_by_round) for number in rounds):
        return ""
    then = [machine.others_by_round[number] for number in rounds]
    otherwise = [others for number, others in enumerate(machine.others_by_round) if number not in rounds]
    if not otherwise or fmean(then) < fmean(otherwise) + BUSY:
        return ""
    return f"; other processes kept {cpus(fmean(then))} busy in them, {cpus(fmean(otherwise))} otherwise"


def machine_notes(machine: MachineUse | None, environment: Environment) -> list[str]:
    """What kept the processor from the measurement: other processes, a hypervisor, its frequency, too few threads."""
    if machine is None:
        return []
    lines = []
    on_cpu = environment.device == "cpu"
    wanted = min(environment.threads, machine.cores) if on_cpu else 1
    missing = machine.others + wanted - machine.cpus
    if missing > max(BUSY, BUSY_SHARE * wanted):
        lines.append(
            f"other processes kept {cpus(machine.others)} of {machine.cpus} busy during the rounds, and mmtok uses "
            f"{plural(wanted, 'thread')}: close other programs and run again, or raise --rounds"
        )
    if machine.stolen > STOLEN:
        lines.append(
            f"the hypervisor gave {cpus(machine.stolen)} of {machine.cpus} to other virtual machines during the "
            "rounds: run at another time or on a machine of your own, or raise --rounds"
        )
    change = machine.frequency_drift
    if change and machine.frequency and change.change <= -SLOWER:
        lines.append(
            f"the frequency of the CPUs fell by {-change.change:.0%} during the rounds, to a median of "
            f"{machine.frequency / 1000:.2f} GHz, as heat or a power limit makes it: let the machine cool, connect its "
            "power supply, and run again"
        )
    # By default torch leaves efficiency cores alone, which may be half of them.
    if on_cpu and 2 * environment.threads < machine.cores:
        lines.append(
            f"torch uses {plural(environment.threads, 'thread')} on {plural(machine.cores, 'core')}: unless that is "
            f"intended, set OMP_NUM_THREADS={machine.cores} and run again"
        )
    return lines


def kernel_notes(environment: Environment) -> list[str]:
    """A warning where layers ran without the kernels that users will have."""
    if not environment.linear_reference:
        return []
    layers = plural(environment.linear_layers, "decoder layer")
    why = "which has kernels for GPUs alone" if environment.device == "cpu" else "which is not installed"
    return [
        f"{layers} with linear attention ran in transformers' reference code, not in flash-linear-attention, {why}: "
        "prefill is slower than users of it will see, and its speedups differ"
    ]


def drift_notes(results: Sequence[CaseResult]) -> list[str]:
    """A warning if the machine became faster or slower during the run."""
    drifting = [result for result in results if result.case.is_baseline and result.drift]
    lines = []
    for result in drifting:
        assert result.drift is not None
        change = result.drift.change
        lines.append(
            f"drift: {result} became {abs(change):.0%} {'slower' if change > 0 else 'faster'} from the first round to "
            "the last. Speedups are paired within rounds and hardly affected; for reliable seconds, "
            + (
                "let the machine cool, close other programs and run again"
                if change > 0
                else "raise --warmup, or close other programs and run again"
            )
        )
    return lines


def encoder_notes(results: Sequence[CaseResult]) -> list[str]:
    """How often the encoder calls attention per sample, where that is far more than once for each of its blocks."""
    calls = {
        str(result): result.flop_coverage.encoder_attention // result.case.batch_size
        for result in results
        if result.flop_coverage
    }
    if max(calls.values(), default=0) < MANY_CALLS:
        return []
    same = len(set(calls.values())) == 1
    listed = str(min(calls.values())) if same else ", ".join(f"{case} {count}" for case, count in calls.items())
    return [
        "the encoder calls its attention kernel once for each window or image of each block (per sample: "
        f"{listed} calls), which lengthens encode and lowers speedups; --encoder-attention flash_attention_2 calls it "
        "once for each block"
    ]


def flop_notes(results: Sequence[CaseResult]) -> list[str]:
    """Which operators the FLOPs include."""
    seen = [result.flop_coverage for result in results if result.flop_coverage]
    if not seen:
        return []
    missed = {name: None for coverage in seen for name in coverage.missed}
    if missed:
        return [f"FLOPs are underestimated: torch has no formula for {', '.join(missed)}"]
    counted, calls = sum(sum(c.counted.values()) for c in seen), sum(c.calls for c in seen)
    return [
        f"FLOPs cover {counted / calls:.0%} of the operator calls: all matrix products, convolutions and attention. "
        "Element-wise operators are not counted"
    ]


def gpu_notes(comparison: Comparison) -> list[str]:
    """GPU state reported by the driver, or how to get it."""
    if not comparison.environment.device.startswith("cuda"):
        return []
    uses = {str(result): result.gpu for result in comparison.results if result.gpu}
    if not uses:
        return ["GPU clocks, throttling and energy were not recorded: pip install 'mmtok[gpu]'"]
    lines = []
    reasons = {reason: None for use in uses.values() for reason in use.throttled}
    if reasons:
        held = ", ".join(name for name, use in uses.items() if use.throttled)
        lines.append(
            f"the GPU throttled ({', '.join(reasons)}) during {held}: before comparing seconds with those of another "
            "run, lock the clocks (nvidia-smi --lock-gpu-clocks) or let the GPU cool"
        )
    others = max((use.other_processes or 0 for use in uses.values()), default=0)
    if others:
        lines.append(f"{plural(others, 'other process', 'other processes')} used the GPU too: wait until it is idle")
    joules = [f"{name} {use.joules:.3g} J" for name, use in uses.items() if use.joules is not None]
    if joules:
        lines.append(f"energy per answer (whole card): {', '.join(joules)}")
    return lines


def plan_table(plan: Estimate) -> Table:
    """The cases of a plan, with the estimated time of each."""
    table = plain_table("Plan")
    table.add_column("", justify="right")
    table.add_column("method", no_wrap=True)
    for heading in ("budget", "batch", "rounds", "runs", "one run"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, case in enumerate(plan.cases):
        one = (case.failure or "").partition(":")[0] if case.seconds is None else seconds(case.seconds)
        table.add_row(
            str(place),
            case.case.title,
            case.case.budget or "–",
            str(case.case.batch_size),
            str(case.rounds),
            str(plan.runs),
            one,
        )
    return table


def plan_lines(plan: Estimate) -> list[str]:
    """Why cases failed, the order of the first rounds, and the estimated time of the run."""
    lines = [f"{case} (batch size {case.case.batch_size}): {case.failure}" for case in plan.cases if case.failure]
    lines += [f"round {number + 1}: {' '.join(map(str, order))}" for number, order in enumerate(plan.order)]
    if plan.rounds > len(plan.order):
        lines.append(f"… {plan.rounds} rounds in total")
    least = f", of which at least {seconds(plan.min_time)} timed" if plan.min_time else ""
    lines += filter(None, [lengths_text(plan)])
    return [*lines, f"{plural(plan.samples, 'sample')}, seed {plan.seed}; about {duration(plan.seconds)}{least}"]


def shortfalls(comparison: Comparison, stage: str, least: float) -> list[str]:
    """One line for each case whose lower 95 % bound of the speedup is below `least`; none if all reach it.

    A case without an interval, because it failed or ran in too few rounds, does not reach it.
    """
    lines = []
    for failed in comparison.failures:
        lines.append(
            f"{failed}, batch size {failed.case.batch_size}: {failed.reason}, so there is no speedup ({stage})"
        )
    for result in comparison.results:
        if result.case.is_baseline:
            continue
        name = f"{result}, batch size {result.case.batch_size}"
        speedup = result.speedup.get(stage)
        if stage == "tpot" and stage not in result.seconds:
            lines.append(f"{name}: no token was decoded after the first, so there is no TPOT; use --new-tokens")
        elif speedup is None or speedup.low is None or speedup.high is None:
            lines.append(f"{name}: the speedup ({stage}) has no interval, which requires six rounds and a baseline")
        elif speedup.low < least:
            lines.append(
                f"{name}: the speedup ({stage}) is {speedup.median:.2f}x, 95 % interval {speedup.low:.2f} to "
                f"{speedup.high:.2f}; the lower bound must reach {least:g}x"
            )
    return lines


def require_speedup_stage(stage: str) -> None:
    """Raises MMTokError for a stage without a speedup."""
    if stage not in COMPARED:
        raise MMTokError(f"--fail-below-stage {stage!r} has no speedup", f"choose one of {', '.join(COMPARED)}")
