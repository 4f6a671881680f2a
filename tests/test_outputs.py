"""Where a command may write, that nothing measured is lost, and that no text takes control of what shows it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import QUESTION, refused, run, run_json
from comparisons import HOSTILE_TEXTS, case, comparison, is_harmless
from conftest import picture
from typer.testing import Result

from mmtok_cli.errors import MMTokError
from mmtok_cli.files import write_whole
from mmtok_cli.report.plots import save_gain_curve, save_tradeoff

BUDGET = ("-b", 4, "--max-new-tokens", 2, "--warmup", 0)


def contents(place: Path) -> dict[str, bytes]:
    """All files below a directory, links with what they lead to."""
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, its data and a copy of its model."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_directory, place / "model")
    (place / "images").mkdir()
    lines = []
    for number in range(4):
        picture(84, 84, number).save(place / "images" / f"{number}.png")
        lines.append(json.dumps({"image": f"images/{number}.png", "question": QUESTION, "answer": "no"}))
    (place / "data.json").write_text("\n".join(lines))
    shutil.copy(place / "images" / "0.png", place / "photo.png")
    measured = run("compare", *compare_options(place), "--run-dir", place / "run", "--export", place / "page.html")
    assert measured.exit_code == 0, measured.output
    return place


def compare_options(place: Path) -> tuple[object, ...]:
    options = (
        "-m",
        place / "model",
        "--data",
        place / "data.json",
        "--limit",
        2,
        "--rounds",
        2,
        "--methods",
        "uniform",
    )
    return (*options, *BUDGET)


@pytest.fixture()
def place(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "place")
    return tmp_path / "place"


def direct(target: Path, place: Path) -> Path:
    return target


def around(target: Path, place: Path) -> Path:
    return target.parent / ".." / target.parent.name / target.name


def symbolic(target: Path, place: Path) -> Path:
    link = place.parent / f"symbolic{target.suffix}"
    link.symlink_to(target)
    return link


def hard(target: Path, place: Path) -> Path:
    link = place.parent / f"hard{target.suffix}"
    link.hardlink_to(target)
    return link


def other_case(target: Path, place: Path) -> Path:
    return target.with_name(target.name.swapcase())


WAYS: list[Callable[[Path, Path], Path]] = [direct, around, symbolic, hard, other_case]

# The command, its option and the file that it must not overwrite.
TARGETS = {
    "prune: image": ("prune", "--output", "photo.png"),
    "prune: image by the curve": ("prune", "--gain-curve", "photo.png"),
    "profile: image": ("profile", "--plot", "photo.png"),
    "profile: model": ("profile", "--export", "model/config.json"),
    "compare: data": ("compare", "--export", "data.json"),
    "compare: image": ("compare", "--plot", "images/1.png"),
    "compare: image beyond the limit": ("compare", "--plot", "images/3.png"),
    "compare: model": ("compare", "--export", "model/tokenizer.json"),
    "compare: plan of a resumed run": ("resume", "--export", "run/plan.json"),
    "report: plan": ("report", "--export", "run/plan.json"),
    "report: result": ("report", "--export", "run/comparison.json"),
    "report: measurement": ("report", "--export", "run/rounds/00000-000.json"),
    "report: predictions": ("report", "--export", "run/predictions/000000.json"),
    "report: pictures": ("report", "--export", "run/overlays/index.json"),
}


def command(name: str, place: Path) -> tuple[object, ...]:
    return {
        "prune": ("prune", place / "photo.png", QUESTION, "-m", place / "model", "-b", 4),
        "profile": ("profile", place / "photo.png", "-m", place / "model", *BUDGET, "--scaling"),
        "compare": ("compare", *compare_options(place)),
        "resume": ("compare", "--run-dir", place / "run", "--resume"),
        "report": ("report", place / "run"),
    }[name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_and_no_record_is_overwritten(target: str, way: Callable[..., Path], place: Path) -> None:
    name, option, file = TARGETS[target]
    path = way(place / file, place)
    before = contents(place.parent)
    refused(run(*command(name, place), option, path), f"{option} {path}")
    assert contents(place.parent) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prune", ("--output", "a.png", "--gain-curve", "a.png")),
        ("prune", ("--output", "a.png", "--gain-curve", "x/../A.PNG")),
        ("compare", ("--export", "a.csv", "--export", "./a.csv")),
        ("compare", ("--export", "link.csv", "--export", "linked.csv")),
        ("compare", ("--export", "a.csv", "--export", "a.csv/b.csv")),
        ("compare", ("--run-dir", "a.csv", "--export", "a.csv")),
        ("report", ("--export", "a.csv", "--export", "A.csv")),
        ("profile", ("--trace-dir", "a.csv/traces", "--export", "a.csv")),
        ("profile", ("--export", "a.json", "--export", "a.json")),
    ],
)
def test_no_output_is_another_output(name: str, options: tuple[str, ...], place: Path) -> None:
    (place / "linked.csv").write_text("mine")
    (place / "link.csv").symlink_to(place / "linked.csv")
    before = contents(place.parent)
    paths = [option if option.startswith("--") else place / option for option in options]
    refused(run(*command(name, place), *paths), options[0], options[2])
    assert contents(place.parent) == before


@pytest.mark.parametrize(
    ("name", "option", "path"),
    [
        ("compare", "--export", "model/new.json"),
        ("compare", "--run-dir", "model"),
        ("compare", "--run-dir", "run/rounds"),
        ("profile", "--trace-dir", "model"),
        ("profile", "--trace-dir", "run/predictions"),
        ("profile", "--trace-dir", "photo.png"),
        ("prune", "--output", "run/overlays/000000-001.webp"),
        ("compare", "--export", "run/plan.json"),
        ("report", "--export", "run/rounds/results.csv"),
        ("report", "--export", "run/fifo.csv"),
    ],
)
def test_places_that_are_not_for_outputs(name: str, option: str, path: str, place: Path) -> None:
    os.mkfifo(place / "run" / "fifo.csv")
    before = sorted(place.parent.rglob("*"))
    refused(run(*command(name, place), option, place / path), f"{option} {place / path}")
    assert sorted(place.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("data", "option", "path"),
    [
        ("images", "--plot", "images/plot.png"),
        ("images", "--export", "images/new/deep/t.csv"),
        ("images", "--export", "linked/t.csv"),
        ("linked", "--export", "images/t.csv"),
        ("images", "--run-dir", "images"),
        ("images", "--run-dir", "images/new/run"),
        (".", "--run-dir", ""),  # the default
        ("images/*.png", "--plot", "images/plot.png"),
        ("**/*.png", "--plot", "new/plot.png"),
        ("imag*/*.png", "--plot", "linked/plot.png"),
        ("linked/../images/*.png", "--plot", "images/plot.png"),
        ("linked/*.png", "--plot", "images/plot.png"),
        ("**/*.webp", "--run-dir", "images/new"),
        ("**/*", "--run-dir", ""),
    ],
)
def test_no_output_becomes_a_part_of_the_data(
    data: str, option: str, path: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders and patterns of images, which are read again when the run is resumed."""
    monkeypatch.chdir(place)
    (place / "linked").symlink_to(place / "images")
    before = sorted(place.parent.rglob("*"))
    output = (option, path) if path else ()
    done = run("compare", "-m", "model", "--data", data, "--question", QUESTION, *BUDGET, *output)
    refused(done, f"{option} {path}", f"the dataset {data}")
    assert sorted(place.parent.rglob("*")) == before


@pytest.mark.parametrize(("data", "plot"), [("images", "plot.png"), ("images/?.png", "images/plot.png")])
def test_outputs_beside_the_data(data: str, plot: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    line = ("compare", "-m", "model", "--data", data, "--question", QUESTION, *BUDGET, "--rounds", 1, "--limit", 2)
    done = run(*line, "--run-dir", "images.run", "--plot", plot)
    assert done.exit_code == 0 and (place / plot).exists(), done.output


@pytest.mark.parametrize("name", ["prune", "profile", "compare", "report"])
def test_directories_of_outputs_are_created(name: str, place: Path) -> None:
    option, file = ("--output", "kept.png") if name == "prune" else ("--export", "results.json")
    done = run(*[each for each in command(name, place) if each != "--scaling"], option, place / "new" / "deep" / file)
    assert done.exit_code == 0, done.output
    assert (place / "new" / "deep" / file).stat().st_size > 0


def test_results_may_lie_in_the_run_directory_and_be_replaced(place: Path) -> None:
    for _ in range(2):
        done = run("report", place / "run", "--export", place / "run" / "results.csv")
        assert done.exit_code == 0, done.output
    assert run("compare", "--run-dir", place / "run", "--resume").exit_code == 0


def failing(*names: str) -> Callable[..., None]:
    """`write_whole` on a disk that is full for files with these in their path."""

    def write(path: Path, work: Callable[[Path], object]) -> None:
        if any(name in str(path) for name in names):
            raise MMTokError(f"{path} could not be written: No space left on device", "choose another place")
        write_whole(path, work)

    return write


@pytest.mark.parametrize("name", ["compare", "report"])
def test_a_file_that_fails_costs_neither_the_others_nor_the_tables(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtok_cli.report.exports.write_whole", failing("first"))
    files = [option for file in ("first.csv", "t.md", "t.html") for option in ("--export", place / file)]
    done = run(*command(name, place), *files)
    assert done.exit_code == 1 and "Speed" in done.stdout
    assert (place / "t.md").exists() and (place / "t.html").exists() and not (place / "first.csv").exists()
    assert done.stderr.count("error: ") == 1 and "first.csv" in done.stderr


def test_a_picture_that_fails_does_not_cost_the_map(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok_cli.report.overlay.write_whole", failing("kept"))
    done = run(*command("prune", place), "-o", place / "kept.png", "--gain-curve", place / "gains.svg")
    assert done.exit_code == 1 and "4 of 36" in done.stdout and (place / "gains.svg").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FileNotFoundError(2, "missing", "a.ttf")])
@pytest.mark.parametrize("json", [(), ("--json",)])
def test_an_error_of_a_file_names_the_file_and_not_standard_output(
    json: tuple[str, ...], error: OSError, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> str:
        raise error

    monkeypatch.setattr("mmtok_cli.report.exports.csv_text", broken)
    done = run(*command("report", place), "--export", place / "t.csv", "--export", place / "t.md", *json)
    assert done.exit_code == 1 and done.stdout and (place / "t.md").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{place / 't.csv'} could not be written" in errors[0]
    assert all(word in errors[0] for word in (error.strerror, error.filename or ""))


@pytest.mark.parametrize(("name", "words"), [("/tmp/a", "/tmp/a: No space"), (None, "error: No space")])
def test_a_full_disk_is_not_a_full_standard_output(
    name: str | None, words: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", name)

    monkeypatch.setattr("mmtok_cli.configuration.load_model", broken)
    done = run(*command("prune", place))
    assert done.exit_code == 1 and words in done.stderr and "standard output" not in done.output


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError(), 1), (KeyboardInterrupt(), 130)])
def test_what_ends_one_part_comes_after_the_others(
    error: BaseException, status: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> str:
        raise error

    monkeypatch.setattr("mmtok_cli.report.exports.csv_text", broken)
    done = run(*command("report", place), "--export", place / "t.csv", "--export", place / "t.md")
    assert done.exit_code == status and isinstance(done.exception, type(error) if status == 1 else SystemExit)
    assert "Speed" in done.stdout and (place / "t.md").exists()


def profile(place: Path, *options: object) -> Result:
    return run("profile", place / "photo.png", "-m", place / "model", *BUDGET, "--rounds", 2, *options)


def test_profile_with_a_full_disk_still_shows_what_it_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtok_cli.timing.traces.write_whole", failing("traces"))
    done = profile(place, "--trace-dir", place / "traces", "--export", place / "t.json")
    assert done.exit_code == 1 and "Seconds per stage" in done.stdout and "Top operators" in done.stdout
    assert "No space left" in done.stderr and "Traceback" not in done.output and "tensorboard" not in done.stderr
    assert json.loads((place / "t.json").read_text())["cases"][1]["seconds"]["prefill"]["values"]


@pytest.mark.parametrize("stage", ["measure_flops", "trace_case", "measure_ceilings"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("out"), OSError(28, "No space left on device")])
def test_profile_keeps_its_times_when_what_follows_is_stopped(
    stage: str, error: BaseException, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(f"mmtok_cli.profiling.{stage}", stop)
    files = [option for file in ("t.json", "t.csv", "t.md") for option in ("--export", place / file)]
    done = profile(place, "--trace-dir", place / "traces", *files)
    interrupted = isinstance(error, KeyboardInterrupt)
    assert done.exit_code == (130 if interrupted else 1), done.output
    assert "Seconds per stage" in done.stdout and (place / "t.md").exists() and (place / "t.csv").exists()
    assert ("interrupted: " in done.stderr) == interrupted and ("error: " in done.stderr) != interrupted
    saved = json.loads((place / "t.json").read_text())
    assert saved["interrupted"] == interrupted and len(saved["cases"][0]["seconds"]["total"]["values"]) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("out"), MMTokError("the image is gone")])
@pytest.mark.parametrize("complete", [0, 1, 2])
def test_profile_keeps_its_complete_rounds(
    complete: int, error: BaseException, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtok_cli import profiling

    usual = profiling.run_round

    def run_round(model: Any, cases: Any, batches: Any, number: int, *arguments: Any, **options: Any) -> Any:
        if number == complete:
            raise error
        return usual(model, cases, batches, number, *arguments, **options)

    monkeypatch.setattr(profiling, "run_round", run_round)
    done = profile(place, "--rounds", 4, "--trace-dir", place / "traces", "--export", place / "t.json")
    if complete == 0:
        assert done.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1 + isinstance(error, MMTokError))
        assert done.stdout == "" and not (place / "t.json").exists()
        return
    interrupted = isinstance(error, KeyboardInterrupt)
    assert done.exit_code == (130 if interrupted else 1) and "Seconds per stage" in done.stdout
    assert (f"error: round {complete + 1} of 4" in done.stderr) != interrupted
    saved = json.loads((place / "t.json").read_text())
    assert saved["interrupted"] == interrupted and saved["schedule"]["rounds"] == complete
    assert {len(case["seconds"]["total"]["values"]) for case in saved["cases"]} == {complete}


def process(place: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with errors on standard error unless it is told otherwise."""
    line = [sys.executable, "-m", "mmtok_cli", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(line, text=True, cwd=place, check=False, **({"env": buffered} | streams | options))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("models", ()),
        ("models", ("--json",)),
        ("--help", ()),
        ("report", ()),
        ("report", ("--json",)),
        ("compare", ()),
    ],
)
def test_full_standard_output(name: str, more: tuple[str, ...], place: Path) -> None:
    files = ("--export", place / "t.csv", "--export", place / "t.html") if name in ("report", "compare") else ()
    with Path("/dev/full").open("w") as full:
        line = command(name, place) if files else (name,)
        done = process(place, *line, *files, *more, stdout=full)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.count("error: ") == done.stderr.count("No space left on device") == 1
    assert not files or ((place / "t.csv").exists() and (place / "t.html").exists())


def test_nobody_reads_standard_output(place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = process(place, *command("report", place), "--export", place / "t.csv", stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and "error" not in done.stderr and "Traceback" not in done.stderr
    assert (place / "t.csv").exists() and "wrote" in done.stderr


def test_standard_output_that_is_closed(place: Path) -> None:
    shell = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "mmtok_cli"]
    line = [*shell, *map(str, command("report", place)), "--export", str(place / "t.csv")]
    done = subprocess.run(line, text=True, cwd=place, capture_output=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr and (place / "t.csv").exists()


@pytest.mark.parametrize(("gone", "name"), [("full", "report"), ("closed", "compare")])
def test_nobody_reads_standard_error(gone: str, name: str, place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("w") as full:
        errors = full if gone == "full" else writer
        done = process(place, *command(name, place), "--export", place / "t.csv", stderr=errors)
    os.close(writer)
    assert done.returncode == 0 and "Speed" in done.stdout and (place / "t.csv").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_of_standard_output(encoding: str, place: Path) -> None:
    plan = json.loads((place / "run" / "plan.json").read_text())
    (place / "run" / "plan.json").write_text(json.dumps(plan | {"model": "naïve 模型 😀"}))
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    line = (*command("report", place), "--export", place / "t.csv")
    shown = process(place, *line, env=environment, encoding=encoding)
    assert shown.returncode == 0 and "Speed" in shown.stdout and (place / "t.csv").exists()
    plain = process(place, *line, "--json", env=environment, encoding=encoding)
    assert plain.returncode == 0 and json.loads(plain.stdout)["model"] == "naïve 模型 😀"


def test_interrupted_comparison_writes_its_files_and_says_so_by_its_status(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmtok_cli.comparison.evaluate", stop)
    done = run(*command("compare", place), "--export", place / "t.json", "--run-dir", place / "new")
    assert done.exit_code == 130 and "Speed" in done.stdout and "--resume" in done.stderr
    assert json.loads((place / "t.json").read_text())["interrupted"]
    plot = run("compare", "--run-dir", place / "new", "--resume", "--plot", place / "plot.png")
    assert plot.exit_code == 130 and "error: " not in plot.stderr and not (place / "plot.png").exists()
    assert "plot.png was not written: no answers were evaluated before the interruption" in plot.stderr


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (MMTokError("No space left"), 1)])
def test_pictures_that_are_not_drawn_cost_nothing_else(
    error: BaseException, status: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("mmtok_cli.comparison.save_overlays", stop)
    done = run(*command("compare", place), "--export", place / "t.html", "--run-dir", place / "new")
    assert done.exit_code == status and "Speed" in done.stdout and "Quality" in done.stdout
    assert (place / "t.html").exists() and done.stderr.count("error: No space left") == (status == 1)


def without_pictures(place: Path) -> None:
    """Leave the run complete but for its pictures, so that a resumed run draws them and nothing else."""
    shutil.rmtree(place / "run" / "overlays")


def test_a_file_in_the_place_of_the_pictures_costs_the_page_alone(place: Path) -> None:
    without_pictures(place)
    (place / "run" / "overlays").write_text("mine")
    files = [option for file in ("t.html", "t.csv") for option in ("--export", place / file)]
    done = run(*command("resume", place), *files)
    assert done.exit_code == 1 and "Speed" in done.stdout and (place / "t.csv").exists()
    assert f"error: {place / 'run' / 'overlays'} is not a directory" in done.stderr
    assert (place / "run" / "overlays").read_text() == "mine"


def test_a_picture_that_cannot_be_drawn_is_told_and_the_others_are_drawn(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtok_cli import overlays

    usual = overlays._draw
    calls: list[int] = []

    def draw(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("the grid is empty")
        return usual(*arguments)

    without_pictures(place)
    monkeypatch.setattr(overlays, "_draw", draw)
    done = run(*command("resume", place), "--export", place / "t.html")
    assert done.exit_code == 0 and (place / "t.html").exists()
    told = [line for line in done.stderr.splitlines() if "is not drawn for sample" in line]
    assert len(told) == 1 and "uniform" in told[0] and "ZeroDivisionError: the grid is empty" in told[0]
    assert len(list((place / "run" / "overlays").glob("*-00[1-9].webp"))) == len(calls) - 1 > 0


def test_a_directory_that_is_renamed_while_pictures_are_drawn_is_not_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtok_cli import overlays

    usual = overlays._draw

    def draw(*arguments: Any) -> Any:
        if (place / "run").exists():
            (place / "run").rename(place / "moved")
        return usual(*arguments)

    without_pictures(place)
    monkeypatch.setattr(overlays, "_draw", draw)
    done = run(*command("resume", place), "--export", place / "t.html", "--export", place / "t.csv")
    assert done.exit_code == 1 and "was renamed or deleted during the run" in done.stderr
    assert "Speed" in done.stdout and (place / "t.csv").exists() and not (place / "run").exists()


def test_interrupted_before_anything_was_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmtok_cli.configuration.load_model", stop)
    for name in ("prune", "profile", "compare"):
        done = run(*command(name, place), *(("--export", place / "t.json") if name != "prune" else ()))
        assert done.exit_code == 130 and done.stdout == "" and not (place / "t.json").exists()


@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_hostile_text_is_shown_and_does_nothing(kind: str, place: Path) -> None:
    """In questions, kinds, answers, file names, the name of the data, predictions and parameters."""
    text = HOSTILE_TEXTS[kind]
    name = text.replace("/", "-")
    plan = json.loads((place / "run" / "plan.json").read_text())
    rows = [place / "run" / "predictions" / "000000.json", place / "run" / "overlays" / "index.json"]
    plan |= {"data": text, "model": text, "left_out": [text, f"left out: {text}"]}
    plan["environment"]["command"] = ["mmtok", text]
    plan["environment"]["processor"] = text
    (place / "run" / "plan.json").write_text(json.dumps(plan))
    batch = json.loads(rows[0].read_text())
    for number, sample in enumerate(batch["samples"]):
        sample |= {"answer": text, "kind": text if number else "plain"}
    rows[0].write_text(json.dumps(batch))
    album = json.loads(rows[1].read_text())
    for group in album["groups"]:
        group["title"] = text
        for one in group["pictures"]:
            one |= {"caption": text, "note": text}
    rows[1].write_text(json.dumps(album))
    files = [place / "out" / f"{name}.{suffix}" for suffix in ("json", "csv", "md", "html")]
    done = run("report", place / "run", *(option for file in files for option in ("--export", file)))
    assert done.exit_code == 0, done.output
    assert is_harmless(done.stdout) and is_harmless(done.stderr)
    assert "forged" not in [line[:6] for line in done.output.splitlines()]
    assert not any(line.startswith("error:") for line in done.output.splitlines())
    if kind == "markup":
        assert text in done.stdout
    for file in files:
        assert is_harmless(file.read_text(encoding="utf-8")), file.suffix
    saved = json.loads(files[0].read_text(encoding="utf-8"))
    assert saved["model"] == text and saved["environment"]["command"] == ["mmtok", text]
    cells = [cell for row in csv.reader(files[1].read_text().splitlines()) for cell in row]
    assert not any(cell.lstrip()[:1] in "=+-@" for cell in cells if cell and not is_number(cell))
    shown = run_json("report", place / "run")
    assert shown["model"] == text
    assert is_harmless(run("report", place / "run", "--json").stdout)


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_hostile_names_and_answers_on_the_command_line(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtok_cli.timing import runner

    usual = runner.run_case
    text = HOSTILE_TEXTS[kind]

    def answering(*arguments: Any, **options: Any) -> Any:
        return usual(*arguments, **options).model_copy(update={"answers": [text]})

    monkeypatch.setattr(runner, "run_case", answering)
    image = place / (text.replace("/", "-") + ".png")
    (place / "photo.png").rename(image)
    model = ("-m", place / "model", "-b", 4)
    answered = run("infer", image, text, *model, "--max-new-tokens", 1, "--baseline")
    assert answered.exit_code == 0, answered.output
    kept = run("prune", image, text, *model, "-o", place / f"{image.name}.png")
    assert kept.exit_code == 0 and (place / f"{image.name}.png").exists(), kept.output
    missing = run("infer", place / f"no {image.name}", text, *model)
    refused(missing)
    wrong = [
        run("infer", image, text, "-m", text),
        run("compare", "--methods", text),
        run(text),
        run("infer", f"--{text}"),
    ]
    for each in wrong:
        refused(each)
    for each in (answered, kept, missing, *wrong):
        assert is_harmless(each.output), each.output
        assert not any(line.startswith(("forged", "error: forged")) for line in each.output.splitlines())


@pytest.mark.parametrize("name", ["$x$", r"$\frac$", "a$b", "\x1b[2J", "_hidden", "模型 😀", "x" * 3000])
def test_any_name_can_be_plotted(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    result = comparison([case("full", 576), case(name), case("mmtok")], model=name)
    save_tradeoff(result, tmp_path / "plot.svg")
    save_gain_curve([3.0, 2.0], tmp_path / "curve.png", name)
    assert (tmp_path / "plot.svg").stat().st_size and (tmp_path / "curve.png").stat().st_size
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_numbers_stay_numbers_in_a_sheet(place: Path) -> None:
    assert run("report", place / "run", "--export", place / "t.csv").exit_code == 0
    rows = list(csv.DictReader((place / "t.csv").read_text().splitlines()))
    for row in rows:
        assert float(row["ttft_median_s"]) > 0 and int(row["seed"]) == 0 and not row["method"].startswith("'")


def test_no_picture_from_outside_the_run_is_embedded(place: Path) -> None:
    overlays = place / "run" / "overlays"
    shutil.copytree(overlays, place / "pictures")
    outside = place / "secret.webp"
    picture(84, 84).save(outside)
    index = json.loads((overlays / "index.json").read_text())
    first = index["groups"][0]["pictures"][0]
    (overlays / "link.webp").symlink_to(outside)
    for file in ("../../secret.webp", str(outside), "link.webp", "", ".", "nothing.webp", "\0"):
        first["file"] = file
        (overlays / "index.json").write_text(json.dumps(index))
        refused(run("report", place / "run", "--export", place / "t.html"), "to omit the pictures")
        assert not (place / "t.html").exists()
    shutil.rmtree(overlays)
    shutil.copytree(place / "run", place / "other")
    shutil.copytree(place / "pictures", place / "other" / "overlays")
    overlays.symlink_to(place / "other" / "overlays")
    refused(run("report", place / "run", "--export", place / "t.html"), "not one of the pictures")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--limit", "0"), "--limit"),
        (("compare", "--limit", "many"), "--limit"),
        (("compare", "--rounds", "-1"), "--rounds"),
        (("compare", "--nothing"), "--nothing"),
        (("compare", "--limit"), "--limit"),
        (("compare", "extra"), "extra"),
        (("prune", "a.png", "b", "--mark", "100"), "--mark"),
        (("profile", "--top", "0"), "--top"),
        (("infer",), "image"),
        (("infer", "a.png"), "question"),
        (("report",), "runs"),
        (("methods", "a", "b"), "b"),
        (("models", "--jsn"), "--jsn"),
        (("nothing",), "nothing"),
        (("--nothing",), "--nothing"),
    ],
)
def test_usage_errors_read_like_all_others(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    refused(result, words)
    assert "--help` explains every option" in result.stderr.splitlines()[1]
    assert "╭" not in result.output and "Usage" not in result.output


def test_without_arguments_there_is_help() -> None:
    result = run()
    assert "Usage" in result.output and "error:" not in result.output
