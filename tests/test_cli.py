"""The command line as a person meets it: answers, and JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import QUESTION, refused, run, run_json
from PIL import Image

from mmtok_cli.cases import Case
from mmtok_cli.methods import method_names
from mmtok_cli.profiles import known_profiles


def test_infer(tiny_directory: Path, photo: Path) -> None:
    result = run_json("infer", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--max-new-tokens", 3, "--baseline")
    assert result["schema"] == "mmtok.infer/1"
    assert (result["method"], result["budget"]) == ("mmtok", "4")
    assert result["tokens"]["kept"] == 4 and result["tokens"]["total"] == 36
    assert set(result["seconds"]) == {"prepare", "encode", "select", "prefill", "decode", "ttft", "total"}
    assert result["memory"]["kv_cache"] < result["baseline"]["memory"]["kv_cache"]
    assert result["baseline"]["tokens"]["kept"] == 36

    shown = run("infer", photo, QUESTION, "-m", tiny_directory, "-b", "12%", "--max-new-tokens", 3, "--baseline")
    assert "4/36" in shown.stdout and "36/36" in shown.stdout and result["answer"] in shown.stdout


def test_prune(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    drawn, curve = tmp_path / "kept.png", tmp_path / "gains.svg"
    command = ("prune", photo, QUESTION, "-m", tiny_directory, "-b", 6, "-o", drawn, "--gain-curve", curve)
    entry = run_json(*command)["images"][0]
    assert (entry["width"], entry["height"], entry["grid"]) == (120, 80, [6, 6])
    assert (entry["total"], entry["kept"]) == (36, 6) and len(entry["indices"]) == 6
    assert sorted(entry["order"]) == entry["indices"] == sorted(set(entry["indices"]))
    assert entry["gains"] == sorted(entry["gains"], reverse=True)
    assert Image.open(drawn).size == (720, 480)
    assert curve.read_text().startswith("<?xml")
    assert not list(tmp_path.glob(".*"))

    shown = run("prune", photo, QUESTION, "-m", tiny_directory, "-b", 6, "--mark", 2)
    assert shown.stdout.count("■") == 4 and " 1 " in shown.stdout


def test_prune_inside_the_language_model(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    """What is shown is what went through the last layer, and the prompt is read to find out."""
    from mmtok_cli.budget import Budget
    from mmtok_cli.data.samples import sample_from_file
    from mmtok_cli.methods import make_method
    from mmtok_cli.models import load_model
    from mmtok_cli.pipeline import answer

    drawn = tmp_path / "kept.png"
    command = ("prune", photo, QUESTION, "-m", tiny_directory, "-b", 6, "--method", "fastv")
    result = run_json(*command, "-o", drawn)
    entry = result["images"][0]
    sample = sample_from_file(photo, QUESTION)
    model = load_model(str(tiny_directory))
    expected = answer(model, make_method("fastv"), [sample], Budget(count=6), max_new_tokens=1).selections[0]
    assert entry["indices"] == expected.places.tolist() and entry["kept"] == len(entry["indices"]) == 6
    assert entry["layer_average"] == pytest.approx((2 * 36 + 2 * 6) / 4)
    assert set(result["seconds"]) == {"prepare", "encode", "select", "prefill"}
    assert result["positions"] == "keep" and drawn.exists()

    early = run_json(*command, "--set", "fastv.layer=1", "--positions", "renumber")
    assert early["images"][0]["layer_average"] == pytest.approx((36 + 3 * 6) / 4)
    assert early["positions"] == early["rules"]["positions"] == "renumber"
    shown = run(*command)
    assert shown.stdout.startswith("6 of 36 vision tokens kept by fastv @ 6, 21 on average over the decoder layers")


def test_prune_with_tokens_that_stand_for_no_place(tiny_directory: Path, photo: Path) -> None:
    command = ("prune", photo, QUESTION, "-m", tiny_directory, "-b", 8, "--method", "visionzip")
    result = run_json(*command)
    entry = result["images"][0]
    assert entry["kept"] == 8 and len(entry["indices"]) == 7  # the class token is nowhere in the image
    assert entry["indices"] == sorted(set(entry["indices"])) and entry["indices"][0] >= 0
    assert "prefill" not in result["seconds"]
    shown = run(*command)
    assert shown.stdout.startswith(
        "8 of 36 vision tokens kept by visionzip @ 8, 1 of them merged and one the class token"
    )
    assert shown.stdout.count("■") == 6 and shown.stdout.count("□") == 1


def test_rules_are_followed_and_reported(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    rules = ("--track", "harmonised", "--positions", "keep", "--budget-means", "layer-average")
    model = ("-m", tiny_directory, *rules, "-b", 26, "--set", "fastv.layer=2")
    one = ("--method", "fastv")
    runs = ("--rounds", 1, "--warmup", 0, "--trace-dir", tmp_path)
    for command in (
        ("infer", photo, QUESTION, *model, *one, "--max-new-tokens", 2),
        ("prune", photo, QUESTION, *model, *one),
        ("profile", photo, QUESTION, *model, *one, *runs, "--max-new-tokens", 2),
        ("compare", "--methods", "fastv", *model, "--limit", 1, "--max-new-tokens", 2),
    ):
        result = run_json(*command)
        expected = {"track": "harmonised", "positions": "keep", "budget_means": "layer-average", "budget_per": "image"}
        assert result["rules"] == expected
        case = result if "tokens" in result else (result.get("results") or result.get("cases") or [0, result])[1]
        tokens = case.get("tokens") or case["images"][0]
        assert (tokens["kept"], tokens["layer_average"], case["positions"]) == (16, 26, "keep")


def test_rules_on_screen(tiny_directory: Path, photo: Path) -> None:
    model = ("-m", tiny_directory, "-b", 6, "--max-new-tokens", 2)
    compared = run("compare", *model, "--methods", "fastv,mmtok", "--limit", 1, "--track", "harmonised")
    assert "seed 0; harmonised track" in " ".join(compared.stdout.split()) and " avg " in compared.stdout
    notes = " ".join(compared.stderr.split())
    assert "selection overhead, as a share of encode and prefill: fastv" in notes and "layer average (avg)" in notes
    plain = run("compare", *model, "--methods", "mmtok", "--limit", 1)
    assert "track" not in plain.stdout and " avg " not in plain.stdout
    assert "layer average" in run("infer", photo, QUESTION, *model, "--method", "fastv").stdout
    assert "layer average" not in run("infer", photo, QUESTION, *model).stdout


def test_bad_rules_and_settings(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    for command in (
        ("infer", photo, QUESTION, "--method", "fastv"),
        ("prune", photo, QUESTION, "--method", "fastv"),
        ("profile", photo, QUESTION, "--method", "fastv", "--trace-dir", tmp_path / "t"),
        ("compare", "--methods", "fastv", "--limit", 1),
    ):
        command = (*command, "-m", tiny_directory, "-b", 6)
        refused(run(*command, "--track", "paper"), "no track 'paper'", "released or harmonised")
        refused(run(*command, "--positions", "move"), "no position policy 'move'", "keep or renumber")
        refused(run(*command, "--budget-means", "mean"), "'mean'", "final or layer-average")
        refused(run(*command, "--set", "fastv.layers=2"), "no parameter 'layers'", "did you mean layer")
        refused(run(*command, "--set", "mmtok.alpha=0"), "mmtok is not among the methods", "fastv")
        refused(run(*command, "--set", "fastv.layer=4"), "fastv.layer=4", "1 to 3")
        refused(run(*command, "--budget-means", "layer-average"), "layer average of 6", "choose 19 to 36")
    assert not (tmp_path / "t").exists()


def test_infer_from_several_images(photo: Path, tiny_directory: Path) -> None:
    question = "is <image> or <image> red ?"
    said = run_json("infer", photo, question, "--image", photo, "-m", tiny_directory, "-b", 4)
    assert said["tokens"]["kept"] == 8 and said["tokens"]["total"] == 72
    refused(run("infer", photo, question, "-m", tiny_directory, "-b", 4), "2 <image> markers for 1 image")
    refused(run("infer", photo, QUESTION, "--image", "nowhere.png", "-m", tiny_directory), "nowhere.png")


def test_settings_override_the_seed_and_the_profile(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtok_cli.profiles import known_profiles

    mine = known_profiles()["demo"].model_copy(
        update={"name": "mine", "methods": {"mmtok": {"alpha": 0.25}, "sparsevlm": {"layers": [0, 1]}}}
    )
    monkeypatch.setattr("mmtok_cli.models.sources.profile_of", lambda name: mine)
    command = ("compare", "-m", tiny_directory, "-b", 4, "--limit", 1, "--max-new-tokens", 2)
    parameters = {
        case["case"]["method"]: case["case"]["parameters"]
        for case in run_json(
            *(*command, "--methods", "mmtok,mmtok:text,random", "--seed", 5),
            *("--set", "mmtok.alpha=0.75", "--set", "random.seed=9"),
        )["results"]
    }
    assert parameters["mmtok"]["alpha"] == 0.75 and parameters["mmtok:text"]["alpha"] == 0.25
    assert parameters["random"]["seed"] == 9

    mine.methods["mmtok"]["alpa"] = 0.3
    refused(run(*command, "--methods", "mmtok"), "profile mine", "methods.mmtok.alpa", "did you mean alpha")


def test_compare(tiny_directory: Path, tmp_path: Path) -> None:
    command = ("compare", "-m", tiny_directory, "--limit", 6, "-b", "4,8", "--max-new-tokens", 2)
    result = run_json(*command, "--methods", "mmtok,random,none")
    assert result["schema"] == "mmtok.compare/2" and not result["interrupted"]
    cases = [(case["case"]["method"], case["case"]["budget"]) for case in result["results"]]
    assert cases == [("full", None), ("mmtok", "4"), ("mmtok", "8"), ("random", "4"), ("random", "8"), ("none", None)]
    order = result["schedule"]["order"]
    assert len(order) == 6 and all(sorted(round_) == list(range(6)) for round_ in order)
    for case in result["results"]:
        assert len(case["seconds"]["prefill"]["values"]) == 6
        assert case["tokens"]["kept"] == (36 if case["case"]["method"] == "full" else int(case["case"]["budget"] or 0))
    assert result["results"][1]["speedup"]["prefill"]["low"] <= result["results"][1]["speedup"]["prefill"]["high"]
    assert result["results"][0]["score_counts"]["asked"] == 6

    shown = run(*command, "--methods", "resize:pool", "--batch-size", 2, "--plot", tmp_path / "tradeoff.png")
    assert "4/36" in shown.stdout and "6 samples, batch size 2" in shown.stdout and "wrote" in shown.stderr
    assert Image.open(tmp_path / "tradeoff.png").width > 1000


def test_profile(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    command = ("profile", photo, QUESTION, "-m", tiny_directory, "-b", 4, "--rounds", 3, "--trace-dir", traces)
    result = run_json(*command, "--max-new-tokens", 3)
    assert result["schema"] == "mmtok.profile/2" and result["trace"] == str(traces)
    full, reduced = result["cases"]
    assert len(full["seconds"]["encode"]["values"]) == 3
    assert reduced["flops"]["prefill"] < full["flops"]["prefill"]
    assert {operator["stage"] for operator in result["operators"]} >= {"encode", "select", "prefill", "decode"}
    assert result["stage_peaks"]["full"]["prefill"] > result["stage_peaks"]["mmtok @ 4"]["prefill"] > 0
    assert len(list(traces.rglob("*.pt.trace.json"))) == 2


def test_catalogues() -> None:
    methods = run_json("methods")["methods"]
    assert [method["name"] for method in methods] == method_names()
    assert run_json("methods", "mmtok")["methods"][0]["parameters"]["alpha"] == 0.5
    by_name = {method["name"]: method for method in methods}
    fastv = by_name["fastv"]
    assert (fastv["acts"], fastv["reads_question"], fastv["training_free"], fastv["multi_turn"]) == (
        "inside the language model",
        True,
        True,
        False,
    )
    assert fastv["positions"] == "keep" and fastv["keeps_padding"] and fastv["settings"] == {"layer": "fastv.layer=2"}
    assert by_name["visionzip"]["signals"] == ["class_attention", "mean_keys", "class_feature"]
    assert by_name["sparsevlm"]["parameters"] == {"layers": [2, 6, 15]}
    assert not any(method["multi_turn"] and method["reads_question"] for method in methods)
    listed = run("methods").stdout
    assert all(name in listed for name in method_names()) and "turns: " in listed
    assert re.search(r"mmtok:text +2508.18264 +ICLR 2026 +Apache-2.0 +recorded outputs", listed)
    assert "--set fastv.layer=2" in run("methods", "fastv").stdout
    models = run_json("models")["models"]
    assert models[0]["name"] == "demo" and {"llava-1.5-7b", "llava-1.5-13b"} <= {m["name"] for m in models}
    assert "llava-hf/llava-1.5-7b-hf" in run("models").stdout
    assert models[0]["here"] is True
    assert "arXiv 2508.18264" in run("methods", "mmtok").stdout


def test_partial_batches_are_asked_and_not_timed(tiny_directory: Path) -> None:
    command = ("compare", "-m", tiny_directory, "-b", 4, "--max-new-tokens", 2, "--methods", "random", "--json")
    result = run(*command, "--limit", 5, "--batch-size", 2, "--rounds", 3)
    pairs = json.loads(result.stdout)
    assert pairs["results"][0]["score_counts"]["asked"] == pairs["schedule"]["samples"] == 5
    assert pairs["schedule"]["timed"] == 4
    alone = json.loads(run(*command, "--limit", 5, "--rounds", 4).stdout)
    two, one = pairs["results"][1], alone["results"][1]
    assert two["score"] == one["score"] and two["tokens"]["text"] == one["tokens"]["text"]
    assert two["memory"]["kv_cache"] == pytest.approx(one["memory"]["kv_cache"], rel=0.1)  # per sample; padding aside
    refused(run(*command, "--limit", 1, "--batch-size", 2), "batch size 2 is larger than the number of samples (1)")


@pytest.mark.parametrize(
    "command", [("profile", "--rounds", "100000"), ("compare", "--rounds", "100000", "--methods", "mmtok")]
)
def test_interrupting_keeps_what_was_measured(
    command: tuple[str, ...], tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal, in the middle of a round."""
    usual, answered = Case.answer, []

    def answer(self: Case, *arguments: Any, **options: Any) -> Any:
        answered.append(self)
        if len(answered) == 24:
            signal.raise_signal(signal.SIGINT)
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Case, "answer", answer)
    # A shell's background jobs ignore the signal, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = run(*command, "-m", tiny_directory, "-b", 4, "--json")
    finally:
        signal.signal(signal.SIGINT, before)
    result = json.loads(stopped.stdout)
    assert (
        stopped.exit_code == 130
        and result["interrupted"]
        and result["schedule"]["rounds"] == len(result["schedule"]["order"])
    )
    assert 0 < result["schedule"]["rounds"] < 24 / 2


@pytest.mark.parametrize("command", ["", "infer", "prune", "profile", "compare", "models", "methods"])
def test_help_does_not_import_torch(command: str) -> None:
    code = (
        "import sys; sys.argv = ['mmtok', *sys.argv[1:]]\n"
        "from mmtok_cli.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = [*command.split(), "--help"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_budget_that_cannot_be_met_is_refused_before_measuring() -> None:
    """The demo model has four layers: two of them see all 576 tokens whatever is dropped behind."""
    command = ("compare", "--methods", "fastv", "--set", "fastv.layer=2", "--budget-means", "layer-average")
    refused(
        run(*command, "--budget", 100),
        "error: fastv @ 100: a layer average of 100 vision tokens cannot be reached",
        "288.5",
        "hint: choose 289 to 576",
    )


def test_installed_command_on_the_demo_model(tmp_path: Path) -> None:
    """A real process, the real model: JSON alone on standard output."""
    image = tmp_path / "scene.png"
    from mmtok_cli.data.samples import demo_samples
    from mmtok_cli.evaluation.metrics import score_of

    sample = demo_samples(1)[0]
    sample.images[0].save(image)
    command = [str(Path(sys.executable).with_name("mmtok")), "infer", str(image), sample.question, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["model"] == "demo" and result["tokens"]["kept"] == 64 and result["tokens"]["total"] == 576
    assert score_of(sample, result["answer"], "exact") == 1


def test_catalogue_has_one_line_for_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("methods").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "─" in line) + 1
    names = method_names()
    assert [line.split()[0] for line in lines[start : start + len(names)]] == names


def test_random_weights_say_what_they_are(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    command = (photo, QUESTION, "-m", tiny_directory, "-b", 4, "--weights", "random")
    for shown in (
        run("infer", *command, "--max-new-tokens", 2),
        run("compare", *command[2:], "--methods", "mmtok", "--limit", 2, "--max-new-tokens", 2),
        run("profile", *command, "--rounds", 2, "--max-new-tokens", 2, "--trace-dir", tmp_path),
    ):
        assert shown.exit_code == 0, shown.output
        assert "random weights: only time and memory are meaningful" in " ".join(shown.stdout.split())
    pruned = run("prune", *command, "--layers", 1)
    assert pruned.exit_code == 0, pruned.output
    assert "random weights: which vision tokens are kept is not meaningful" in pruned.stdout
    assert re.search(r"only 1 of \d+ decoder layers were run", pruned.stdout) and "estimate" not in pruned.stdout
    assert run_json("infer", *command, "--max-new-tokens", 2)["weights"] == "random"
    assert "random weights" not in run("infer", *command[:-2], "--max-new-tokens", 2).stdout
    refused(run("infer", *command[:-1], "zero"), "no weights 'zero'", "pretrained, random")


def test_models_in_the_cache_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert not known_profiles()["llava-1.5-7b"].is_here()
    cached = tmp_path / "models--llava-hf--llava-1.5-7b-hf"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "model.safetensors.index.json").write_text("{}")
    assert known_profiles()["llava-1.5-7b"].is_here()
