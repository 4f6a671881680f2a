"""What the results of a page were measured on, as names and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmtok_cli.report import tables
from mmtok_cli.report.units import picture_size, plural

if TYPE_CHECKING:
    from mmtok_cli.results.schema import Comparison


def batch_sizes(comparison: Comparison) -> str:
    sizes = comparison.schedule.batch_size
    return " and ".join(map(str, sizes)) if isinstance(sizes, list) else str(sizes)


def environment_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What everything was measured on, as names and values."""
    e, s = comparison.environment, comparison.schedule
    timed = f" on {plural(s.timed, 'sample')}" if s.timed else ""
    commit = f"{e.git_commit}{' (changed)' if e.git_dirty else ''}" if e.git_commit else "not from a checkout"
    return [
        ("processor", e.processor),
        ("device", f"{e.device}, {plural(e.threads, 'thread')}"),
        ("weights", f"{e.weights}, {tables.settings_text(e)}"),
        *([("estimates", part)] if (part := tables.part_text(e.layers)) else []),
        (
            "data",
            f"{s.data}, {plural(s.samples, 'sample')}, batch size {batch_sizes(comparison)}, at most "
            f"{plural(s.max_new_tokens, 'new token')}",
        ),
        *([("videos", s.sampling)] if s.sampling else []),
        *([("image", f"{picture_size(s.image_size)} pixels")] if s.image_size else []),
        *([("lengths", lengths)] if (lengths := tables.lengths_text(s)) else []),
        *([("metric", f"{s.metric}: {s.metric_title}")] if s.metric else []),
        ("schedule", f"{plural(s.rounds, 'round')}{timed}, {s.warmup} for warm-up, in random order, seed {s.seed}"),
        ("rules", tables.rules_text(comparison.rules) or f"{comparison.rules.track} track"),
        ("versions", f"mmtok {e.mmtok}, torch {e.torch}, transformers {e.transformers}, Python {e.python}"),
        ("platform", e.platform),
        ("git commit", commit),
    ]
