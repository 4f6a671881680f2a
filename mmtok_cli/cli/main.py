"""`mmtok`: the application and how it fails."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from mmtok_cli import __version__
from mmtok_cli.cli import compare, infer, methods, models, profile, prune, report
from mmtok_cli.cli.commands import with_complete_command
from mmtok_cli.errors import MMTokError, UnloadableError, first_line, is_out_of_memory

# What Typer raises for a command line that it cannot read; the class has no public name.
UsageError = cast(type[Exception], typer.BadParameter.__base__)


ARGUMENTS = "mmtok_cli.arguments"  # of the command line, kept in the context of the command


class Commands(TyperGroup):
    """Turns a fault of the user's input into one clear line and exit status 2."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not args:
            return super().make_context(info_name, args, parent, **extra)  # prints the help
        given = tuple(args)  # parsing takes them out of the list
        try:
            context = super().make_context(info_name, args, parent, **extra)
            context.meta[ARGUMENTS] = given
            return context
        except UsageError as error:
            _refuse(_usage_error(error))
        except OSError as error:  # of printing the help
            _stop(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _refuse(_usage_error(error))
        except UnloadableError as error:
            _refuse(with_complete_command(error, ctx.meta[ARGUMENTS]))
        except MMTokError as error:
            _refuse(error)
        except OSError as error:
            _stop(error)
        except Exception as error:
            if is_out_of_memory(error):
                _refuse(MMTokError(f"out of memory: {first_line(error)}", "lower --batch-size, or free memory"), 1)
            _note_untested_release(error)
            raise


def _refuse(error: MMTokError, status: int = 2) -> NoReturn:
    from mmtok_cli.report.console import print_error

    print_error(error)
    raise typer.Exit(status) from error


def _stop(error: OSError) -> NoReturn:
    """End where standard output cannot be written or the disk is full. Any other error is a defect and raised."""
    from mmtok_cli.report.console import StandardOutputError, print_system_error

    if not isinstance(error, StandardOutputError) and error.errno != errno.ENOSPC:
        raise error
    print_system_error(error)
    raise typer.Exit(1) from error


def _usage_error(error: Any) -> MMTokError:
    """Typer's error in the words and the form of all others."""
    message = " ".join(error.format_message().split()).removesuffix(".")
    command = error.ctx.command_path if error.ctx else "mmtok"
    return MMTokError(message[:1].lower() + message[1:], f"`{command} --help` explains every option")


def _note_untested_release(error: Exception) -> None:
    """Say below the traceback that the installed transformers, if it was imported, was not tested."""
    hf = sys.modules.get("mmtok_cli.models.hf")
    if hf and not hf.is_tested():
        error.add_note(f'transformers {hf.VERSION} was not tested with mmtok; try: pip install "{hf.tested_range()}"')


QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "KINETO_LOG_LEVEL": "99",  # torch's profiler
    "TQDM_DISABLE": "1",
}

QUIET_LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=True,
)
app.command()(infer.infer)
app.command()(prune.prune)
app.command()(profile.profile)
app.command()(compare.compare)
app.command()(report.report)
app.command()(models.models)
app.command()(methods.methods)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def mmtok(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Benchmark and profile vision-token reduction in vision-language models."""
    # Log messages, progress bars and deprecation warnings of other libraries are not for the users of this command.
    # These variables are read when the libraries are imported, which happens later.
    for variable, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(variable, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["MPLBACKEND"] = "agg"  # plots are written to files; a notebook's backend is not installed here
    warnings.filterwarnings("ignore", category=FutureWarning)


def _discard_unwritten() -> None:
    """Drop what standard output and standard error did not take. It was dealt with; at its exit Python would try again
    and end with status 120."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # it was closed before the start
            continue
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what another encoding than UTF-8 cannot express
    try:
        app()
    finally:
        _discard_unwritten()
