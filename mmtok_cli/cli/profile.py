"""`mmtok profile`: where the time and the memory go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmtok_cli.cli.options import OUTPUT, PLOTS, JsonOption, QuietOption, given_options, with_options
from mmtok_cli.option_values import image_size
from mmtok_cli.settings import MEASUREMENT, USUAL_IMAGE, ProfileSettings, require_consistent

if TYPE_CHECKING:
    from mmtok_cli.data.samples import Sample
    from mmtok_cli.profiling import Profiled

SCALING_TOKENS = "576,1024,2304,4096,9216,16384"
SCALING_FRAMES = "8,16,32,64"


@with_options(ProfileSettings)
def profile(
    context: typer.Context,
    settings: ProfileSettings,
    image: Annotated[
        Path | None, typer.Argument(help="Image file. Default: a drawn scene.", show_default=False)
    ] = None,
    question: Annotated[
        str, typer.Argument(help="Question about the image. Default: one about the scene.", show_default=False)
    ] = "What is in the image?",
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Also time selection and prefill against the number of vision tokens.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    scaling_tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of vision tokens for --scaling; square numbers. Default: {SCALING_TOKENS}.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    scaling_frames: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of frames for --scaling on a video. Default: {SCALING_FRAMES}.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Operators to list per stage.", rich_help_panel=OUTPUT)] = 5,
    trace_dir: Annotated[
        Path, typer.Option(help="Directory for the traces of torch.profiler.", rich_help_panel=OUTPUT)
    ] = Path("traces"),
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot of the results of --scaling (.png, .svg, .pdf).", rich_help_panel=OUTPUT),
    ] = None,
    exports: Annotated[
        list[Path] | None,
        typer.Option(
            "--export",
            help="Also write the results to a file (.json, .csv, .md, .html). Repeatable.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time every stage with and without reduction, and write torch profiler traces of both.

    Timing and tracing happen in separate runs, because a profiler adds overhead. Where the weights are missing or the model does not fit, its true architecture is measured with random weights, in bfloat16 or with fewer decoder layers, within --max-time; the results say so.

    With --engine vllm, requests are sent to one engine, with and without reduction in random order: throughput, latency and where the time goes, for each number of requests in flight.

    [dim]mmtok profile --methods mmtok,divprune --budget 64 --scaling --plot scaling.png[/dim]
    [dim]mmtok profile --engine vllm --methods mmtok,random --budget 64 --concurrency 1,4,16[/dim]
    """  # noqa: E501 (a paragraph is one line, so that help wraps it)
    from mmtok_cli.cli.engine import chosen_engine
    from mmtok_cli.cli.engine import profile as profile_engine
    from mmtok_cli.cli.showing import profile_exports, save_scaling_plot
    from mmtok_cli.data.samples import demo_samples, resized, sample_from_file
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.outputs import check_outputs, model_inputs, outputs_of
    from mmtok_cli.profiles import is_demo
    from mmtok_cli.profiling import profile as measure
    from mmtok_cli.report.console import ConsoleProgress, attempt_all, print_error, print_json
    from mmtok_cli.report.exports import EXPORTS
    from mmtok_cli.report.profiles import profile_notes

    engine = chosen_engine(context, settings)
    require_consistent(settings, given_options(context, ProfileSettings))
    for option, value in (("plot", plot), ("scaling-tokens", scaling_tokens), ("scaling-frames", scaling_frames)):
        if value is not None and not scaling:
            raise MMTokError(f"--{option} requires --scaling", "add --scaling")
    if image and settings.data is not None:
        raise MMTokError("an image and --data cannot be combined", "give one of them")
    drawn = image is None and settings.data is None
    size = settings.image_size or (USUAL_IMAGE if drawn and not is_demo(settings.model) else None)
    inputs = model_inputs(settings.model, *([image] if image else []))
    if engine != "transformers":
        asked = sample_from_file(image, question, sampling=settings.sampling) if image else None
        profile_engine(settings, asked, size, exports or [], inputs, as_json, quiet)
        return
    sample = demo_samples(1)[0] if image is None else sample_from_file(image, question, sampling=settings.sampling)
    if size:
        sample = resized(sample, image_size(size))
    sizes, longest = _scaling_sizes(sample, image, settings, scaling_tokens, scaling_frames) if scaling else ([], None)
    files = [("--export", path, EXPORTS) for path in exports or []]
    outputs = outputs_of([("--trace-dir", trace_dir, ()), ("--plot", plot, PLOTS), *files])
    check_outputs(outputs, inputs)
    data = "demo" if image is None else str(image)
    found = measure(settings, sample, data, trace_dir, ConsoleProgress(quiet), scaling_sizes=sizes, longest=longest)
    notes = profile_notes(found.profile, settings, found.planned_rounds, sizes, found.context_length)
    parts = profile_exports(found.profile, exports or [], quiet, notes, top)
    if plot:
        parts.append(partial(save_scaling_plot, found.profile, plot, quiet))
    if as_json:
        parts.append(partial(print_json, found.profile))
    else:
        parts.append(partial(_show, found, notes, sizes, top, quiet))
    done = attempt_all(parts)
    for problem in found.problems:
        print_error(problem)
    if found.profile.interrupted:
        raise typer.Exit(130)
    if not done or found.problems:
        raise typer.Exit(1)


def _scaling_sizes(
    sample: Sample, path: Path | None, settings: ProfileSettings, tokens: str | None, frames: str | None
) -> tuple[list[int], Sample | None]:
    """Numbers of vision tokens; of a video, of frames, and the sample with as many frames as the largest of them.

    Raises MMTokError for an option that is not for the sample, and for numbers that are not valid.
    """
    from mmtok_cli.data.samples import sample_from_file
    from mmtok_cli.errors import MMTokError
    from mmtok_cli.timing.scaling import parse_frames, parse_tokens
    from mmtok_cli.video import Sampling

    if not sample.has_video or path is None:
        if frames is not None:
            raise MMTokError("--scaling-frames is for videos", "use --scaling-tokens, or give a video")
        return parse_tokens(SCALING_TOKENS if tokens is None else tokens), None
    if tokens is not None:
        raise MMTokError("--scaling-tokens is for images", "use --scaling-frames")
    numbers = parse_frames(SCALING_FRAMES if frames is None else frames)
    longest = Sampling(frames=max(numbers), folder_fps=settings.folder_fps)
    return numbers, sample_from_file(path, sample.question, sampling=longest)


def _show(found: Profiled, lines: Sequence[str], sizes: Sequence[int], top: int, quiet: bool) -> None:
    """Tables on standard output, notes on standard error."""
    from mmtok_cli.cli.showing import tell_written
    from mmtok_cli.report import console, tables
    from mmtok_cli.report.profiles import ceiling_table, head_lines, profile_tables, profiles_by_batch_size
    from mmtok_cli.report.scaling import growth_table, scaling_table
    from mmtok_cli.report.text import printable, printable_record

    result = printable_record(found.profile)
    out, notes = console.results_console(), console.notes_console(quiet)
    for line in head_lines(result):
        out.print(line, markup=False, highlight=False)
    for part in profiles_by_batch_size(result):
        for table in profile_tables(part):
            out.print(table)
    if result.ceilings:
        out.print(ceiling_table(result, result.ceilings))
    for case in dict.fromkeys(operator.case for operator in result.operators):
        out.print(tables.operator_table([each for each in result.operators if each.case == case], top))
    if sizes:
        out.print(scaling_table(result.scaling))
        out.print(growth_table(result.growth, sorted({point.tokens for point in result.scaling})))
    out.print(tables.environment_line(result.model, result.environment))
    written = [trace.path for trace in found.traces if trace.path]
    for path in written:
        tell_written(path, quiet)
    for note in lines:
        notes.print(f"• {printable(note)}")
    if written:
        notes.print(f"• open the traces with `tensorboard --logdir {result.trace}`, tab PyTorch Profiler,")
        notes.print("  or open one of the files at https://ui.perfetto.dev. Both need the internet;")
        notes.print("  --export page.html does not")
