"""Run directories that are shared, moved, damaged or not ours, and the files that are written into them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import refused, run, run_json, run_process
from damaged_runs import MEASURES, MISPLACED, Damage, Reader, damaged, damages, without_measuring

import mmtok_cli.comparison as comparison
import mmtok_cli.timing.runner as runner
from mmtok_cli.cases import Case, release_memory
from mmtok_cli.errors import MMTokError
from mmtok_cli.files import require_writable, write_whole
from mmtok_cli.results.records import TimingFailure
from mmtok_cli.results.run_directory import NotWrittenError, RunDirectory

CASES = ("full", "mmtok", "fastv")

# Values of these fields are shown as they are, and any of their type is as good as another.
FREE = re.compile(
    r"plan\.json: (model|data|data_digest|left_out|environment|cases\.\d+\.case\.(method|parameters|budget))\b"
    r"|: (samples\.\d+\.kind|tokens|machine|coverage|traceback|message|reason|round|groups)\b"
    r"|(failures/\d+|overlays/index)\.json: deleted"
)


@pytest.fixture(scope="module")
def options(tiny_directory: Path) -> tuple[Any, ...]:
    common = ("-m", tiny_directory, "--limit", 4, "-b", "4", "--max-new-tokens", 2, "--warmup", 0, "--rounds", 2)
    return ("compare", *common, "--methods", "mmtok,fastv")


@pytest.fixture(scope="module")
def measured(options: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two complete runs: `run`, in which one case failed, with pictures, and `other`."""
    directory = tmp_path_factory.mktemp("measured")
    page = ("--export", directory / "page.html")
    assert run(*options, "--batch-size", "1,2", "--run-dir", directory / "run", *page).exit_code == 0
    assert run(*options, "--batch-size", "1,2", "--run-dir", directory / "other").exit_code == 0
    with RunDirectory.resume(directory / "run") as store:
        key = store.plan.cases[5].key
        store.add_failure(TimingFailure(case=5, key=key, round=1, reason="refused", message="too few tokens"))
    return directory


@pytest.fixture()
def copy(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured / "run", tmp_path / "run"))


def records(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "rounds").iterdir())}


def some(everything: list[Damage]) -> Iterator[Damage]:
    """Every misplaced file, and a few of the other damages to each file."""
    chosen = random.Random(1)
    for file in sorted({damage.file for damage in everything}):
        mine = [damage for damage in everything if damage.file == file and damage.name not in MISPLACED]
        yield from chosen.sample(mine, 16 if file == "plan.json" else 7)
    yield from (damage for damage in everything if damage.name in MISPLACED)


def test_damaged_runs(measured: Path, tmp_path: Path) -> None:
    """Reading a damaged run gives the same result, says that rounds are missing, or is refused in one line."""
    run_directory, other = (Path(shutil.copytree(measured / name, tmp_path / name)) for name in ("run", "other"))
    with without_measuring():
        reader = Reader(run_directory, other)
        outcomes = []
        for damage in some(list(damages(run_directory))):
            with damaged(run_directory, damage):
                for way in ("page",) if damage.file.startswith("overlays") else ("report", "resume"):
                    found, said = reader.outcome(way)
                    assert found in ("equal", "interrupted", "refused", MEASURES) or (
                        found == "different" and FREE.search(str(damage))
                    ), (damage, way, found, said)
                    assert found != "refused" or str(run_directory) in said, (damage, way, said)
                    outcomes.append(found)
    assert outcomes.count("refused") > len(outcomes) / 2 and {"equal", "interrupted", MEASURES} <= set(outcomes)


@pytest.mark.parametrize(
    ("file", "field", "value", "words"),
    [
        ("rounds/00000-001.json", "seconds.total", -1.0, "seconds.total: Input should be greater than or equal to 0"),
        ("rounds/00000-001.json", "seconds.prefill", 0.0, "the seconds of prefill are not the median"),
        ("rounds/00000-001.json", "seconds", {}, "prepare is missing"),
        ("rounds/00000-001.json", "steps", "2", "steps: Input should be a valid integer"),
        ("rounds/00000-001.json", "round", 1, "it is the content of 00001-001.json"),
        ("rounds/00000-001.json", "batch", 3, "does not run on this batch in this round"),
        ("cases/001.json", "flops.prefill", 1e30, "flops.prefill"),
        ("cases/001.json", "key", "0", "does not belong to the run"),
        ("predictions/000000.json", "samples", [], "samples are not those of the batch"),
        ("predictions/000000.json", "predictions.0.score", 3.0, "predictions.0.score"),
        ("predictions/000000.json", "predictions.1.closeness.kl", -0.5, "must not be negative"),
        ("plan.json", "samples", 10**10, "samples"),
        ("plan.json", "rounds", 10**8, "rounds and the options contradict each other"),
        ("plan.json", "order", [[0]], "the order is not that of the rounds"),
        ("plan.json", "seed", 7, "seed and the options contradict each other"),
        ("plan.json", "options.budget", ["-4"], "'-4' is not a budget"),
        ("plan.json", "cases", [], "cases: "),
        ("plan.json", "cases.0.case.method", "mmtok", "has no baseline"),
        ("plan.json", "cases.3.case.batch_size", 5, "more samples than there are"),
    ],
)
def test_a_field_that_cannot_be_right_is_named(copy: Path, file: str, field: str, value: Any, words: str) -> None:
    whole = json.loads((copy / file).read_text())
    *path, last = [int(part) if part.isdigit() else part for part in field.split(".")]
    inner = whole
    for key in path:
        inner = inner[key]
    inner[last] = value
    (copy / file).write_text(json.dumps(whole))
    for command in (("report", copy), ("compare", "--resume", "--run-dir", copy)):
        refused(run(*command), f"{copy / file} cannot be read: ", words)


def test_numbers_in_a_plan_take_no_memory(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    plan["samples"] = plan["options"]["limit"] = 10**7
    (copy / "plan.json").write_text(json.dumps(plan))
    tracemalloc.start()
    shown = run_json("report", copy)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shown["interrupted"] and peak < 2**26


def test_missing_flops_are_counted_again(copy: Path) -> None:
    (copy / "cases" / "001.json").unlink()
    refused(run("report", copy), f"{copy / 'cases' / '001.json'} is missing", "--resume")
    before = records(copy)
    assert not run_json("compare", "--resume", "--run-dir", copy)["interrupted"] and records(copy) == before
    assert run("report", copy).exit_code == 0


def test_a_batch_without_the_predictions_of_a_case_is_evaluated_again(copy: Path) -> None:
    file = copy / "predictions" / "000001.json"
    whole = json.loads(file.read_text())
    kept = [prediction for prediction in whole["predictions"] if prediction["case"] != 4]
    file.write_text(json.dumps(whole | {"predictions": kept}))
    report = run_json("report", copy)
    assert report["interrupted"] and report["schedule"]["samples"] == 2
    assert run_json("compare", "--resume", "--run-dir", copy)["schedule"]["samples"] == 4
    evaluated = [prediction for prediction in whole["predictions"] if prediction["case"] != 5]  # which has failed
    assert json.loads(file.read_text())["predictions"] == evaluated


def test_a_page_embeds_nothing_from_outside_the_run(copy: Path, tmp_path: Path) -> None:
    index = copy / "overlays" / "index.json"
    whole = json.loads(index.read_text())
    picture = copy / "overlays" / whole["groups"][0]["pictures"][0]["file"]
    secret = Path(shutil.copy(picture, tmp_path / "secret.webp"))
    for file in ("../../secret.webp", str(secret), "../overlays/000000-001.webp"):
        whole["groups"][0]["pictures"][0]["file"] = file
        index.write_text(json.dumps(whole))
        result = run("report", copy, "--export", tmp_path / "page.html")
        assert result.exit_code != 0 and f"{index} cannot be read" in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "page.html").exists()
    whole["groups"][0]["pictures"][0]["file"] = picture.name
    index.write_text(json.dumps(whole))
    picture.unlink()
    picture.symlink_to(secret)
    result = run("report", copy, "--export", tmp_path / "page.html")
    assert result.exit_code != 0 and f"{picture} is not one of the pictures of the run" in result.stderr


# Two processes, one directory


WAIT = """
import time
import mmtok_cli.timing.runner as runner
usual = runner.run_case
def run_case(*arguments, **options):
    time.sleep(0.2)
    return usual(*arguments, **options)
runner.run_case = run_case
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    code = f"{WAIT}\nfrom mmtok_cli.cli.main import main\nmain()\n"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_measures(options: tuple[Any, ...], tmp_path: Path) -> None:
    """New runs at first, then resumed ones: each result is written once."""
    directory = tmp_path / "run"
    for command in ((*options, "--run-dir", directory), ("compare", "--resume", "--run-dir", directory)):
        processes = [start(*command) for _ in range(2)]
        said = {process.returncode: errors for process in processes if (errors := process.communicate()[1]) is not None}
        assert set(said) == {0, 2}, said
        assert "is in use by another run" in said[2] or "already contains a run" in said[2]
        assert len(said[2].splitlines()) == 2
        before = records(directory)
        assert len(before) == 2 * len(CASES) and not run_json("report", directory)["interrupted"]
        for path in list((directory / "rounds").iterdir())[1:]:  # the second pair has something to measure
            path.unlink()


def test_a_directory_in_use_is_refused_before_it_is_read(copy: Path) -> None:
    with RunDirectory.resume(copy):
        (copy / "rounds" / "00000-000.json").write_text("{")  # as it would be while it is written elsewhere
        result = run_process("compare", "--resume", "--run-dir", copy)
        assert result.returncode == 2 and "is in use by another run" in result.stderr
        refused(run("report", copy), "00000-000.json cannot be read")  # without the lock


def test_a_lock_that_is_a_link_is_not_followed(copy: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (copy / "lock").unlink()
    (copy / "lock").symlink_to(precious)
    (copy / "predictions" / "000001.json").unlink()
    refused(run("compare", "--resume", "--run-dir", copy), f"{copy / 'lock'} cannot be locked")
    assert precious.read_text() == "precious"


def test_runs_that_start_in_the_same_second(options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with the same name, without a name for the run; the second starts before the first has a directory."""
    monkeypatch.setattr(comparison.time, "strftime", lambda _: "20260101-000000")
    first = run_json(*options)["run_directory"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: path != Path(first) and os.path.exists(path))  # noqa: PTH110
        second = run_json(*options)["run_directory"]
    assert first != second and not run_json("report", first)["interrupted"]


def test_processes_of_one_run_end_together(copy: Path) -> None:
    """The writer is refused; the other says in a line that it is alone."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    variables = "import os; os.environ |= dict(MASTER_ADDR='localhost', WORLD_SIZE='2', RANK='{}', MASTER_PORT='{}')"
    (copy / "predictions" / "000001.json").unlink()
    with RunDirectory.resume(copy), ThreadPoolExecutor() as pool:
        command = ("compare", "--resume", "--run-dir", copy)
        writer, other = pool.map(lambda rank: run_process(*command, before=variables.format(rank, port)), range(2))
    for process, words in ((writer, "is in use by another run"), (other, "another process of this run has ended")):
        assert process.returncode == 2 and process.stdout == "" and words in process.stderr
        assert len(process.stderr.splitlines()) == 2


@pytest.mark.parametrize("count", ["x", "0", "-1", "", "1.5", "2"])
def test_processes_that_no_launcher_started(
    count: str, options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    refused(run(*options, "--run-dir", tmp_path / "run"), "WORLD_SIZE")
    assert not list(tmp_path.iterdir())


# Directories that change while they are used


@pytest.mark.parametrize("change", ["renamed", "deleted", "replaced"])
def test_a_directory_that_disappears_is_not_made_again(
    change: str, options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, moved = tmp_path / "run", tmp_path / "moved"
    usual = runner.run_case
    runs: list[int] = []

    def run_case(*arguments: Any, **settings: Any) -> Any:
        runs.append(1)
        if len(runs) == len(CASES) + 2:
            if change == "deleted":
                shutil.rmtree(directory)
            else:
                directory.rename(moved)
            if change == "replaced":
                shutil.copytree(moved, directory)
        return usual(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_case", run_case)
        result = run(*options, "--run-dir", directory)
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert f"{directory} was renamed or deleted during the run" in result.stderr
    assert "mmtok" in result.stdout  # what was measured is shown
    if change == "replaced":
        assert len(records(directory)) == len(CASES) + 1
        return
    assert not directory.exists() and f"--run-dir {directory} --resume" not in result.stderr
    if change == "renamed":
        before = records(moved)
        assert len(before) == len(CASES) + 1
        assert not run_json("compare", "--resume", "--run-dir", moved)["interrupted"]
        assert all(records(moved)[name] == content for name, content in before.items())


def test_a_run_does_not_start_among_the_remains_of_another(copy: Path, options: tuple[Any, ...]) -> None:
    (copy / "plan.json").unlink()
    refused(run(*options, "--run-dir", copy), "of a run without its plan.json")
    assert not (copy / "plan.json").exists()


def test_a_plan_that_cannot_be_written(
    options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        result = run(*options, "--run-dir", tmp_path / "run")
    assert result.exit_code == 1 and "No space left on device" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock"]
    assert run(*options, "--run-dir", tmp_path / "run").exit_code == 0  # as soon as there is space


def test_a_run_that_is_refused_before_anything_is_measured_leaves_nothing(
    options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("full", MMTokError("the prompt is too long"), 1, monkeypatch)
    refused(run(*options, "--run-dir", tmp_path / "run"), "the prompt is too long")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", ["", "run/", "run/lock"])
def test_a_run_that_is_refused_leaves_what_was_there_before(
    existing: str, options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run" if existing else tmp_path / "new" / "run"
    if existing:
        directory.mkdir()
    if existing == "run/lock":
        (directory / "lock").touch()
    before = sorted(tmp_path.rglob("*"))
    failing("full", MMTokError("the prompt is too long"), 1, monkeypatch)
    refused(run(*options, "--run-dir", directory), "the prompt is too long")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_a_name_that_is_refused_leaves_no_directory(
    options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failing("full", MMTokError("the prompt is too long"), 1, monkeypatch)
    refused(run(*options), "the prompt is too long")
    assert not list(tmp_path.glob("runs/*"))


def test_writing_needs_the_lock(copy: Path) -> None:
    store = RunDirectory.open(copy)
    with pytest.raises(ValueError, match="under its lock"):
        store.add_failure(store.failures[5])
    with RunDirectory.resume(copy) as store:
        (copy / "lock").unlink()
        with pytest.raises(NotWrittenError, match="renamed or deleted"):
            store.add_failure(store.failures[5])


def test_a_run_is_resumed_from_another_directory(
    tiny_directory: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model, a data file and an image directory that were named by relative paths."""
    here = tmp_path / "here"
    shutil.copytree(tiny_directory, here / "model")
    shutil.copy(photo, here / "photo.png")
    lines = [json.dumps({"image": "photo.png", "question": f"Is it {i}?", "answer": "yes"}) for i in range(4)]
    (here / "data.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(here)
    data = ("--data", "data.jsonl", "--image-root", ".")
    command = ("compare", "-m", "model", *data, "-b", "4", "--methods", "mmtok", "--max-new-tokens", 2, "--warmup", 0)
    first = run_json(*command, "--run-dir", "run")
    assert first["model"] == "model"
    for number, place in enumerate((here, tmp_path, here / "model")):
        monkeypatch.chdir(place)
        (here / "run" / "rounds" / f"0000{number}-001.json").unlink()
        given = ("--data", os.path.relpath(here / "data.jsonl"))  # the same file by another name
        resumed = run_json("compare", "--resume", "--run-dir", here / "run", *given)
        assert not resumed["interrupted"] and resumed["schedule"] == first["schedule"]
    refused(run("compare", "--resume", "--run-dir", here / "run", "--data", "demo"), "--data is demo here")


def test_the_newest_run_is_one_that_can_be_read(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(measured / "run", "runs/whole")
    Path("runs/broken").mkdir()
    Path("runs/broken/plan.json").symlink_to("nothing")
    assert run_json("compare", "--resume")["run_directory"] == "runs/whole"


# Cases that fail


def failing(case: str, error: BaseException, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a case raise an error from its call number `calls` on; the first call counts FLOPs."""
    usual = Case.answer
    asked: list[str] = []

    def answer(self: Case, *arguments: Any, **options: Any) -> Any:
        asked.append(self.name)
        if self.name == case and asked.count(case) >= calls:
            raise error
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Case, "answer", answer)


SCRIPT = "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript:\nRuntimeError: "


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (RuntimeError("shapes differ\nmore"), "error", "RuntimeError: shapes differ"),
        (ValueError(), "error", "ValueError: ValueError"),
        (AssertionError("no"), "error", "AssertionError: no"),
        (RecursionError("too deep"), "error", "RecursionError: too deep"),
        (torch.jit.Error(SCRIPT + "index out of range"), "error", "index out of range"),
        (torch.jit.Error(SCRIPT + "CUDA out of memory. Tried 2 GiB"), "out of memory", "Tried 2 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory", "can't allocate"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory", "not enough memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory", "ALLOC_FAILED"),
        (MMTokError("too few tokens"), "refused", "too few tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("calls", [1, 3], ids=["warm-up", "second round"])
def test_a_case_that_fails_is_a_row(
    calls: int,
    error: Exception,
    reason: str,
    message: str,
    options: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        failing("fastv", error, calls, patch)
        result = run_json(*options, "--no-quality", "--run-dir", tmp_path / "run")
    assert [case["case"]["method"] for case in result["results"]] == ["full", "mmtok"]
    (failed,) = result["failures"]
    assert (failed["reason"], failed["round"]) == (reason, None if calls == 1 else 1) and message in failed["message"]
    traceback = json.loads((tmp_path / "run" / "failures" / "002.json").read_text())["traceback"]
    assert ("def answer" in traceback or "in answer" in traceback) == (reason == "error")


def test_a_dry_run_shows_what_fails(options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    failing("fastv", RuntimeError("shapes differ"), 1, monkeypatch)
    shown = run(*options, "--dry-run")
    assert shown.exit_code == 0 and "fastv @ 4 (batch size 1): error: RuntimeError: shapes differ" in shown.stdout
    cases = run_json(*options, "--dry-run")["cases"]
    assert [case["seconds"] is None for case in cases] == [False, False, True]


def test_a_failed_case_is_not_run_again_unless_its_failure_is_deleted(
    options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing("fastv", RuntimeError("defect"), 2, patch)
        failing("mmtok", KeyboardInterrupt(), 3, patch)
        run(*options, "--run-dir", directory)
    resume = ("compare", "--resume", "--run-dir", directory)
    resumed = run(*resume)
    said = "".join(resumed.stderr.split())
    assert resumed.exit_code == 0 and "fastv@4failedbefore(error)andisleftout" in said
    assert "".join(f"delete {directory / 'failures' / '002.json'}".split()) in said
    assert "RuntimeError:defect" in said
    (directory / "failures" / "002.json").unlink()
    again = run_json(*resume)
    assert [case["case"]["method"] for case in again["results"]] == list(CASES) and not again["failures"]
    assert again["results"][2]["fidelity"] and len(again["results"][2]["seconds"]["ttft"]["values"]) == 2


def test_an_error_while_answers_are_evaluated_takes_the_quality_of_its_case_alone(
    options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("fastv", IndexError("beyond the end"), 4, monkeypatch)
    result = run_json(*options, "--run-dir", tmp_path / "run")
    assert [bool(case["fidelity"]) for case in result["results"]] == [False, True, False]
    assert [(case["case"]["method"], case["reason"]) for case in result["unevaluated"]] == [("fastv", "error")]
    assert not result["interrupted"] and run_json("report", tmp_path / "run") == result


def test_a_gpu_that_an_error_left_unusable_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that follow would fail for no fault of their own."""

    def synchronize(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(MMTokError, match="cuda:0 cannot be used any more by this process: CUDA error: an illegal"):
        release_memory(torch.device("cuda:0"))


def test_an_image_that_disappears_stops_the_run_and_not_its_cases(
    tiny_directory: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        shutil.copy(photo, images / f"{number}.png")
    command = ("compare", "-m", tiny_directory, "--data", images, "--question", "What?", "-b", "4", "--warmup", 0)
    command = (*command, "--methods", "mmtok", "--max-new-tokens", 2)
    usual = runner.run_case

    def run_case(*arguments: Any, **settings: Any) -> Any:
        (images / "1.png").unlink(missing_ok=True)
        return usual(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_case", run_case)
        result = run(*command, "--run-dir", tmp_path / "run")
    assert result.exit_code == 1 and "1.png" in result.stderr and "mmtok" in result.stdout
    assert not (tmp_path / "run" / "failures").exists()
    shutil.copy(photo, images / "1.png")
    assert not run_json("compare", "--resume", "--run-dir", tmp_path / "run")["interrupted"]


# Files


def write(text: str) -> Any:
    return lambda path: path.write_text(text)


def test_temporary_files_are_nobody_elses(tmp_path: Path) -> None:
    """Links and files with the names that earlier temporary files had are left alone."""
    target, precious, mine = tmp_path / "t.csv", tmp_path / "precious", tmp_path / ".u.csv.part"
    precious.write_text("precious")
    mine.write_text("mine")
    (tmp_path / ".t.csv.part").symlink_to(precious)
    write_whole(target, write("new"))
    write_whole(tmp_path / "u.csv", write("new"))
    assert target.read_text() == "new" and precious.read_text() == "precious" and mine.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o755])
def test_an_existing_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("old")
    path.chmod(mode)
    modes = []
    write_whole(path, lambda part: (modes.append(stat.S_IMODE(part.stat().st_mode)), part.write_text("new")))
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode == modes[0]


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a" / "t.csv", write("new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "t.csv").stat().st_mode) == 0o640


def test_links_stay(tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "real" / "t.csv", tmp_path / "t.csv", tmp_path / "u.csv"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "real" / "u.csv")
    for path in (link, dangling):
        write_whole(path, write("new"))
        assert path.is_symlink() and path.resolve().parent == target.parent and path.read_text() == "new"


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(MMTokError, match="No space left"):
        write_whole(path, fail)
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["t.csv"]


def unwritable(kind: str, directory: Path) -> Path:
    path = directory / "t.csv"
    if kind == "read-only":
        path.write_text("old")
        path.chmod(0o444)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a link to a device":
        path.symlink_to("/dev/null")
    elif kind == "a long name":
        path = directory / f"{'x' * 252}.csv"
    elif kind == "below a file":
        path.write_text("old")
        path = path / "deeper" / "t.csv"
    return path


@pytest.mark.parametrize(
    "kind", ["read-only", "a pipe", "a link to itself", "a link to a device", "a long name", "below a file"]
)
def test_what_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """It is noticed before the work starts, and also where it happens later."""
    path = unwritable(kind, tmp_path)
    before = sorted((each.name, each.lstat().st_mode, each.lstat().st_ino) for each in tmp_path.iterdir())
    with pytest.raises(MMTokError, match=r"--export .* cannot be written"):
        require_writable(path, [".csv"], "--export")
    with pytest.raises(MMTokError, match="could not be written"):
        write_whole(path, write("new"))
    assert sorted((each.name, each.lstat().st_mode, each.lstat().st_ino) for each in tmp_path.iterdir()) == before


def test_long_names_and_missing_directories_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / f"{'x' * 251}.csv"
    require_writable(path, [".csv"], "--export")
    assert not list(tmp_path.iterdir())
    write_whole(path, write("new"))
    assert path.read_text() == "new"
