"""What a data type below float32 changes about selections: the same features, scored once more in float32.

Features are those of the model in its data type; what is compared is the arithmetic of the selection alone, not a model
that runs in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError
from mmtok_cli.results.run_directory import read_file
from mmtok_cli.results.schema import Record, from_json, json_text
from mmtok_cli.tokens import TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor

    from mmtok_cli.cases import Case
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.models.base import VisionLanguageModel
    from mmtok_cli.results.run_directory import RunDirectory

FILE = "precision.json"
SAMPLES = 4


class Overlap(Record):
    """Of the `kept` tokens that a case keeps of some samples, `same` are kept in float32 too."""

    case: int
    kept: int
    same: int


class Overlaps(Record):
    """dtype: of the model, as in "bfloat16"."""

    dtype: str
    samples: int
    cases: list[Overlap]


def measure_overlaps(model: VisionLanguageModel, cases: Sequence[Case], samples: Sequence[Sample]) -> Overlaps | None:
    """How much of each selection before the language model is the same in float32, over the first samples.

    None where there is nothing to compare: in float32, on the harmonised track, which scores in float32, and without a
    method that selects. Cases that differ in batch size only are measured once, and those that fail are left out.
    """
    import torch

    chosen = {
        number: case
        for number, case in enumerate(cases)
        if case.method.selects() and case.budget is not None and case.rules.track == "released"
        if case.batch_size == cases[0].batch_size and not case.id.again and case.id.draft is None
    }
    if model.dtype == torch.float32 or not chosen:
        return None
    found = []
    some = list(samples)[:SAMPLES]
    for number, case in chosen.items():
        try:
            pairs = [pair for sample in some for pair in _selections(model, case, sample.open())]
        except (MMTokError, RuntimeError):  # reported where the case is timed and evaluated
            continue
        kept = sum(len(mine) for mine, _ in pairs)
        found.append(Overlap(case=number, kept=kept, same=sum(len(mine & other) for mine, other in pairs)))
    return Overlaps(dtype=str(model.dtype).removeprefix("torch."), samples=len(some), cases=found) if found else None


def _selections(model: VisionLanguageModel, case: Case, sample: Sample) -> list[tuple[set[int], set[int]]]:
    """The places that are kept of each image, in the model's data type and in float32."""
    import torch

    from mmtok_cli.pipeline import select, selection_tasks

    with torch.inference_mode():
        reduced = case.reduce(model, [sample])
        texts = [_text(text) for text in model.text_tokens(reduced.prompt, case.rules.track)]
        plans = [image.plan for image in reduced.images]
        _, tasks = selection_tasks(case.method, [_wide(v) for v in reduced.vision], texts, plans, case.rules)
        again = select(case.method, tasks)
    return [(set(a.places.tolist()), set(b.places.tolist())) for a, b in zip(reduced.selections, again, strict=True)]


def _text(text: TextTokens) -> TextTokens:
    return replace(text, embed=lambda words: text.embed(words).float())


def _wide(vision: VisionTokens) -> VisionTokens:
    """The same features in float32."""
    crops = vision.crops and replace(vision.crops, tokens=tuple(map(_wide, vision.crops.tokens)))

    def project(rows: Tensor) -> Tensor:
        return vision.project(rows.to(vision.features.dtype)).float()

    return replace(
        vision,
        projected=vision.projected.float(),
        features=vision.features.float(),
        project=project,
        signals={name: values.float() for name, values in vision.signals.items()},
        deepstack=tuple(layer.float() for layer in vision.deepstack),
        crops=crops,
    )


def save_overlaps(store: RunDirectory, found: Overlaps) -> None:
    """Write what was found into the run directory. Raises NotWrittenError where it cannot be written."""
    store.write_file(FILE, lambda part: part.write_text(json_text(found), encoding="utf-8"))


def precision_remarks(store: RunDirectory) -> list[str]:
    """One line about the selections of a run in a data type below float32. Raises MMTokError for a damaged file."""
    path = store.path / FILE
    if not path.exists():
        return []
    try:
        found = from_json(Overlaps, read_file(path), strict=True)
    except ValueError as error:
        raise MMTokError(f"{path} cannot be read", "delete it to omit the note") from error
    known = [one for one in found.cases if 0 <= one.case < len(store.plan.cases)]
    differ = [
        f"{store.plan.cases[one.case].case.label} {one.same / one.kept:.2f}" for one in known if one.same < one.kept
    ]
    others = f"{len(known) - len(differ)} other cases" if differ else "all cases"
    rest = f"{others} keep the same tokens" if len(differ) < len(known) else ""
    return [
        f"selections score in {found.dtype}. Share of the tokens that are kept as well with the same features in "
        f"float32 (first {found.samples} samples): {'; '.join(filter(None, [', '.join(differ), rest]))}"
    ]
