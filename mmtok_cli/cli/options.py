"""Options that several commands share, spelled and explained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "Model"
REDUCTION = "Reduction"
DATA = "Data"
MEASUREMENT = "Measurement"
OUTPUT = "Output"

PLOTS = (".png", ".svg", ".pdf")

ImageArgument = Annotated[Path, typer.Argument(help="Image file.", show_default=False)]
QuestionArgument = Annotated[str, typer.Argument(help="Question about the image.", show_default=False)]

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Name (see `mmtok models`), hub id or directory.", rich_help_panel=MODEL)
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=MODEL)]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="random: the true architecture without its weights, for time and memory alone.",
        metavar="pretrained|random",
        rich_help_panel=MODEL,
    ),
]
LayersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Run the first so many decoder layers alone and estimate the times of the whole model.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
AttentionOption = Annotated[
    str,
    typer.Option(help="Attention kernel.", metavar="sdpa|eager|flash_attention_2", rich_help_panel=MODEL),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        help="auto: spread the model over all GPUs (with accelerate).",
        metavar="auto",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]

MethodOption = Annotated[
    str, typer.Option("--method", help="Reduction method (see `mmtok methods`).", rich_help_panel=REDUCTION)
]
BudgetOption = Annotated[
    str,
    typer.Option("--budget", "-b", help="Vision tokens kept per image: 64, or 10% of them.", rich_help_panel=REDUCTION),
]
TrackOption = Annotated[
    str,
    typer.Option(
        help="released: every method as its authors released it. harmonised: the same rules for all.",
        metavar="released|harmonised",
        rich_help_panel=REDUCTION,
    ),
]
PositionsOption = Annotated[
    str | None,
    typer.Option(
        help="Whether kept tokens keep their positions or are counted anew. Default: as the track says.",
        metavar="keep|renumber",
        show_default=False,
        rich_help_panel=REDUCTION,
    ),
]
BudgetMeansOption = Annotated[
    str,
    typer.Option(
        help="Whether a budget is what the last layer sees, or the mean over all decoder layers.",
        metavar="final|layer-average",
        rich_help_panel=REDUCTION,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Parameter of a method, as in fastv.layer=3 (see `mmtok methods NAME`). Repeatable.",
        metavar="METHOD.PARAM=VALUE",
        show_default=False,
        rich_help_panel=REDUCTION,
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of random draws.", rich_help_panel=REDUCTION)]

DataOption = Annotated[
    str,
    typer.Option(
        help="Samples to ask: demo, FILE.jsonl, pope:FILE, a folder of images, hub:NAME or hub:NAME:SPLIT.",
        rich_help_panel=DATA,
    ),
]
ImageRootOption = Annotated[
    Path | None,
    typer.Option(
        help="Where the image files of --data lie. Default: beside the file.", show_default=False, rich_help_panel=DATA
    ),
]
AskedOption = Annotated[
    str | None,
    typer.Option(
        "--question",
        help="What to ask of images without a question, or a frame around their own, which is {question} there.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        help="What --data calls image, question, answer, answers, id and kind.",
        metavar="FIELD=NAME,…",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
ExportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--export",
        help="Also write the results to a file (.json, .csv, .md, .html). Repeatable.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]

MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=MEASUREMENT)]
WarmupOption = Annotated[
    int, typer.Option(min=0, help="Runs of each case that are not counted.", rich_help_panel=MEASUREMENT)
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.", rich_help_panel=OUTPUT)]
