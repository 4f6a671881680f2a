"""Merge several runs of one model on one dataset into one comparison, in which every case names its run."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, TypeVar

from mmtok_cli.results.schema import CaseResult, Comparison, FailedCase, TaskResult, TurnResult

NamedCase = TypeVar("NamedCase", CaseResult, FailedCase, TaskResult, TurnResult)

UNSHOWN = ("command", "git_commit", "git_dirty")  # the commit is shown abbreviated, with a mark for changes


def same_kind(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons grouped by model and samples; groups are in the order of their first member."""
    groups: dict[tuple[str, str, str | None], list[Comparison]] = {}
    for comparison in comparisons:
        kind = (comparison.model, comparison.schedule.data, comparison.schedule.data_digest)
        groups.setdefault(kind, []).append(comparison)
    return list(groups.values())


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """Concatenate runs of one model on the same samples; a single run is returned unchanged.

    Speedups and retention stay relative to the baseline of their own run. The remarks list what differs between the
    runs. Texts of the environment that differ name the run that each holds for.
    """
    first, *others = comparisons
    if not others:
        return first
    names = [label(i) for i in range(len(comparisons))]
    runs = list(zip(comparisons, names, strict=True))
    sizes = sorted({size for one in comparisons for size in _sizes(one)})
    metrics = {(one.schedule.metric, one.schedule.metric_title) for one in comparisons}
    metric, title = metrics.pop() if len(metrics) == 1 else (None, None)
    same_rounds = {one.schedule.rounds for one in comparisons} == {first.schedule.rounds}
    lengths = {name: {getattr(one.schedule, name) for one in comparisons} for name in ("new_tokens", "prompt_tokens")}
    return first.model_copy(
        update={
            "environment": first.environment.model_copy(update=_environment(comparisons, names)),
            "schedule": first.schedule.model_copy(
                update={
                    "batch_size": sizes[0] if len(sizes) == 1 else sizes,
                    "rounds": max(one.schedule.rounds for one in comparisons),
                    "order": first.schedule.order if same_rounds else [],
                    "metric": metric,
                    "metric_title": title,
                    **{name: values.pop() if len(values) == 1 else None for name, values in lengths.items()},
                }
            ),
            "interrupted": any(one.interrupted for one in comparisons),
            "results": [_named(case, name) for one, name in runs for case in one.results],
            "failures": [_named(case, name) for one, name in runs for case in one.failures],
            "unevaluated": [_named(case, name) for one, name in runs for case in one.unevaluated],
            "turns": [_named(turn, name) for one, name in runs for turn in one.turns],
            "tasks": [_named(task, name) for one, name in runs for task in one.tasks],
            "remarks": _remarks(comparisons, names),
            "run_directory": None,
            "machine": None,
        }
    )


def label(place: int) -> str:
    """A, B, …, Z, A2, B2, …"""
    turn, letter = divmod(place, len(ascii_uppercase))
    return ascii_uppercase[letter] + (str(turn + 1) if turn else "")


def differences(comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """The settings that differ between the runs, by name: one text for each run."""
    facts = [_facts(one) for one in comparisons]
    columns = {name: [str(fact[name]) for fact in facts] for name in facts[0]}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _facts(comparison: Comparison) -> dict[str, Any]:
    environment, schedule, rules = comparison.environment, comparison.schedule, comparison.rules
    names = [name for name in type(environment).model_fields if name not in UNSHOWN]
    facts = {name.replace("_", " "): getattr(environment, name) for name in names}
    facts["git commit"] = (environment.git_commit or "none")[:9] + (" (changed)" if environment.git_dirty else "")
    return facts | {
        "track": rules.track,
        "positions": rules.positions or "as released",
        "budgets mean": rules.budget_means,
        "budgets per": rules.budget_per,
        "seed": schedule.seed,
        "rounds": schedule.rounds,
        "runs": schedule.runs,
        "warmup": schedule.warmup,
        "minimum time": schedule.min_time,
        "batch size": schedule.batch_size,
        "maximum of new tokens": schedule.max_new_tokens,
        "exact number of new tokens": schedule.new_tokens,
        "exact number of prompt tokens": schedule.prompt_tokens,
        "samples evaluated": schedule.samples,
        "metric": schedule.metric,
        "frames": schedule.sampling,
    }


def _remarks(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    where = [f"{name}: {one.run_directory}" for one, name in zip(comparisons, names, strict=True)]
    lines = [f"runs {'; '.join(where)}. Speedups and retention are relative to the baseline of the same run"]
    for fact, values in differences(comparisons).items():
        lines.append(f"{fact} differs: {', '.join(f'{v} ({name})' for v, name in zip(values, names, strict=True))}")
    if len(lines) == 1:
        lines.append("no recorded setting differs between the runs")
    return lines + [remark for one in comparisons for remark in one.remarks]


def _environment(comparisons: Sequence[Comparison], names: Sequence[str]) -> dict[str, Any]:
    """The texts of the environment that differ, each with the runs that it holds for. compiled: whether all were."""
    found: dict[str, Any] = {"compiled": all(one.environment.compiled for one in comparisons)}
    for field in type(comparisons[0].environment).model_fields:
        values = [getattr(one.environment, field) for one in comparisons]
        texts = all(isinstance(value, str) for value in values) or field in ("quantization", "pixels")
        if texts and len(set(values)) > 1 and field != "git_commit":
            found[field] = ", ".join(f"{value or 'none'} ({name})" for value, name in zip(values, names, strict=True))
    return found


def _sizes(comparison: Comparison) -> list[int]:
    sizes = comparison.schedule.batch_size
    return sizes if isinstance(sizes, list) else [sizes]


def _named(case: NamedCase, run: str) -> NamedCase:
    return case.model_copy(update={"case": case.case.model_copy(update={"run": run})})
