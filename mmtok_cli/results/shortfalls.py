"""Whether a comparison is as good as it has to be."""

from __future__ import annotations

from mmtok_cli.results.schema import Comparison


def shortfalls(comparison: Comparison, stage: str, least: float) -> list[str]:
    """One line for each case whose speedup is not surely as large as it has to be; none if all are.

    A speedup surely is where the lower end of its 95 % interval is. A case that has no such interval, since it failed
    or ran in too few rounds, falls short.
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
        if speedup is None or speedup.low is None or speedup.high is None:
            lines.append(f"{name}: the speedup ({stage}) has no interval; it takes six rounds and a baseline")
        elif speedup.low < least:
            lines.append(
                f"{name}: the speedup ({stage}) is {speedup.median:.2f}x, {speedup.low:.2f} to {speedup.high:.2f} with "
                f"95 %, and has to be {least:g}x at least"
            )
    return lines
