"""Models without weights here, and models that do not fit: what `profile` measures, and what the others say."""

from __future__ import annotations

import csv
import shlex
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_helpers import QUESTION, refused, run, run_json
from PIL import Image
from typer.testing import Result

from mmtok_cli import profiles
from mmtok_cli.fallback import FirstMeasurement, Plan, RunTimes
from mmtok_cli.models import outline, room
from mmtok_cli.models.room import needs_of, needs_quantized
from mmtok_cli.models.sources import missing_weights
from mmtok_cli.profiles import is_cached
from mmtok_cli.settings import ProfileSettings

PROFILE = ("-b", 8, "--rounds", 1, "--warmup", 0, "--max-new-tokens", 2, "--top", 1, "--trace-dir", "traces")
SMALLER = {  # of the architecture in profiles/llava-next-13b.toml
    "hidden_size = 5120": "hidden_size = 32",
    "intermediate_size = 13824": "intermediate_size = 64",
    "num_hidden_layers = 40": "num_hidden_layers = 6",
    "num_attention_heads = 40": "num_attention_heads = 2",
    "num_key_value_heads = 40": "num_key_value_heads = 2",
    "hidden_size = 1024": "hidden_size = 16",
    "intermediate_size = 4096": "intermediate_size = 32",
    "num_hidden_layers = 24": "num_hidden_layers = 2",
    "num_attention_heads = 16": "num_attention_heads = 2",
    "llava-hf/llava-v1.6-vicuna-13b-hf": "nobody/small",
    'name = "llava-next-13b"': 'name = "small"',
}


@pytest.fixture()
def bare(tiny_directory: Path, tmp_path: Path) -> Path:
    """A model directory without weights."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*")))


@pytest.fixture()
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a known model whose weights are neither in the cache nor within reach."""
    text = (profiles.profile_directory() / "llava-next-13b.toml").read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    directory = Path(shutil.copytree(profiles.profile_directory(), tmp_path / "profiles"))
    (directory / "small.toml").write_text(text)
    monkeypatch.setattr(profiles, "profile_directory", lambda: directory)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "small"


@pytest.fixture()
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulates a memory into which so many layers of a model in a data type fit, and not one more."""

    def limit(model: str, dtype: torch.dtype, layers: int, tokens: int) -> None:
        layout = outline(model, device="cpu", attention="sdpa").model
        need = needs_of(layout, dtype, (tokens,)).of_layers(layers)
        free = (
            need.total if layers == need.of_layers(layers).layers == layout.config.text_config.num_hidden_layers else 0
        )
        free = free or -(-need.total * 10 // 9) + 1  # a part is to leave a tenth of the memory free
        monkeypatch.setattr(room, "free_memory", lambda device: free)

    return limit


def command_in(result: Result) -> list[str]:
    """The arguments of the command that a hint names."""
    hint = result.stderr.splitlines()[-1]
    return shlex.split(hint[hint.index("mmtok ") :])[1:]


def repeated(result: Result, *options: object) -> Result:
    """What the command of a hint says. options: to have it measured quickly."""
    command, *rest = command_in(result)
    return run(command, *rest, *options)


def test_a_directory_without_weights_is_measured_with_random_ones(bare: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"result.{kind}" for kind in ("json", "csv", "md", "html")]
    exports = [part for file in files for part in ("--export", file)]
    shown = run("profile", "--model", bare, *PROFILE, "--quiet", *exports)
    assert shown.exit_code == 0, shown.output
    said = "weights not found: random; float32"
    assert " ".join(shown.stdout.split()).startswith(f"{bare}: {said}")
    assert said in files[2].read_text().splitlines()[0]
    page = files[3].read_text()
    assert said in page and "1024x768 pixels" in page
    row = next(csv.DictReader(files[1].open()))
    assert (row["fallback"], row["weights"], row["image_size"]) == (said, "random", "1024x768")
    loud = run("profile", "--model", bare, *PROFILE)
    assert said in " ".join(loud.stderr.split("\n")[0].split())
    found = run_json("profile", "--model", bare, *PROFILE)
    assert (found["environment"]["fallback"], found["environment"]["layers"]) == (said, None)
    assert found["schedule"]["image_size"] == [1024, 768] and found["schedule"]["rounds"] == 1


def test_a_model_that_is_here_and_fits_is_measured_as_it_is(tiny_directory: Path) -> None:
    for more in ((), ("--strict",)):
        found = run_json("profile", "--model", tiny_directory, *PROFILE, *more)
        assert found["environment"]["fallback"] is None and found["environment"]["weights"] == "pretrained"
    found = run_json("profile", "--model", tiny_directory, *PROFILE, "--weights", "random")
    assert found["environment"]["fallback"] is None and found["environment"]["weights"] == "random"


def test_known_models_need_neither_weights_nor_network(small: str) -> None:
    found = run_json("profile", "--model", small, *PROFILE)
    assert found["environment"]["fallback"] == "weights not found: random; float32"
    assert found["cases"][0]["tokens"]["total"] == 2340


def test_the_widest_data_type_in_which_all_layers_fit(tiny_directory: Path, limited: Callable[..., None]) -> None:
    limited(str(tiny_directory), torch.bfloat16, 4, 36)
    found = run_json("profile", "--model", tiny_directory, *PROFILE)
    environment = found["environment"]
    assert environment["fallback"] == "does not fit: pretrained weights; bfloat16"
    assert (environment["weights"], environment["dtype"], environment["layers"]) == ("pretrained", "bfloat16", None)


@pytest.mark.skipif(find_spec("torchao") is None or find_spec("accelerate") is None, reason="needs torchao, accelerate")
def test_a_model_that_fits_quantized_is_measured_whole(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = outline(str(tiny_directory), device="cpu", attention="sdpa").model
    need = needs_quantized(needs_of(layout, torch.float32, (36,)), layout, torch.float32, "int8")
    monkeypatch.setattr(room, "free_memory", lambda device: need.total)
    command = ("profile", "--model", tiny_directory, *PROFILE, "--dtype", "float32")
    quantized = run_json(*command, "--quantization", "int8")["environment"]
    assert (quantized["fallback"], quantized["layers"], quantized["quantization"]) == (None, None, "int8")
    refused(run(*command), "does not fit")


def test_as_many_layers_as_fit(small: str, limited: Callable[..., None]) -> None:
    limited(small, torch.bfloat16, 3, 2340)
    found = run_json("profile", "--model", small, *PROFILE)
    environment = found["environment"]
    assert environment["fallback"] == (
        "weights not found: random; bfloat16; 3 of 6 layers measured, the rest estimated (~)"
    )
    assert (environment["dtype"], environment["layers"]) == ("bfloat16", [3, 6])


def test_what_is_spelled_out_is_kept_or_refused(small: str, limited: Callable[..., None]) -> None:
    limited(small, torch.float32, 3, 2340)
    found = run_json("profile", "--model", small, *PROFILE, "--dtype", "float32")
    assert (found["environment"]["dtype"], found["environment"]["layers"]) == ("float32", [3, 6])
    found = run_json("profile", "--model", small, *PROFILE, "--layers", 2)
    assert (found["environment"]["dtype"], found["environment"]["layers"]) == ("float32", [2, 6])
    for spelled in (("--dtype", "float32", "--layers", 6), ("--weights", "pretrained"), ("--strict",)):
        said = run("profile", "--model", small, *PROFILE, *spelled)
        refused(said, small, "hint: ")
        assert repeated(said).exit_code == 0, command_in(said)


def test_methods_that_cut_deeper_than_what_fits(small: str, limited: Callable[..., None]) -> None:
    limited(small, torch.bfloat16, 3, 2340)
    method = ("--methods", "fastv", "--set", "fastv.layer=4")
    refused(run("profile", "--model", small, *PROFILE, *method), "before decoder layer 5 of small", "only 3 layers fit")


FEW = ("--rounds", 1, "--warmup", 0, "--methods", "mmtok", "--budget", 160)  # in place of the profile's fourteen cases


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize(
    ("command", "more"),
    [
        (("infer", "PHOTO", QUESTION), ()),
        (("prune", "PHOTO", QUESTION), ()),
        (("compare", "--no-quality"), ("--limit", 1, *FEW)),
        (("compare", "--limit", "1"), FEW),
        (("compare", "--layers=6", "--limit=1"), FEW),
        (("compare", "--retain", "90%", "--by=kind", "--limit", "1"), FEW),
        (
            ("compare", "--turns=reselect", "--encode-again", "--data", "demo:conversations", "--limit", "1"),
            FEW,
        ),
        (("compare", "--plot", "x.png", "--export=x.jsonl", "--limit", "1"), FEW),
    ],
)
def test_other_commands_refuse_and_name_a_command_that_works(
    small: str, photo: Path, limited: Callable[..., None], command: Sequence[str], more: Sequence[object], layers: int
) -> None:
    if layers:
        limited(small, torch.bfloat16, layers, 2340)
    given = [str(photo) if part == "PHOTO" else part for part in command]
    said = run(*given, "--model", small)
    refused(said, "small has no weights here", *(["small does not fit"] if layers else []))
    again = command_in(said)
    assert "small" in again
    if command[0] == "compare":
        assert again[0] == "compare" and {"--weights", "--no-quality"} <= set(again)
        assert any(part.startswith("--layers") for part in again) == bool(layers or "--layers=6" in command)
    else:
        assert again[0] == "profile"
        more = PROFILE
    done = run(*again, *more)
    assert done.exit_code == 0, done.output


def test_a_draft_of_a_model_without_weights_is_refused_with_a_command_that_works(small: str) -> None:
    said = run("compare", "--limit", 1, "--methods", "mmtok", "--draft", small)
    refused(said, "small has no weights here")
    assert command_in(said) == ["profile", "--model", small]


def test_the_own_draft_of_a_model_that_does_not_fit(small: str, limited: Callable[..., None]) -> None:
    limited(small, torch.bfloat16, 3, 2340)
    refused(run("profile", "--model", small, *PROFILE, "--draft", "self"), "--draft self runs whole models only")


def test_the_same_command_in_a_narrower_data_type(
    tiny_directory: Path, photo: Path, limited: Callable[..., None]
) -> None:
    limited(str(tiny_directory), torch.bfloat16, 4, 576)
    for command in (("infer", photo, QUESTION, "-b", 8), ("prune", photo, QUESTION, "-b", 8)):
        said = run(*command, "-m", tiny_directory)
        refused(said, "does not fit")
        assert command_in(said)[0] == command[0] and repeated(said).exit_code == 0


def test_faults_stay_errors(bare: Path, tmp_path: Path, tiny_directory: Path) -> None:
    refused(run("profile", "--model", "lava-1.5-7b", *PROFILE), "there is no model 'lava-1.5-7b'")
    incomplete = Path(shutil.copytree(tiny_directory, tmp_path / "incomplete"))
    weights = incomplete / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("profile", "--model", incomplete, *PROFILE), "model.safetensors of")
    config = bare / "config.json"
    config.write_text(config.read_text().replace('"llava"', '"lava"'))
    refused(run("profile", "--model", bare, *PROFILE), "is a 'lava' model, which is not supported")


def test_weights_in_the_cache_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither" not in (missing_weights("name", "some/model") or "neither")
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    assert not is_cached("some/model")
    (snapshot / "1.safetensors").touch()
    assert is_cached("some/model") and missing_weights("name", "some/model") is None


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("llava-1.5-7b", 576),
        ("llava-next-13b", 2340),
        ("qwen2.5-vl-7b", 999),
        ("qwen3-vl-8b", 768),
        ("internvl3-2b", 3328),
    ],
)
def test_pictures_of_a_usual_size(model: str, tokens: int) -> None:
    assert outline(model, device="cpu", attention="sdpa").total(Image.new("RGB", (1024, 768))) == tokens


def test_the_size_of_the_picture(photo: Path) -> None:
    assert run_json("profile", *PROFILE)["schedule"]["image_size"] == [336, 336]
    assert run_json("profile", *PROFILE, "--image-size", "640X480")["schedule"]["image_size"] == [640, 480]
    assert run_json("profile", photo, *PROFILE)["schedule"]["image_size"] == [120, 80]
    assert run_json("profile", photo, *PROFILE, "--image-size", "90x70")["schedule"]["image_size"] == [90, 70]
    for text in ("640", "0x20", "20x99999", "axb", "-1x5", "5x5x5"):
        refused(run("profile", f"--image-size={text}"), "--image-size", text)


@pytest.fixture()
def times() -> Callable[..., RunTimes]:
    need = room.Needs(weights=40, layer=1, working=0, cache=0, layers=40, vision_tokens=1, parameters=40)
    first = FirstMeasurement(loading=0, all_cases=10, layer=2, elapsed=20)
    return lambda **settings: RunTimes(ProfileSettings.of(**settings), first, need, fewest=2)


def test_layers_and_rounds_within_the_time(times: Callable[..., RunTimes]) -> None:
    # Nine passes (one to warm up, six rounds, operations, trace) of 10 s and 2 s for each layer beyond the second.
    found = times(max_time=20 + 9 * (10 + 2 * 5))
    assert found.most_layers(30) == 7 and found.most_layers(4) == 4
    assert found.most_rounds(7) == 6 and found.most_rounds(4) == 9
    assert times(max_time=1e5).most_layers(30) == 30 and times(max_time=1e5).most_rounds(30) == 20
    spelled = times(max_time=20 + 6 * (10 + 2 * 5), rounds=2, warmup=2)
    assert spelled.most_layers(30) == 7 and spelled.most_rounds(7) == 2
    assert (times(max_time=21).most_layers(30), times(max_time=21).most_rounds(2)) == (2, 3)


def test_rounds_end_when_the_time_is_over() -> None:
    settings = ProfileSettings.of()
    assert not Plan(settings, 20, 1, (1,), "fallback").is_over(10)
    assert Plan(settings, 20, 1, (1,), "fallback", end=0.0).is_over(3)
    assert not Plan(settings, 20, 1, (1,), "fallback", end=0.0).is_over(2)
    assert not Plan(settings, 20, 1, (1,), "fallback", end=1e12).is_over(3)
