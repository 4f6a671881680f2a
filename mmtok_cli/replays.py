"""From what a method keeps to a file of selections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_scale import chooses_size
from mmtok_cli.kept import Kept, KeptFile
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Reduced
from mmtok_cli.stages import unwatched
from mmtok_cli.tokens import Selection

OneSample = tuple[Sample, Reduced, Sequence[Selection]]


def require_exportable(case: Case) -> None:
    """Raises MMTokError for a method that makes images smaller itself: a replay would not know to which size."""
    if chooses_size(case.method):
        raise MMTokError(
            f"{case.name} makes images smaller itself, which a file of kept tokens does not say",
            "omit --export, or use --method full --image-scale 0.5 for a smaller image",
        )


def selections_of(model: VisionLanguageModel, case: Case, sample: Sample) -> OneSample:
    """What is left of each image of a sample after the last reduction."""
    reduced = case.reduce(model, [sample])
    if not reduced.cuts:
        return sample, reduced, reduced.selections
    answers = case.answer(model, [sample], 1, unwatched, encodings=True)  # only a prompt that is read drops tokens
    return sample, answers.reduced, answers.selections


def kept_file(
    model: VisionLanguageModel, case: Case, found: Iterable[OneSample]
) -> tuple[KeptFile, dict[int, tuple[Tensor, Tensor | None]]]:
    """The selections as a file, each once, and the rows of those that are not rows of the image."""
    selections: dict[tuple[str, str], Kept] = {}
    rows: dict[int, tuple[Tensor, Tensor | None]] = {}
    for sample, reduced, kept in found:
        for name, image, selection in zip(sample.image_ids, reduced.images, kept, strict=True):
            key = (name, sample.question)
            if key in selections:
                continue
            indices = tuple(selection.indices.tolist())
            if selection.tokens is not None and has_own_rows(selection, image.vision.projected):
                rows[len(selections)] = (selection.tokens, selection.merged)
            selections[key] = Kept(image=name, question=sample.question, total=image.vision.total, indices=indices)
    file = KeptFile(
        model=model.name,
        method=case.name,
        parameters=case.id.parameters,
        budget=case.id.budget,
        image_scale=case.id.image_scale,
        acts=case.method.acts(),
        selections=tuple(selections.values()),
    )
    return file, rows


def has_own_rows(selection: Selection, projected: Tensor) -> bool:
    """Whether rows are kept that are not those of the image at the same places, such as merged ones."""
    if selection.tokens is None:
        return False
    merged = selection.merged is not None and bool(selection.merged.any())
    if merged or bool((selection.indices < 0).any()):
        return True
    return not bool((projected[selection.indices].to(selection.tokens.dtype) == selection.tokens).all())
