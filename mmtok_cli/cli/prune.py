"""`mmtok prune`: which vision tokens are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtok_cli.cli.options import (
    OUTPUT,
    PLOTS,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    ImageArgument,
    JsonOption,
    MethodOption,
    ModelOption,
    QuestionArgument,
    QuietOption,
    SeedOption,
)


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
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which vision tokens a method keeps, drawn over the image.

    [dim]mmtok prune img.jpg "What color is the car?" --budget 64 --output kept.png[/dim]
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.cli.session import make_case, open_model, require_methods
    from mmtok_cli.data.samples import sample_from_file
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.files import require_writable

    require_methods([method])
    wanted = Budget.parse(budget)
    if output:
        require_writable(output, (".png", ".jpg", ".jpeg", ".webp"), "--output")
    if gain_curve:
        require_writable(gain_curve, PLOTS, "--gain-curve")
    written = [path.resolve() for path in (image, output, gain_curve) if path]
    if len(set(written)) < len(written):
        raise MMTokError("one file would be written over another, or over the image", "give each a name of its own")
    sample = sample_from_file(image, question)
    case = make_case(method, wanted, model, seed)
    vlm = open_model(model, device, dtype, quiet)

    from mmtok_cli.bench.clock import Clock
    from mmtok_cli.pipeline import reduce
    from mmtok_cli.report import console as report
    from mmtok_cli.report.catalogues import kept_map
    from mmtok_cli.report.overlay import overlay, save_image

    reduce(vlm, case.method, [sample], case.budget)  # a first run, not timed
    clock = Clock(vlm.device)
    reduced = reduce(vlm, case.method, [sample], case.budget, stage=clock.stage)
    vision, selection, tokens = reduced.vision[0], reduced.selections[0], reduced.tokens[0]
    indices = selection.indices.tolist()
    order = None if selection.order is None else selection.order.tolist()
    gains = None if selection.gains is None else selection.gains.tolist()
    if gain_curve and gains is None:
        if tokens.kept == tokens.total:
            raise MMTokError("everything was kept, so there are no gains to plot", "choose a smaller --budget")
        raise MMTokError(f"{method} has no gains to plot", "use --method mmtok, or leave --gain-curve out")

    picture = sample.images[0]
    if output:
        save_image(overlay(picture, vlm.patch_boxes(picture, vision.grid), indices, order, mark), output)
    if gain_curve and gains is not None:
        from mmtok_cli.report.plots import save_gain_curve

        save_gain_curve(gains, gain_curve, f"{case}, {tokens.kept} of {tokens.total} tokens")
    seconds = {stage: value for stage, value in clock.seconds().items() if stage != "total"}
    if as_json:
        entry = {
            "path": str(image),
            "width": picture.width,
            "height": picture.height,
            "grid": list(vision.grid),
            "total": tokens.total,
            "kept": tokens.kept,
            "indices": indices,
        }
        entry |= {"order": order} if order is not None else {}
        entry |= {"gains": gains} if gains is not None else {}
        shown = None if case.budget is None else str(case.budget)
        head = {"schema": "mmtok.prune/1", "model": model, "method": method, "budget": shown}
        report.print_json(head | {"images": [entry], "seconds": seconds})
        return
    out = report.results_console()
    how = "kept" if selection.tokens is None else "left, averages of all,"
    out.print(f"{tokens.kept} of {tokens.total} vision tokens {how} by {case} ({vision.grid[0]}x{vision.grid[1]} grid)")
    if out.width >= 3 * vision.grid[1]:
        out.print(kept_map(vision.grid, indices, order, mark, vision.eligible.tolist()))
    for path in filter(None, (output, gain_curve)):
        out.print(f"wrote {report.printable(path)}", soft_wrap=True)
