"""Several runs of one model on one dataset as one comparison, in which every case says which run it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, TypeVar

from mmtok_cli.results.schema import CaseResult, Comparison, FailedCase

NamedCase = TypeVar("NamedCase", CaseResult, FailedCase)

UNSHOWN = ("command", "git_commit", "git_dirty")  # the commit is shown in short, with its mark


def same_kind(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons by model and samples, in the order of the first of each kind."""
    groups: dict[tuple[str, str, str | None], list[Comparison]] = {}
    for comparison in comparisons:
        kind = (comparison.model, comparison.schedule.data, comparison.schedule.data_digest)
        groups.setdefault(kind, []).append(comparison)
    return list(groups.values())


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """Runs of one kind, put one behind the other; one alone is left as it is.

    Speedups and retention stay against the baseline of their own run. What differs between the runs is told in the
    remarks; where it is a text of the environment, it says there what holds for which run.
    """
    first, *others = comparisons
    if not others:
        return first
    names = [label(i) for i in range(len(comparisons))]
    runs = list(zip(comparisons, names, strict=True))
    sizes = sorted({size for one in comparisons for size in _sizes(one)})
    same_rounds = {one.schedule.rounds for one in comparisons} == {first.schedule.rounds}
    return first.model_copy(
        update={
            "environment": first.environment.model_copy(update=_environment(comparisons, names)),
            "schedule": first.schedule.model_copy(
                update={
                    "batch_size": sizes[0] if len(sizes) == 1 else sizes,
                    "rounds": max(one.schedule.rounds for one in comparisons),
                    "order": first.schedule.order if same_rounds else [],
                }
            ),
            "interrupted": any(one.interrupted for one in comparisons),
            "results": [_named(case, name) for one, name in runs for case in one.results],
            "failures": [_named(case, name) for one, name in runs for case in one.failures],
            "unevaluated": [_named(case, name) for one, name in runs for case in one.unevaluated],
            "remarks": _remarks(comparisons, names),
            "run_directory": None,
        }
    )


def label(place: int) -> str:
    """A, B, …, Z, A2, B2, …"""
    turn, letter = divmod(place, len(ascii_uppercase))
    return ascii_uppercase[letter] + (str(turn + 1) if turn else "")


def differences(comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """What is not the same in all runs, by its name: one text for each run."""
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
        "seed": schedule.seed,
        "rounds": schedule.rounds,
        "runs": schedule.runs,
        "warmup": schedule.warmup,
        "least time": schedule.min_time,
        "batch size": schedule.batch_size,
        "new tokens": schedule.max_new_tokens,
        "samples asked": schedule.samples,
    }


def _remarks(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    where = [f"{name}: {one.run_directory}" for one, name in zip(comparisons, names, strict=True)]
    lines = [f"runs {'; '.join(where)}. Speedups and retention are against the baseline of the same run"]
    for fact, values in differences(comparisons).items():
        lines.append(f"{fact} differs: {', '.join(f'{v} ({name})' for v, name in zip(values, names, strict=True))}")
    if len(lines) == 1:
        lines.append("nothing that was written down differs between the runs")
    return lines + [remark for one in comparisons for remark in one.remarks]


def _environment(comparisons: Sequence[Comparison], names: Sequence[str]) -> dict[str, str]:
    """Texts of the environment that differ, with the runs that each holds for."""
    found = {}
    for field in type(comparisons[0].environment).model_fields:
        values = [getattr(one.environment, field) for one in comparisons]
        if all(isinstance(value, str) for value in values) and len(set(values)) > 1 and field != "git_commit":
            found[field] = ", ".join(f"{value} ({name})" for value, name in zip(values, names, strict=True))
    return found


def _sizes(comparison: Comparison) -> list[int]:
    sizes = comparison.schedule.batch_size
    return sizes if isinstance(sizes, list) else [sizes]


def _named(case: NamedCase, run: str) -> NamedCase:
    return case.model_copy(update={"case": case.case.model_copy(update={"run": run})})
