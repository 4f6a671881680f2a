"""`mmtok prune`: which vision tokens are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmtok_cli.cli.options import (
    OUTPUT,
    PLOTS,
    JsonOption,
    OptionalImageArgument,
    OptionalQuestionArgument,
    QuietOption,
    given_options,
    is_given,
    with_options,
)
from mmtok_cli.errors import MMTokError
from mmtok_cli.settings import CompareSettings, PruneSettings, option_name, require_replay_alone

if TYPE_CHECKING:
    from mmtok_cli.cases import Case
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.models.base import VisionLanguageModel
    from mmtok_cli.panels import Shown
    from mmtok_cli.profiling import Selected
    from mmtok_cli.replays import OneSample
    from mmtok_cli.video import Visual

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@with_options(PruneSettings)
def prune(
    context: typer.Context,
    settings: PruneSettings,
    image: OptionalImageArgument = None,
    question: OptionalQuestionArgument = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Picture of the kept patches (.png, .jpg, .webp).", rich_help_panel=OUTPUT),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="File of the kept tokens (.json, .safetensors), which --kept reads. See mmtok_cli/kept.py.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    gain_curve: Annotated[
        Path | None,
        typer.Option(
            help="Plot of the coverage reached against tokens kept (.png, .svg, .pdf).", rich_help_panel=OUTPUT
        ),
    ] = None,
    mark: Annotated[
        int, typer.Option(min=0, max=99, help="Number the first N selected tokens.", rich_help_panel=OUTPUT)
    ] = 8,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which vision tokens a method keeps, drawn over the image.

    [dim]mmtok prune img.jpg "What color is the car?" --budget 64 --output kept.png[/dim]
    """
    from mmtok_cli.cli.showing import save
    from mmtok_cli.configuration import configured_model, one_case, with_writer
    from mmtok_cli.data.samples import sample_from_file
    from mmtok_cli.kept import SUFFIXES, require_format, write_kept
    from mmtok_cli.outputs import check_outputs, model_inputs, outputs_of
    from mmtok_cli.panels import lay_out
    from mmtok_cli.profiling import time_selection
    from mmtok_cli.replays import kept_file, require_exportable
    from mmtok_cli.report.console import ConsoleProgress, attempt_all, print_json

    require_replay_alone(settings, given_options(context, PruneSettings))
    if settings.data is not None:
        others = {"IMAGE": image, "--output": output, "--gain-curve": gain_curve, "--json": as_json}
        _export_dataset(settings, export, [name for name, value in others.items() if value], quiet)
        return
    if image is None or question is None:
        what = "IMAGE" if image is None else "QUESTION"
        raise MMTokError(f"the argument {what} is missing", 'as in mmtok prune img.jpg "What color is the car?"')
    for option in ("image_root", "limit"):
        if is_given(context, option):
            raise MMTokError(f"{option_name(PruneSettings, option)} requires --data", "add --data, or omit it")
    case, _ = one_case(settings)
    if export:
        require_exportable(case)
    outputs = outputs_of(
        [("--output", output, PICTURES), ("--export", export, SUFFIXES), ("--gain-curve", gain_curve, PLOTS)]
    )
    check_outputs(outputs, model_inputs(settings.model, image, *([settings.kept] if settings.kept else [])))
    sample = sample_from_file(image, question, sampling=settings.sampling)
    model = configured_model(settings, ConsoleProgress(quiet), settings.layers)
    (case,) = with_writer([case], settings, ConsoleProgress(quiet))
    case.check(model, [sample])
    selected = time_selection(model, case, sample)
    gains = _gains(selected, case.name) if gain_curve else None
    shown = lay_out(model, selected.reduced, selected.selection)
    parts: list[Callable[[], object]] = []
    if output:
        parts.append(partial(_save_picture, selected.reduced.prompt.images[0], shown, mark, output, quiet))
    if export:
        kept = kept_file(model, case, [(sample, selected.reduced, [selected.selection])])
        require_format(export, case.name, kept[1])
        parts.append(partial(save, lambda: write_kept(export, *kept), export, quiet))
    if gain_curve and gains is not None:
        parts.append(partial(_save_gains, gains, case, selected, gain_curve, quiet))
    if as_json:
        entry = {"path": str(image)} | _entry(sample, selected, shown)
        result = _head(settings, model, case, selected) | {"images": [entry], "seconds": selected.seconds}
        parts.append(partial(print_json, result))
    else:
        parts.append(partial(_show, settings, model, case, selected, shown, mark))
    if not attempt_all(parts):
        raise typer.Exit(1)


def _export_dataset(settings: PruneSettings, export: Path | None, others: Sequence[str], quiet: bool) -> None:
    """Write what is kept of every image of a dataset. others: what was given and has no meaning here."""
    from mmtok_cli.cli.showing import save
    from mmtok_cli.configuration import configured_model, one_case, with_writer
    from mmtok_cli.data.datasets import open_dataset
    from mmtok_cli.kept import SUFFIXES, require_format, write_kept
    from mmtok_cli.outputs import check_outputs, comparison_inputs, outputs_of
    from mmtok_cli.replays import kept_file, require_exportable, selections_of
    from mmtok_cli.report.console import ConsoleProgress

    if export is None:
        raise MMTokError("--data requires --export", "add --export kept.json")
    if others:
        raise MMTokError(f"--data and {others[0]} contradict each other", f"omit --data, or {others[0]}")
    data = CompareSettings.of(model=settings.model, data=settings.data, image_root=settings.image_root)
    outputs = outputs_of([("--export", export, SUFFIXES)])
    check_outputs(outputs, comparison_inputs(data, None, outputs))
    case, _ = one_case(settings)
    require_exportable(case)
    dataset = open_dataset(
        settings.data or "",
        image_root=settings.image_root,
        limit=settings.limit,
        find_metric=False,
        sampling=settings.sampling,
    )
    progress = ConsoleProgress(quiet)
    for note in dataset.notes():
        progress.note(note)
    model = configured_model(settings, progress, settings.layers)
    (case,) = with_writer([case], settings, progress)
    case.check(model, (sample.open() for sample in dataset.samples))

    def selected() -> Iterator[OneSample]:
        """One sample after another: the vision tokens of all of them together may be more than memory holds."""
        with progress.task("selecting", len(dataset.samples)) as update:
            for number, sample in enumerate(dataset.samples, 1):
                found = selections_of(model, case, sample.open())
                require_format(export, case.name, kept_file(model, case, [found])[1])  # before the others run in vain
                yield found
                update(number)

    file, rows = kept_file(model, case, selected())
    save(lambda: write_kept(export, file, rows), export, quiet)


def _save_picture(picture: Visual, shown: list[Shown], mark: int, path: Path, quiet: bool) -> None:
    from mmtok_cli.cli.showing import save
    from mmtok_cli.panels import draw
    from mmtok_cli.report.overlay import save_image

    save(lambda: save_image(draw(picture, shown, mark), path), path, quiet)


def _save_gains(gains: list[float], case: Case, selected: Selected, path: Path, quiet: bool) -> None:
    from mmtok_cli.cli.showing import save
    from mmtok_cli.report.plots import save_gain_curve

    tokens = selected.reduced.tokens[0]
    save(partial(save_gain_curve, gains, path, f"{case}, {tokens.kept} of {tokens.total} tokens"), path, quiet)


def _gains(selected: Selected, method: str) -> list[float]:
    """What each pick added. Raises MMTokError if there is nothing to plot."""
    if selected.selection.gains is not None:
        return selected.selection.gains.tolist()
    tokens = selected.reduced.tokens[0]
    if tokens.kept == tokens.total:
        raise MMTokError("everything was kept, so there are no gains to plot", "choose a smaller --budget")
    raise MMTokError(f"{method} has no gains to plot", "use --method mmtok, or omit --gain-curve")


def _layers(model: VisionLanguageModel) -> tuple[int, int] | None:
    """Decoder layers that were run, and all of them, if these differ."""
    return (model.loaded_layers, model.layer_count) if model.loaded_layers < model.layer_count else None


def _entry(sample: Sample, selected: Selected, shown: list[Shown]) -> dict[str, Any]:
    """What is kept of the image, as plain data."""
    from mmtok_cli.tokens import CLASS_TOKEN

    selection, tokens, picture = selected.selection, selected.reduced.tokens[0], sample.images[0]
    entry: dict[str, Any] = {
        "width": picture.width,
        "height": picture.height,
        "grid": list(shown[0].panel.grid),
        "total": tokens.total,
        "kept": tokens.kept,
        "encoded": sum(tokens.encoded) or tokens.total,
        "layer_average": tokens.layer_average,
        "indices": selection.places.tolist(),
        "merged": [] if selection.merged is None else sorted(selection.indices[selection.merged].tolist()),
        "class_token": bool((selection.indices == CLASS_TOKEN).any()),
    }
    if selection.order is not None:
        entry["order"] = [place for place in selection.order.tolist() if place >= 0]
    if selection.gains is not None:
        entry["gains"] = selection.gains.tolist()
    if sample.frames:
        entry["frames"] = sample.frames[0]
    if len(shown) > 1:
        entry["panels"] = [{"title": s.panel.title, "grid": list(s.panel.grid), "kept": s.kept} for s in shown]
    return entry


def _head(settings: PruneSettings, model: VisionLanguageModel, case: Case, selected: Selected) -> dict[str, Any]:
    """What the image was reduced with, as plain data."""
    head: dict[str, Any] = {
        "schema": "mmtok.prune/1",
        "model": settings.model,
        "weights": settings.weights,
        "method": case.name,
        "parameters": case.id.parameters,
        "budget": case.id.budget,
        "image_scale": case.id.image_scale,
        "pixels": settings.pixels,
        "rules": asdict(settings.rules),
        "positions": selected.reduced.positions,
    }
    if layers := _layers(model):
        head["layers"] = list(layers)
    return head


def _show(
    settings: PruneSettings,
    model: VisionLanguageModel,
    case: Case,
    selected: Selected,
    shown: list[Shown],
    mark: int,
) -> None:
    from mmtok_cli.report.catalogues import kept_map, slices_table
    from mmtok_cli.report.console import results_console
    from mmtok_cli.report.tables import rules_text, short_text
    from mmtok_cli.report.text import printable

    out = results_console()
    out.print(printable(_sentence(case, selected, [each.panel.grid for each in shown])), soft_wrap=True)
    rules = rules_text(settings.rules, settings.parameters)
    short = short_text(selected.reduced.tokens[0])
    for remark in filter(None, (short, rules, *_model_remarks(model))):
        out.print(remark, style="dim", markup=False)
    if selected.reduced.vision[0].slices:
        out.print(slices_table([(s.panel.title, len(s.kept), len(s.panel.tokens)) for s in shown]))
        return
    for each in shown:
        panel = each.panel
        if out.width >= 3 * panel.grid[1]:
            if panel.title:
                out.print(panel.title, style="bold")
            eligible = selected.reduced.vision[0].eligible[list(panel.tokens)].tolist()
            out.print(kept_map(panel.grid, each.kept, each.order, mark, eligible, each.merged))


def _model_remarks(model: VisionLanguageModel) -> list[str]:
    """In what the model is not a whole, trained one."""
    remarks = ["random weights: which vision tokens are kept is not meaningful"] if model.weights == "random" else []
    if layers := _layers(model):
        remarks.append("only {} of {} decoder layers were run".format(*layers))
    return remarks


def _sentence(case: Case, selected: Selected, grids: list[tuple[int, int]]) -> str:
    """How many tokens are kept, and how many of them are merged or stand for no patch."""
    from mmtok_cli.report.units import number, plural
    from mmtok_cli.tokens import CLASS_TOKEN
    from mmtok_cli.video import Video

    selection, tokens = selected.selection, selected.reduced.tokens[0]
    more = ""
    if selection.merged is not None and bool(selection.merged.any()):
        merged, classes = int(selection.merged.sum()), int((selection.indices == CLASS_TOKEN).sum())
        tokens_of_class = "one the class token" if classes == 1 else f"{classes} class tokens"
        more += f", {merged} of them merged" + (f" and {tokens_of_class}" if classes else "")
    if selected.reduced.cuts:
        more += f", {number(round(tokens.layer_average, 1))} on average over the decoder layers"
    image = selected.reduced.prompt.images[0]
    if isinstance(image, Video):
        shape = f"{plural(len(grids), 'slice')} of {grids[0][0]}x{grids[0][1]}, {plural(len(image), 'frame')}"
    else:
        shape = " and ".join(f"{rows}x{columns}" for rows, columns in grids) + f" grid{'s' * (len(grids) > 1)}"
    return f"{tokens.kept} of {tokens.total} vision tokens kept by {case}{more} ({shape})"
