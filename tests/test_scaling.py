"""Time against the number of vision tokens: counts, exponents, refused points, tables, the plot, the command line."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import QUESTION, refused, run, run_json
from PIL import Image
from test_report import shown
from tiny_models import FAMILIES

from mmtok_cli import profiling
from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import Prompt, VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import check_budget, reduce
from mmtok_cli.report.console import results_console
from mmtok_cli.report.scaling import growth_table, scaling_table
from mmtok_cli.results.profile import ScalingPoint
from mmtok_cli.results.schema import CaseId
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.timing import scaling
from mmtok_cli.timing.scaling import (
    check_scaling,
    fit_exponent,
    growth_of,
    measure_size,
    needed_memory,
    parse_tokens,
    smallest_size,
)

GIB = 2**30


def case(name: str, budget: Budget | None = None, **parameters: object) -> Case:
    return Case(name, make_method(name, **parameters), budget)


def point(tokens: int, select: float, prefill: float = 1.0, method: str = "mmtok") -> ScalingPoint:
    return ScalingPoint(
        tokens=tokens,
        kept=4,
        case=CaseId(method=method, parameters={}, budget="4"),
        select_seconds=select,
        prefill_seconds=prefill,
        select_values=[select, select, 2 * select],
        prefill_values=[prefill, prefill, 2 * prefill],
    )


def test_a_power_law_is_recovered() -> None:
    tokens = [576, 1024, 2304, 4096, 9216, 16384]
    exponent, low, high = fit_exponent(tokens, [3e-8 * n**1.7 for n in tokens])
    assert exponent == pytest.approx(1.7) and low == pytest.approx(1.7) and high == pytest.approx(1.7)
    assert fit_exponent(tokens[:2], [1.0, 2.0]) == (None, None, None)


def test_the_interval_holds_the_exponent_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tokens = np.array([576, 1024, 2304, 4096, 9216, 16384])
    within = 0
    for _ in range(300):
        _, low, high = fit_exponent(tokens, 1e-7 * tokens**2.0 * np.exp(rng.normal(0, 0.1, 6)))
        assert low is not None and high is not None
        within += low <= 2 <= high
    assert 270 <= within <= 297


def test_points_that_fixed_costs_dominate_are_left_out() -> None:
    sizes = [100, 400, 1600, 6400, 25600]
    points = [point(n, 1e-3 + 1e-9 * n**2) for n in sizes]
    select, prefill = growth_of(points, [point(64, 1e-3)])
    assert select.tokens == [6400, 25600] and select.exponent is None  # too few
    assert select.fixed_seconds == 1e-3
    points += [point(102400, 1e-3 + 1e-9 * 102400**2)]
    select, prefill = growth_of(points, [point(64, 1e-3)])
    assert select.tokens == [6400, 25600, 102400] and select.exponent == pytest.approx(2, abs=0.01)
    assert (prefill.stage, prefill.exponent, prefill.tokens) == ("prefill", None, [])  # it does not grow
    everything, _ = growth_of(points, [])
    assert everything.tokens == [*sizes, 102400] and everything.fixed_seconds is None
    assert everything.exponent is not None and everything.exponent < 1.9


def test_what_keeps_every_token_selects_nothing() -> None:
    points = [point(n, 1e-9 * n**2, 1e-9 * n**2).model_copy(update={"kept": n}) for n in (100, 400, 1600)]
    select, prefill = growth_of(points, [])
    assert select.exponent is None and select.tokens == [] and prefill.exponent == pytest.approx(2)


def test_refused_points_are_no_part_of_a_fit() -> None:
    points = [point(n, 1e-9 * n**2) for n in (100, 400, 1600)]
    points.append(
        ScalingPoint(
            tokens=6400, case=CaseId(method="mmtok", parameters={}, budget="4"), refused="needs 12.3 GiB, has 3.02"
        )
    )
    fit = next(growth_of(points, []))
    assert fit.tokens == [100, 400, 1600] and fit.exponent == pytest.approx(2)


@pytest.mark.parametrize("budget", [Budget(count=4), Budget(percent=25)])
def test_counts_at_any_grid(budget: Budget, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    cases = [case("full"), case("mmtok", budget), case("fastv", budget, layer=1)]
    if vlm.family == "qwen3_vl":
        cases.pop()  # its first layers add to all tokens
    for tokens in (16, 64):
        for found in measure_size(vlm, cases, samples[1], tokens, runs=2, warmup=1, seed=0):
            assert found.tokens == tokens and not found.refused
            assert found.kept == (tokens if found.case.method == "full" else budget.resolve(tokens))
            assert len(found.select_values) == len(found.prefill_values) == 2
            assert found.select_seconds == pytest.approx(sum(found.select_values) / 2)
            assert min(found.prefill_values) > 0


def test_the_budget_is_one_of_the_grid_and_resize_stays_within_it(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    full = reduce(tiny_sdpa, make_method("full"), samples[:1], None, grids=[(10, 10)])
    assert full.tokens[0].total == full.tokens[0].kept == 100 and full.vision[0].grid == (10, 10)
    half = reduce(tiny_sdpa, make_method("mmtok"), samples[:1], Budget(percent=50), grids=[(10, 10)])
    assert (half.tokens[0].total, half.tokens[0].kept) == (100, 50)
    resized = reduce(tiny_sdpa, make_method("resize"), samples[:1], Budget(count=64), grids=[(10, 10)])
    assert (resized.tokens[0].total, resized.tokens[0].kept, resized.vision[0].grid) == (100, 64, (8, 8))
    with pytest.raises(MMTokError, match="more than the 16 vision tokens"):
        check_budget(tiny_sdpa, make_method("mmtok"), samples[:1], Budget(count=17), grids=[(4, 4)])


def test_numbers_of_tokens() -> None:
    assert parse_tokens("2304, 576,576") == [576, 2304]
    with pytest.raises(MMTokError, match="1000 vision tokens do not fill a square") as error:
        parse_tokens("1000")
    assert "961 and 1024" in str(error.value.hint)
    for text in ("", "576,", "-4", "0", "many"):
        with pytest.raises(MMTokError):
            parse_tokens(text)


def test_budgets_are_checked_before_anything_runs(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    cases = [case("full"), case("mmtok", Budget(count=100))]
    with pytest.raises(MMTokError, match="mmtok @ 100 at 81 vision tokens"):
        check_scaling(tiny_sdpa, cases, samples[0], [121, 81])
    assert smallest_size(tiny_sdpa, cases, samples[0], [576]) == 121  # at 100 everything would be kept
    assert smallest_size(tiny_sdpa, cases, samples[0], [121]) is None
    assert smallest_size(tiny_sdpa, [case("mmtok", Budget(percent=10))], samples[0], [576]) == 64


def test_memory_that_is_needed(tiny_sdpa: Llava) -> None:
    loop, ours = (needed_memory(tiny_sdpa, case(n, Budget(count=64)), 16384) for n in ("mmtok:loop", "mmtok"))
    assert loop > ours > GIB  # a matrix of 16384 x 16384 is one
    assert ours == needed_memory(tiny_sdpa, case("mmtok", Budget(percent=10)), 16384)
    small = needed_memory(tiny_sdpa, case("random", Budget(count=64)), 16384)
    assert small < needed_memory(tiny_sdpa, case("fastv", Budget(count=64), layer=1), 16384)  # all enter
    eager = FAMILIES["llava"]("eager")
    assert needed_memory(eager, case("full"), 16384) > 8 * 16384**2 * eager.model.config.text_config.num_attention_heads


def test_what_does_not_fit_is_refused(tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case("full"), case("mmtok:loop", Budget(count=4))]
    free = (needed_memory(tiny_sdpa, cases[0], 1024) + needed_memory(tiny_sdpa, cases[1], 1024)) // 2
    monkeypatch.setattr(scaling, "free_memory", lambda device: free)
    whole, loop = measure_size(tiny_sdpa, cases, samples[0], 1024, runs=1, warmup=0, seed=0)
    assert whole.select_seconds and not whole.refused
    assert loop.select_seconds is None and loop.refused is not None and loop.refused.startswith("needs 0.00")
    assert "mmtok:loop needs 0.00" in shown(scaling_table([whole, loop]), 80)
    assert ScalingPoint.model_validate_json(loop.model_dump_json()) == loop


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")]
)
def test_running_out_of_memory_all_the_same_is_no_crash(
    error: Exception, tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(scaling, "prefill", fail)
    (found,) = measure_size(tiny_sdpa, [case("full")], samples[0], 16, runs=1, warmup=0, seed=0)
    assert found.refused == "needs more memory than is free"
    monkeypatch.setattr(scaling, "prefill", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_size(tiny_sdpa, [case("full")], samples[0], 16, runs=1, warmup=0, seed=0)


def test_memory_may_run_out_in_a_timed_run(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a warm-up that fits: the case has no result, and the others have theirs."""
    runs: Counter[str] = Counter()
    monkeypatch.setattr(scaling, "release_memory", lambda device: runs.update(["released"]))

    def tight(model: Llava, reducing: Case, *args: Any) -> float:
        runs[reducing.name] += 1
        if reducing.name == "full" and runs["full"] == 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return run_once(model, reducing, *args)

    run_once = scaling._run
    monkeypatch.setattr(scaling, "_run", tight)
    cases = [case("full"), case("mmtok", Budget(count=4))]
    full, ours = measure_size(tiny_sdpa, cases, samples[0], 16, runs=4, warmup=1, seed=0)
    assert full.refused == "needs more memory than is free" and full.select_seconds is None
    assert runs["full"] == 3 and runs["released"] == 1
    assert ours.refused is None and len(ours.select_values) == 4


def test_images_are_encoded_once_for_all_runs(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all cases that encode the grid alike, and once for those that make it smaller."""
    grids: list[Any] = []
    encode = Llava.encode
    monkeypatch.setattr(
        Llava, "encode", lambda model, prompt, *args, **more: grids.append(1) or encode(model, prompt, *args, **more)
    )
    cases = [case("full"), case("random", Budget(count=4)), case("resize", Budget(count=4))]
    points = measure_size(tiny_sdpa, cases, samples[0], 16, runs=3, warmup=2, seed=0)
    assert [len(point.select_values) for point in points] == [3, 3, 3]
    assert len(grids) == 2


def test_signals_are_part_of_the_selection_in_each_run(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Llava.encode

    def slow(model: Llava, prompt: Prompt, signals: tuple[str, ...] = (), stage: Stage = unwatched) -> Any:
        if signals:
            with stage("select"):
                time.sleep(0.05)
        return encode(model, prompt, signals, stage=stage)

    monkeypatch.setattr(Llava, "encode", slow)
    (found,) = measure_size(tiny_sdpa, [case("hiprune", Budget(count=4))], samples[0], 16, runs=3, warmup=1, seed=0)
    assert len(found.select_values) == 3 and min(found.select_values) >= 0.05


def test_slow_cases_are_run_less_often(
    tiny_sdpa: Llava, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(patience: float, never_twice: float = 1e9) -> int:
        monkeypatch.setattr(scaling, "PATIENCE", patience)
        monkeypatch.setattr(scaling, "NEVER_TWICE", never_twice)
        (found,) = measure_size(tiny_sdpa, [case("full")], samples[0], 16, runs=5, warmup=2, seed=0)
        return len(found.select_values)

    assert runs(1e9) == 5
    assert runs(0) == scaling.FEWEST_RUNS
    assert runs(0, never_twice=0) == 1


def test_tables_fit_and_say_what_was_fitted() -> None:
    points = [point(n, 1e-9 * n**2, 1e-9 * n) for n in (576, 1024, 2304, 4096, 9216, 16384)]
    growth = list(growth_of(points, [point(81, 1e-7, 1e-7)]))
    lines = shown(growth_table(growth, [p.tokens for p in points]), 80).splitlines()
    assert any("mmtok @ 4  select   2.00 (2.00–2.00)" in line and "576–16384 (6 points)" in line for line in lines)
    assert any("prefill  1.00 (1.00–1.00)" in line for line in lines)
    points[2] = points[2].model_copy(update={"select_seconds": 1e-7})
    growth = list(growth_of(points, [point(81, 1e-7, 1e-7)]))
    assert "576 1024 4096 9216 16384" in shown(growth_table(growth, [p.tokens for p in points]), 80)
    refusal = ScalingPoint(
        tokens=16384, case=CaseId(method="mmtok:loop", parameters={}, budget="4"), refused="needs 12.3 GiB, has 3.02"
    )
    text = shown(scaling_table([*points, refusal]), 80)
    assert "mmtok:loop needs 12.3 GiB, has 3.02 " in text and "…" not in text
    table = shown(scaling_table(points), 80)
    assert all(str(p.tokens) in table for p in points) and "269 ms" not in table and "268 ms" in table


def test_names_of_methods_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    results_console().print("mmtok:loop: 1 s")
    assert capsys.readouterr().out == "mmtok:loop: 1 s\n"


def test_interrupting_keeps_the_sizes_that_were_measured(
    tiny_directory: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(model: Llava, cases: list[Case], sample: Sample, tokens: int, **options: object) -> list[ScalingPoint]:
        if tokens == stop:
            raise KeyboardInterrupt
        return [point(tokens, 1.0, method=case.name) for case in cases]

    monkeypatch.setattr(profiling, "measure_size", measure)
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--rounds", 1, "--warmup", 0)
    command += ("--max-new-tokens", 1, "--trace-dir", tmp_path, "--scaling", "--scaling-tokens", "100,144,196")
    for stop, measured in ((196, {100, 144}), (64, set())):
        plot = tmp_path / f"{stop}.png"
        shown = run(*command, "--plot", plot, "--json")
        result = json.loads(shown.stdout)
        assert result["interrupted"] and {p["tokens"] for p in result["scaling"]} == measured
        assert shown.exit_code == 130 and plot.exists() == bool(measured)
        if measured:
            assert Image.open(plot).width > 1000 and f"wrote {plot}" in shown.stderr
        else:
            assert f"{plot} was not written" in shown.stderr and "error: " not in shown.stderr
    assert "interrupted: 0 of 3 numbers of tokens" in run(*command).stderr


def test_command(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", "10%", "--method", "mmtok,mmtok:loop")
    command += ("--rounds", 2, "--warmup", 1, "--max-new-tokens", 2, "--trace-dir", tmp_path / "traces")
    result = run_json(*command, "--scaling", "--scaling-tokens", "324,100,196", "--plot", plot)
    assert result["schema"] == "mmtok.profile/2" and not result["interrupted"]
    assert [c["case"]["method"] for c in result["cases"]] == ["full", "mmtok", "mmtok:loop"]
    assert [(p["tokens"], p["case"]["method"], p["kept"]) for p in result["scaling"]] == [
        (n, method, n if method == "full" else n // 10)
        for n in (100, 196, 324)
        for method in ("full", "mmtok", "mmtok:loop")
    ]
    assert all(p["select_seconds"] > 0 and p["prefill_seconds"] > 0 for p in result["scaling"])
    assert {(g["case"]["method"], g["stage"]) for g in result["growth"]} == {
        (method, stage) for method in ("full", "mmtok", "mmtok:loop") for stage in ("select", "prefill")
    }
    assert [p["tokens"] for p in result["fixed"]] == [64] * 3
    drawn = np.asarray(Image.open(plot).convert("RGB"))
    assert drawn.shape[1] > 1500
    for color in ((255, 127, 14), (44, 160, 44)):  # the lines of the two methods, in both halves
        there = (drawn == color).all(-1)
        assert there[:, : there.shape[1] // 2].sum() > 200 and there[:, there.shape[1] // 2 :].sum() > 200


def test_command_on_screen(tiny_directory: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plot = tmp_path / "scaling.svg"
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--method", "mmtok,divprune,fastv")
    command += ("--rounds", 2, "--warmup", 0, "--max-new-tokens", 2, "--trace-dir", tmp_path / "traces")
    result = run(*command, "--scaling", "--scaling-tokens", "100,144", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "Against the number of vision tokens" in result.stdout and "Growth: seconds" in result.stdout
    assert "Speedup over full" in result.stdout and "divprune @ 4" in result.stdout
    assert "exponents are fitted where" in result.stderr and "wrote" in result.stderr
    assert "…" not in result.stdout.split("Top operators")[0]
    assert plot.read_text().startswith("<?xml")
    assert json.loads(run(*command, "--json").stdout)["scaling"] == []


def test_bad_requests(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", 40, "--trace-dir", tmp_path / "t")
    refused(run(*command, "--plot", tmp_path / "s.png"), "--plot requires --scaling")
    refused(run(*command, "--scaling-tokens", "576"), "--scaling-tokens requires --scaling")
    refused(run(*command, "--scaling", "--plot", tmp_path / "s.txt"), "--plot", ".svg")
    refused(run(*command, "--scaling", "--scaling-tokens", "577"), "577", "576 and 625")
    refused(run(*command, "--scaling", "--scaling-tokens", "36"), "mmtok @ 40", "36 vision tokens", "choose 1 to 36")
    smaller = [30 if word == 40 else word for word in command]
    refused(run(*smaller, "--scaling", "--scaling-tokens", "25"), "mmtok @ 30 at 25 vision tokens", "choose 1 to 25")
    refused(run(*command, "--method", "mmtok,nothing"), "no method 'nothing'")
    refused(run(*command, "--method", ","), "no method was named")
    assert not (tmp_path / "t").exists()


def test_grids_beyond_the_context_are_measured(tiny_directory: Path, tiny: Llava) -> None:
    """Times mean something there, though answers would not."""
    tokens = 48**2
    assert tokens > tiny.context_length
    command = ("profile", "-m", tiny_directory, "--scaling", "--scaling-tokens", tokens, "--methods", "mmtok", "-b", 4)
    shown = run(*command, "--rounds", 1, "--max-new-tokens", 1, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert [point["tokens"] for point in json.loads(shown.stdout)["scaling"]] == [tokens] * 2
