"""Pictures of the tokens that each case keeps, saved in the run directory for the HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image
from pydantic import Field

from mmtok_cli.data.images import open_image
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.per_sample import sample_predictions
from mmtok_cli.results.run_directory import read_file, validation_message
from mmtok_cli.results.schema import Record, from_json, json_text
from mmtok_cli.video import Video

if TYPE_CHECKING:
    from mmtok_cli.cases import Case
    from mmtok_cli.data.datasets import Dataset
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.models.base import VisionLanguageModel
    from mmtok_cli.progress import Progress
    from mmtok_cli.report.page import OverlayGroup
    from mmtok_cli.results.run_directory import RunDirectory
    from mmtok_cli.results.schema import SamplePrediction

FOLDER = "overlays"
INDEX = "index.json"
SAMPLES = 3
LONGEST_SIDE = 480  # pixels


class SavedOverlay(Record):
    """note: the answer. flip: what became of the unreduced model's answer, as in a SamplePrediction."""

    file: str = Field(pattern=r"^[0-9]+-[0-9]+\.webp$")  # within the folder
    caption: str
    note: str
    flip: str = ""


class SavedGroup(Record):
    """The pictures of one sample, side by side: the image itself, then what each case keeps.

    title: the question. references: the reference answers, in one line.
    """

    title: str
    pictures: list[SavedOverlay]
    references: str = ""


class OverlayIndex(Record):
    groups: list[SavedGroup]


def save_overlays(
    model: VisionLanguageModel, cases: Sequence[Case], dataset: Dataset, store: RunDirectory, progress: Progress
) -> None:
    """Draw what each case of the middle budget keeps of the first few images, unless they exist.

    A case that fails is left out, with a note. Raises NotWrittenError where pictures cannot be written.
    """
    from mmtok_cli.panels import unreduced

    if has_overlays(store.path):
        return
    chosen = dict(_of_middle_budget(cases))
    predictions = list(sample_predictions(store))
    groups = []
    for number, sample in _different(dataset.samples):
        pictures = []
        for place, case in chosen.items():
            if place in store.failures:
                continue
            drawn, problem = _drawn(model, case, sample)
            if drawn is None:
                progress.note(f"{case.id.label} is not drawn for sample {number + 1}: {problem}")
                continue
            pictures.append(_saved(store, drawn, number, place, str(case), predictions))
        if pictures:
            first = store.plan.baseline_of(next(iter(chosen)))
            image = unreduced(sample.images[0])
            image.thumbnail((LONGEST_SIDE * _across(sample, 1), LONGEST_SIDE))
            pictures.insert(0, _saved(store, image, number, first, str(cases[first]), predictions))
            references = " / ".join(dict.fromkeys(sample.references))
            groups.append(SavedGroup(title=sample.question, references=references, pictures=pictures))
    index = OverlayIndex(groups=groups)
    store.write_file(f"{FOLDER}/{INDEX}", lambda part: part.write_text(json_text(index), encoding="utf-8"))


def _saved(
    store: RunDirectory, drawn: Image, number: int, place: int, caption: str, predictions: Sequence[SamplePrediction]
) -> SavedOverlay:
    """Write the picture of a case, with what the case answered; nothing where it was not evaluated.

    number: of the sample. place: of the case in the plan.
    """
    name, case = f"{number:06d}-{place:03d}.webp", store.plan.cases[place].case
    store.write_file(f"{FOLDER}/{name}", partial(drawn.save, format="WEBP"))
    wanted = (number, case.method, case.parameters, case.budget, case.again, case.draft, case.image_scale)
    for p in predictions:
        if (p.sample, p.method, p.parameters, p.budget, p.again, p.draft, p.image_scale) == wanted:
            return SavedOverlay(file=name, caption=caption, note=f"“{p.prediction}”", flip=p.flip)
    return SavedOverlay(file=name, caption=caption, note="")


def has_overlays(run: Path) -> bool:
    return (run / FOLDER / INDEX).exists()


def read_overlays(run: Path) -> list[OverlayGroup]:
    """The pictures of a run, none where none were drawn. Raises MMTokError for those that cannot be read."""
    from mmtok_cli.report.page import Overlay, OverlayGroup

    folder = run / FOLDER
    if not (os.path.lexists(folder / INDEX) or folder.is_file()):
        return []
    try:
        index = from_json(OverlayIndex, read_file(folder / INDEX), strict=True)
        return [
            OverlayGroup(
                g.title,
                [Overlay(p.caption, _opened(run, p.file), p.note, p.flip) for p in g.pictures],
                g.references,
            )
            for g in index.groups
        ]
    except ValueError as error:
        raise MMTokError(
            f"{folder / INDEX} cannot be read: {validation_message(error)}", "delete the directory to omit the pictures"
        ) from error
    except MMTokError as error:
        raise MMTokError(error.message, f"delete {folder} to omit the pictures") from error


def _opened(run: Path, name: str) -> Image:
    """A picture of a run. Raises MMTokError for one that cannot be read, and for a file elsewhere or a link to it."""
    path = run / FOLDER / name
    if path.resolve().parent != (run / FOLDER).resolve() or not path.resolve().is_relative_to(run.resolve()):
        raise MMTokError(f"{path} is not one of the pictures of the run")
    return open_image(path, read_file(path))


def _of_middle_budget(cases: Sequence[Case]) -> Iterator[tuple[int, Case]]:
    """Cases of the first batch size that take a budget, at the middle one of those named, and their places."""
    budgets = list(dict.fromkeys(case.budget for case in cases if case.budget is not None))
    for place, case in enumerate(cases):
        if budgets and case.budget == budgets[len(budgets) // 2] and case.batch_size == cases[0].batch_size:
            yield place, case


def _different(samples: Sequence[Sample]) -> Iterator[tuple[int, Sample]]:
    """The first samples whose image can be read, each about another image, and their numbers."""
    seen: set[tuple[str, ...]] = set()
    for number, sample in enumerate(samples):
        if len(seen) == SAMPLES:
            return
        if sample.image_ids in seen:
            continue
        try:
            opened = sample.open()
        except MMTokError:
            continue
        seen.add(sample.image_ids)
        yield number, opened


def _drawn(model: VisionLanguageModel, case: Case, sample: Sample) -> tuple[Image | None, str]:
    """What the case keeps of the sample's first image, or why it cannot be drawn."""
    from mmtok_cli.cases import failure_of, release_memory

    try:
        return _draw(model, case, sample), ""
    except Exception as error:
        problem = failure_of(error)["message"]
    release_memory(model.device)  # only here, since the error holds on to the memory of the failed run
    return None, problem


def _draw(model: VisionLanguageModel, case: Case, sample: Sample) -> Image:
    from mmtok_cli.panels import draw, lay_out
    from mmtok_cli.stages import unwatched

    reduced = case.reduce(model, [sample])
    selections = reduced.selections
    if reduced.cuts:  # what is dropped inside the language model is known only when the prompt has been read
        said = case.answer(model, [sample], 1, unwatched)
        reduced, selections = said.reduced, said.selections
    shown = lay_out(model, reduced, selections[0])
    drawn = draw(reduced.prompt.images[0], shown)
    drawn.thumbnail((LONGEST_SIDE * _across(sample, len(shown)), LONGEST_SIDE))
    return drawn


def _across(sample: Sample, panels: int) -> int:
    """How many times as wide as high a picture may be: as many as it has panels, or twice for a sheet of frames."""
    return 2 if isinstance(sample.images[0], Video) else panels
