"""What a comparison's measurements themselves give away: what disturbed them, what they leave out, what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from mmtok_cli.report.tables import (
    by_batch_size,
    ceiling,
    comparison_notes,
    is_baseline,
    plain_table,
)
from mmtok_cli.report.units import seconds

if TYPE_CHECKING:
    from mmtok_cli.bench.planning import Estimate, EstimatedCase
    from mmtok_cli.bench.results import CaseResult, Comparison


def notes(comparison: Comparison) -> list[str]:
    """Everything that there is to say beside the tables of a comparison."""
    lines = []
    parts = by_batch_size(comparison)
    for part in parts:
        head = f"batches of {part.schedule.batch_size}: " if len(parts) > 1 else ""
        lines += [head + ceiling(result) for result in part.results if is_baseline(result)]
        lines += [head + line for line in (*outlier_notes(part.results), *drift_notes(part.results))]
    lines += failure_notes(comparison)
    if comparison.results:
        lines += comparison_notes(comparison)
    return [*lines, *flop_notes(comparison.results), *gpu_notes(comparison)]


def failure_notes(comparison: Comparison) -> list[str]:
    """Why a case has no figures."""
    lines = []
    for failed in comparison.failures:
        when = "while it was warming up" if failed.round is None else f"in round {failed.round + 1}"
        remedy = (
            "lower --batch-size, or free memory"
            if failed.reason == "out of memory"
            else "choose what suits all samples, or leave it out"
        )
        lines.append(f"{failed} (batches of {failed.batch_size}): {failed.reason} {when}: {failed.message}; {remedy}")
    return lines


def outlier_notes(results: Sequence[CaseResult]) -> list[str]:
    """A warning where single rounds took far longer than the rest."""
    disturbed = {str(result): result for result in results if result.outliers}
    if not disturbed:
        return []
    if all(result.outliers == [0] for result in disturbed.values()):
        return [f"the first round took much longer than the rest ({', '.join(disturbed)}): raise --warmup"]
    worst = max(disturbed.values(), key=lambda result: max(result.seconds["ttft"].values))
    times = worst.seconds["ttft"]
    rounds = sorted({number for result in disturbed.values() for number in result.outliers})
    return [
        f"outliers: {_count(len(rounds), 'round')} of {len(times.values)} took up to {seconds(max(times.values))} to "
        f"the first token where {seconds(times.median)} is usual ({', '.join(disturbed)}). Medians hardly change; if "
        "there are many, stop what else runs on the machine, or use --runs 3"
    ]


def drift_notes(results: Sequence[CaseResult]) -> list[str]:
    """A warning where the machine became faster or slower while it was measured on."""
    drifting = [result for result in results if is_baseline(result) and result.drift]
    lines = []
    for result in drifting:
        assert result.drift is not None
        change = result.drift.change
        lines.append(
            f"drift: {result} became {abs(change):.0%} {'slower' if change > 0 else 'faster'} from the first round to "
            "the last. Speedups are paired and hardly touched; for seconds to be trusted, "
            + (
                "let the machine cool and stop what else runs on it"
                if change > 0
                else "raise --warmup, or stop what else runs"
            )
        )
    return lines


def flop_notes(results: Sequence[CaseResult]) -> list[str]:
    """Which operators the FLOPs are made of."""
    seen = [result.flop_coverage for result in results if result.flop_coverage]
    if not seen:
        return []
    missed = {name: None for coverage in seen for name in coverage.missed}
    if missed:
        return [f"FLOPs are too few: torch has no formula for {', '.join(missed)}"]
    counted, calls = sum(sum(c.counted.values()) for c in seen), sum(c.calls for c in seen)
    return [
        f"FLOPs count {counted / calls:.0%} of the operators called, which are all that multiply matrices, convolve or "
        "attend; the rest, element-wise, counts as nothing"
    ]


def gpu_notes(comparison: Comparison) -> list[str]:
    """What the GPU's driver gave away, and how to have it tell."""
    if not comparison.environment.device.startswith("cuda"):
        return []
    uses = {str(result): result.gpu for result in comparison.results if result.gpu}
    if not uses:
        return ["clocks, throttling and energy were not read: pip install 'mmtok[gpu]'"]
    lines = []
    reasons = {reason: None for use in uses.values() for reason in use.throttled}
    if reasons:
        held = ", ".join(name for name, use in uses.items() if use.throttled)
        lines.append(
            f"the GPU held its clock down ({', '.join(reasons)}) after runs of {held}: fix the clocks "
            "(nvidia-smi --lock-gpu-clocks), or let it cool, before seconds are compared with those of another day"
        )
    others = max((use.other_processes or 0 for use in uses.values()), default=0)
    if others:
        lines.append(f"{_count(others, 'other process', 'es')} used the GPU too: wait for it to be free")
    joules = [f"{name} {use.joules:.3g} J" for name, use in uses.items() if use.joules is not None]
    if joules:
        lines.append(f"energy per answer, of the whole card: {', '.join(joules)}")
    return lines


def plan_table(plan: Estimate) -> Table:
    """The cases of a plan, and how long each takes."""
    table = plain_table("Plan")
    table.add_column("", justify="right")
    table.add_column("method", no_wrap=True)
    for heading in ("budget", "batch", "rounds", "runs", "one run"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, case in enumerate(plan.cases):
        one = "out of memory" if case.seconds is None else seconds(case.seconds)
        table.add_row(
            str(place), _name(case), case.budget or "–", str(case.batch_size), str(case.rounds), str(plan.runs), one
        )
    return table


def plan_lines(plan: Estimate) -> list[str]:
    """The order of the first rounds, and the time that all will take."""
    lines = [f"round {number + 1}: {' '.join(map(str, order))}" for number, order in enumerate(plan.order)]
    if plan.rounds > len(plan.order):
        lines.append(f"… {plan.rounds} rounds in all")
    least = f", of which at least {seconds(plan.min_time)} measured" if plan.min_time else ""
    return [*lines, f"{plan.samples} samples, seed {plan.seed}; about {duration(plan.seconds)}{least}"]


def duration(value: float) -> str:
    """A long time in the units that people plan with."""
    if value < 120:
        return seconds(value)
    minutes = round(value / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _name(case: EstimatedCase) -> str:
    return f"{case.method} (again)" if case.again else case.method


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"
