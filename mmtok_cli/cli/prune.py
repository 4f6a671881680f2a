"""`mmtok prune`: which vision tokens are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmtok_cli.cli.options import (
    OUTPUT,
    PLOTS,
    AttentionOption,
    BudgetMeansOption,
    BudgetOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ImageArgument,
    JsonOption,
    LayersOption,
    MethodOption,
    ModelOption,
    PositionsOption,
    QuestionArgument,
    QuietOption,
    SeedOption,
    SetOption,
    TrackOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from mmtok_cli.cases import Case
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.models.base import VisionLanguageModel
    from mmtok_cli.pipeline import Reduced
    from mmtok_cli.tokens import Selection

TIMED = ("prepare", "encode", "select", "prefill")


def prune(
    image: ImageArgument,
    question: QuestionArgument,
    model: ModelOption = "demo",
    method: MethodOption = "mmtok",
    budget: BudgetOption = "64",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Picture of the kept patches (.png, .jpg, .webp).", rich_help_panel=OUTPUT),
    ] = None,
    gain_curve: Annotated[
        Path | None,
        typer.Option(
            help="Plot of the coverage reached against tokens kept (.png, .svg, .pdf).", rich_help_panel=OUTPUT
        ),
    ] = None,
    mark: Annotated[int, typer.Option(min=0, max=99, help="First picks to number.", rich_help_panel=OUTPUT)] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "pretrained",
    layers: LayersOption = None,
    attention: AttentionOption = "sdpa",
    device_map: DeviceMapOption = None,
    track: TrackOption = "released",
    positions: PositionsOption = None,
    budget_means: BudgetMeansOption = "final",
    settings: SetOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which vision tokens a method keeps, drawn over the image.

    [dim]mmtok prune img.jpg "What color is the car?" --budget 64 --output kept.png[/dim]
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.cli.session import make_case, make_setup, open_model
    from mmtok_cli.data.samples import sample_from_file
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.files import require_writable

    setup = make_setup(
        [method], model, seed, track=track, positions=positions, budget_means=budget_means, settings=settings
    )
    wanted = Budget.parse(budget)
    if output:
        require_writable(output, (".png", ".jpg", ".jpeg", ".webp"), "--output")
    if gain_curve:
        require_writable(gain_curve, PLOTS, "--gain-curve")
    written = [path.resolve() for path in (image, output, gain_curve) if path]
    if len(set(written)) < len(written):
        raise MMTokError("one file would be written over another, or over the image", "give each a name of its own")
    sample = sample_from_file(image, question)
    case = make_case(method, wanted, setup)
    vlm = open_model(model, device, dtype, weights, quiet, layers=layers, attention=attention, device_map=device_map)

    from mmtok_cli.cli.panels import draw, lay_out
    from mmtok_cli.report import console as report
    from mmtok_cli.report.catalogues import kept_map
    from mmtok_cli.report.overlay import save_image
    from mmtok_cli.report.tables import part_text, rules_text, weights_text
    from mmtok_cli.tokens import CLASS_TOKEN

    reduced, selection, seconds = _reduce(vlm, case, sample)
    vision, tokens = reduced.vision[0], reduced.tokens[0]
    indices = selection.places.tolist()
    order = None if selection.order is None else [place for place in selection.order.tolist() if place >= 0]
    merged = [] if selection.merged is None else selection.indices[selection.merged].tolist()
    gains = None if selection.gains is None else selection.gains.tolist()
    if gain_curve and gains is None:
        if tokens.kept == tokens.total:
            raise MMTokError("everything was kept, so there are no gains to plot", "choose a smaller --budget")
        raise MMTokError(f"{method} has no gains to plot", "use --method mmtok, or leave --gain-curve out")

    part = (vlm.loaded_layers, vlm.layer_count) if vlm.loaded_layers < vlm.layer_count else None
    picture = sample.images[0]
    shown = lay_out(vlm, reduced, selection)
    if output:
        save_image(draw(picture, shown, mark), output)
    if gain_curve and gains is not None:
        from mmtok_cli.report.plots import save_gain_curve

        save_gain_curve(gains, gain_curve, f"{case}, {tokens.kept} of {tokens.total} tokens")
    if as_json:
        entry = {
            "path": str(image),
            "width": picture.width,
            "height": picture.height,
            "grid": list(shown[0].panel.grid),
            "total": tokens.total,
            "kept": tokens.kept,
            "layer_average": tokens.layer_average,
            "indices": indices,
            "merged": sorted(merged),
            "class_token": bool((selection.indices == CLASS_TOKEN).any()),
        }
        entry |= {"order": order} if order is not None else {}
        entry |= {"gains": gains} if gains is not None else {}
        if len(shown) > 1:
            entry["panels"] = [{"title": s.panel.title, "grid": list(s.panel.grid), "kept": s.kept} for s in shown]
        asked = None if case.budget is None else str(case.budget)
        head = {"schema": "mmtok.prune/1", "model": model, "weights": weights, "method": method, "budget": asked}
        rules: dict[str, Any] = {"rules": asdict(setup.rules), "positions": reduced.positions}
        if part:
            rules["layers"] = list(part)
        report.print_json(head | rules | {"images": [entry], "seconds": seconds})
        return
    out = report.results_console()
    out.print(_sentence(case, reduced, selection, [each.panel.grid for each in shown]), soft_wrap=True)
    for remark in filter(None, (rules_text(setup.rules, settings), weights_text(vlm.weights), part_text(part))):
        out.print(remark, style="dim", markup=False)
    for each in shown:
        panel = each.panel
        if out.width >= 3 * panel.grid[1]:
            if panel.title:
                out.print(panel.title, style="bold")
            eligible = vision.eligible[list(panel.tokens)].tolist()
            out.print(kept_map(panel.grid, each.kept, each.order, mark, eligible, each.merged))
    for path in filter(None, (output, gain_curve)):
        out.print(f"wrote {report.printable(path)}", soft_wrap=True)


def _reduce(vlm: VisionLanguageModel, case: Case, sample: Sample) -> tuple[Reduced, Selection, dict[str, float]]:
    """The sample's image reduced, what is left of it, and the seconds of each stage in a run after a first one.

    What a method drops inside the language model is known only when the prompt has been read.
    """
    from mmtok_cli.pipeline import answer, reduce
    from mmtok_cli.timing.clock import Clock
    from mmtok_cli.timing.partial import last_layer, missing_layers, of_whole_model

    asked = (vlm, case.method, [sample], case.budget)
    inside = bool(reduce(*asked, rules=case.rules).cuts)
    if inside:
        answer(*asked, rules=case.rules, max_new_tokens=1)
    clock = Clock(vlm.device)
    with last_layer(vlm, clock.now) as spans:
        said = answer(*asked, rules=case.rules, max_new_tokens=1, stage=clock.stage) if inside else None
    if said:
        reduced, selections = said.reduced, said.selections
    else:
        reduced = reduce(*asked, rules=case.rules, stage=clock.stage)
        selections = reduced.selections
    stages = of_whole_model(clock.stages(), clock.sums(spans), missing_layers(vlm))
    seconds = {stage: value for stage, value in stages.items() if stage in TIMED}
    return reduced, selections[0], seconds


def _sentence(case: Case, reduced: Reduced, selection: Selection, grids: Sequence[tuple[int, int]]) -> str:
    """How many tokens are left, in words that hold for methods that merge too."""
    from mmtok_cli.report.units import number
    from mmtok_cli.tokens import CLASS_TOKEN

    tokens = reduced.tokens[0]
    more = ""
    if selection.merged is not None and bool(selection.merged.any()):
        merged, classes = int(selection.merged.sum()), int((selection.indices == CLASS_TOKEN).sum())
        tokens_of_class = "one the class token" if classes == 1 else f"{classes} class tokens"
        more += f", {merged} of them merged" + (f" and {tokens_of_class}" if classes else "")
    if reduced.cuts:
        more += f", {number(round(tokens.layer_average, 1))} on average over the decoder layers"
    shapes = " and ".join(f"{rows}x{columns}" for rows, columns in grids)
    return f"{tokens.kept} of {tokens.total} vision tokens kept by {case}{more} ({shapes} grid{'s' * (len(grids) > 1)})"
