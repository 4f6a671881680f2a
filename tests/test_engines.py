"""`--engine`: what is refused, what an engine is sent, and what is made of its answers. The engine is a fake."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import refused, run
from PIL import Image
from typer.testing import Result

from mmtok_cli import engines, serving
from mmtok_cli.budget import Budget
from mmtok_cli.cli.main import app
from mmtok_cli.configuration import configured_method
from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.vllm.engine import EngineOptions, EngineRequest, reason
from mmtok_cli.integrations.vllm.request import combined, resolved
from mmtok_cli.methods import method_names
from mmtok_cli.methods.settings import read_settings, settings_of
from mmtok_cli.models import outline
from mmtok_cli.models.without_weights import save_without_weights
from mmtok_cli.results.engine import EngineInfo, EngineProfile, LoadRun, ServedRequest
from mmtok_cli.results.schema import from_json
from mmtok_cli.settings import CompareSettings, InferSettings, ProfileSettings, option_name
from mmtok_cli.timing.load import Encoding, Step, busy_seconds, closed_loop

EXAMPLE = Path(serving.__file__).parent / "demo" / "example.png"


class FakeEngine:
    """Answers "yes", or "no" to requests of the method random. Its steps take as long as it is told, not as they
    do. Every request and the order of the load runs are kept."""

    seen: list[EngineRequest]
    order: list[tuple[int, int, int | None]]
    device, device_name, dtype = "cpu", None, "float32"

    def __init__(self, options: EngineOptions, architecture: str, image_token: int) -> None:
        assert architecture == "LlavaForConditionalGeneration"
        self.options, self.image_token, self.is_open = options, image_token, False

    def start(self) -> None:
        self.is_open = True
        FakeEngine.seen, FakeEngine.order = [], []

    def close(self) -> None:
        self.is_open = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(name="vllm", version="0.0", kv_cache_tokens=1000, settings={}, caches="off")

    async def _serve(self, request: EngineRequest) -> ServedRequest:
        FakeEngine.seen.append(request)
        assert self.is_open and request.prompt.count(self.image_token) == len(request.images)
        await asyncio.sleep(0)
        method = request.reduction["method"]
        budget = request.reduction.get("budget")
        kept = Budget.parse(budget).resolve(request.vision) if budget else request.vision
        seconds = {"preprocess": 0.01, "queue": 0.0, "first_step": 0.001 * kept, "decode": 0.02}
        seconds |= {"ttft": 0.01 + 0.001 * kept, "total": 0.03 + 0.001 * kept}
        return ServedRequest(
            sample=request.sample,
            seconds=seconds,
            vision=request.vision,
            kept=kept,
            prompt=len(request.prompt) - len(request.images) + kept,
            new=2,
            answer="no" if method == "random" else "yes",
        )

    def run(
        self, requests: Sequence[EngineRequest], concurrency: int, *, case: int = 0, number: int | None = None
    ) -> LoadRun:
        FakeEngine.order.append((case, concurrency, number))
        served = asyncio.run(closed_loop(self._serve, requests, concurrency))
        kept = sum(each.kept for each in served)
        encodings = [Encoding(0.4 * len(served), 0.1 * len(served) if case else 0.0, len(served))]
        steps = [Step(encodings[0].encode + encodings[0].select + 0.001 * kept, kept, 0, 0.25)]
        duration = steps[0].seconds + 0.1
        return LoadRun(
            case=case,
            concurrency=concurrency,
            round=number,
            seconds=duration,
            requests=served,
            busy=busy_seconds(duration, steps, encodings),
            images=len(served),
            encodings=1,
            steps=1,
            kv_cache=0.25,
        )

    def answers(self, requests: Sequence[EngineRequest], concurrency: int) -> list[ServedRequest | MMTokError]:
        found: list[ServedRequest | MMTokError] = list(asyncio.run(closed_loop(self._serve, requests, concurrency)))
        refusals = [MMTokError("too large") if request.sample == 5 else None for request in requests]
        return [refusal or answer for refusal, answer in zip(refusals, found, strict=True)]


@pytest.fixture()
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    monkeypatch.setattr(serving, "VllmEngine", FakeEngine)
    return FakeEngine


def parsed(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# Which engine, and what goes with it


@pytest.mark.parametrize("command", [("infer", EXAMPLE, "q"), ("profile",), ("compare",)])
def test_an_unknown_engine_is_refused_with_the_nearest(command: tuple[object, ...]) -> None:
    refused(run(*command, "--engine", "vlm"), "there is no engine 'vlm'", "did you mean vllm?")
    refused(run(*command, "--engine", "tgi"), "choose one of transformers, vllm")


@pytest.mark.parametrize("command", [("infer", "missing.png", "q"), ("profile",), ("compare",)])
def test_an_engine_that_is_not_installed(command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    refused(run(*command, "--engine", "vllm"), "vLLM, which is not installed", "pip install 'mmtok[vllm]'")


REFUSED = [
    *[(("infer", EXAMPLE, "q"), option) for option in ("--turn=Why?", "--turns=union", "--quantization=int8")],
    *[(("infer", EXAMPLE, "q"), option) for option in ("--draft=self", "--positions=keep", "--device-map=auto")],
    *[(("profile",), option) for option in ("--compile", "--find-batch", "--scaling", "--trace-dir=t", "--runs=2")],
    *[(("profile",), option) for option in ("--batch-size=2", "--max-time=9", "--strict", "--attention=eager")],
    *[(("compare",), option) for option in ("--layers=2", "--retain=98%", "--rounds=6", "--run-dir=r", "--resume")],
    *[(("compare",), option) for option in ("--no-quality", "--plot=p.png", "--fail-below=1", "--new-tokens=8")],
    (("compare",), "--tasks=pope"),
]


@pytest.mark.parametrize(("command", "option"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_options_that_do_not_go_with_an_engine(
    fake: type[FakeEngine], command: tuple[object, ...], option: str
) -> None:
    name = option.split("=")[0]
    refused(run(*command, "--engine", "vllm", option), f"{name} does not go with --engine vllm: ", f"omit {name}")


def test_refused_options_exist() -> None:
    """A table that names a parameter that no command has refuses nothing."""
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    everywhere = {param.name for name in ("infer", "profile", "compare") for param in commands[name].params}
    assert set(engines.VLLM) <= everywhere
    for name, table in engines.OF_COMMAND.items():
        assert set(table) <= {param.name for param in commands[name].params}, name
    assert {param.name for param in commands["profile"].params} >= engines.ONLY_ENGINES


@pytest.mark.parametrize("option", ["--concurrency=4", "--requests=4", "--data=demo"])
def test_options_of_engines_alone(option: str) -> None:
    name = option.split("=")[0]
    refused(run("profile", option), f"{name} needs a serving engine", "add --engine vllm")


def test_wrong_numbers_of_requests_in_flight() -> None:
    for value in ("0", "four", "1,,2", "-1"):
        refused(run("profile", "--engine", "vllm", "--concurrency", value), "is not a number of requests in flight")
    refused(run("profile", "--engine", "vllm", "--requests", "0"), "--requests")


def test_fewer_requests_than_are_to_be_in_flight(fake: type[FakeEngine]) -> None:
    arguments = ("profile", "--engine", "vllm", "--concurrency", "1,4", "--requests")
    refused(run(*arguments, 3), "never has 4 requests in flight", "--requests 8 or more")
    assert run(*arguments, 4, "--rounds", 1).exit_code == 0


@pytest.mark.parametrize("method", ["fastv", "resize", "none", "sparsevlm:v2", "pyramiddrop", "hiprune"])
def test_methods_that_no_engine_runs_are_refused_before_it_starts(fake: type[FakeEngine], method: str) -> None:
    fake.seen = []
    refused(run("compare", "--engine", "vllm", "--methods", method, "--budget", 64), method)
    assert fake.seen == []


def test_a_part_of_a_trained_model_is_refused(fake: type[FakeEngine]) -> None:
    refused(run("profile", "--engine", "vllm", "--layers", 2), "without --layers", "--weights random")


def test_exports_that_an_engine_has_not(fake: type[FakeEngine]) -> None:
    refused(run("profile", "--engine", "vllm", "--export", "page.html"), "page.html", ".json")


def test_an_image_and_data_exclude_each_other(fake: type[FakeEngine]) -> None:
    refused(run("profile", EXAMPLE, "q", "--engine", "vllm", "--data", "demo"), "an image and --data")


def test_the_engine_is_a_setting_of_three_commands() -> None:
    for kind in (InferSettings, ProfileSettings, CompareSettings):
        assert option_name(kind, "engine") == "--engine" and kind().engine == "transformers"


# What an engine is sent


def test_an_engine_gets_the_prompt_and_the_parameters_of_the_model_without_one(fake: type[FakeEngine]) -> None:
    found = parsed(
        run("infer", EXAMPLE, "Is it red?", "--engine", "vllm", "--budget", 16, "--set", "mmtok.alpha=0.25", "--json")
    )
    (_, request) = fake.seen  # the first is the warm-up
    model = outline("demo", device="cpu", attention="sdpa")
    whole = model.tokenize(["Is it red?"], [list(request.images)], [None])["input_ids"][0].tolist()
    first, image = whole.index(model.image_token_id), model.image_token_id
    assert request.prompt == (*whole[: first + 1], *whole[first + 576 :]) and whole.count(image) == 576
    sent = dict(request.reduction)
    assert "mmtok.alpha=0.25" in sent.pop("set")
    assert sent == {
        "method": "mmtok",
        "budget": "16",
        "question": "Is it red?",
        "track": "released",
        "image_ids": ["example.png"],
        "image_aspect_ratio": "pad",
    }
    assert found["answer"] == "yes" and found["tokens"] == {
        "total": 576,
        "kept": 16,
        "text": len(whole) - 576,
        "new": 2,
    }
    assert found["schema"] == "mmtok.engine-infer/1" and found["parameters"]["alpha"] == 0.25


def test_parameters_of_a_method_survive_as_settings() -> None:
    """What is sent as `set` makes the same method there."""
    for name in method_names():
        method = configured_method(name, "llava-1.5-7b", seed=3)
        assert configured_method(name, "demo", read_settings(settings_of(name, method), [name]).get(name)) == method, (
            name
        )


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-3b"])
def test_a_model_without_weights_is_stored_for_an_engine(name: str, tmp_path: Path) -> None:
    """Prompts have the same tokens there, and images as many placeholders."""
    model = outline(name, device="cpu", attention="sdpa")
    texts = [model.chat(f"What is the number {number} in the image, please?", 1) for number in range(30)]
    expected = [model.tokenizer(text)["input_ids"] for text in texts]
    save_without_weights(model, tmp_path / "model", texts, layers=2)
    again = outline(str(tmp_path / "model"), device="cpu", attention="sdpa")
    assert [again.tokenizer(text)["input_ids"] for text in texts] == expected
    assert again.layer_count == 2 and again.image_token_id == model.image_token_id
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == [type(model.model).__name__]


# What is made of its answers


def profile_of(*arguments: object) -> dict[str, Any]:
    command = ("profile", "--engine", "vllm", "--methods", "mmtok,random", "--rounds", 6, "--json")
    return parsed(run(*command, *arguments))


def test_a_profile_runs_all_cases_in_each_round_on_the_same_samples(fake: type[FakeEngine]) -> None:
    found = from_json(EngineProfile, json.dumps(profile_of("--concurrency", "1,4", "--requests", 5)))
    warmup, measured = fake.order[:6], fake.order[6:]
    assert {number for _, _, number in warmup} == {None} and len(set(warmup)) == 6
    rounds = [measured[place : place + 6] for place in range(0, 36, 6)]
    assert len(measured) == 36 and all(len(set(each)) == 6 for each in rounds)
    assert [{number for *_, number in each} for each in rounds] == [{number} for number in range(6)]
    assert len({tuple(turn[:2] for turn in each) for each in rounds}) > 1  # in random order
    for run_ in found.runs:
        same = [each for each in found.runs if (each.round, each.concurrency) == (run_.round, run_.concurrency)]
        assert len(same) == 3
        assert len({tuple(request.sample for request in each.requests) for each in same}) == 1
    assert found.schedule.requests == {"1": 5, "4": 5} and found.schedule.rounds == 6 and not found.interrupted
    assert [(r.concurrency, str(r), r.requests) for r in found.cases[:2]] == [(1, "full", 30), (1, "mmtok @ 64", 30)]
    mmtok = found.cases[1]
    assert mmtok.busy_seconds == pytest.approx(
        {"encode": 0.4, "select": 0.1, "prefill": 0.064, "decode": 0.0, "idle": 0.02}
    )
    assert mmtok.speedup["throughput"].median == pytest.approx((5 * 0.976 + 0.1) / (5 * 0.564 + 0.1))
    assert mmtok.speedup["ttft"].median == pytest.approx(0.586 / 0.074)


def test_a_profile_says_where_the_time_goes(fake: type[FakeEngine]) -> None:
    found = run(
        "profile", "--engine", "vllm", "--methods", "mmtok", "--rounds", 6, "--concurrency", 4, "--budget", "64"
    )
    assert found.exit_code == 0, found.output
    notes = " ".join(found.stderr.split())
    # 0.4 of 0.976 seconds; 0.512 seconds less in prefill and 0.1 more in select.
    assert "the encoder takes 41.0 % of the time" in notes and "answer 2.44 times as many" in notes
    assert "512 ms less in prefill and 100 ms more in select than with the unreduced model" in notes
    assert "p99 of 48 requests" in notes


def test_a_lower_throughput_is_explained(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection that takes longer than what it saves."""
    serve = fake.run

    def slow(self: FakeEngine, requests: Any, concurrency: int, *, case: int = 0, number: int | None = None) -> LoadRun:
        measured = serve(self, requests, concurrency, case=case, number=number)
        if not case:
            return measured
        extra = 0.9 * len(requests)
        busy = measured.busy | {"select": measured.busy["select"] + extra}
        return measured.model_copy(update={"seconds": measured.seconds + extra, "busy": busy})

    monkeypatch.setattr(fake, "run", slow)
    found = run("profile", "--engine", "vllm", "--methods", "mmtok", "--rounds", 6, "--concurrency", "1,4")
    notes = " ".join(found.stderr.split())
    assert "mmtok @ 64, 1 in flight: lower throughput: per request" in notes
    assert "512 ms less in prefill and 1 s more in select" in notes


def test_a_later_first_token_is_explained(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger batches of images, and a slower front end."""
    serve = fake.run

    def late(self: FakeEngine, requests: Any, concurrency: int, *, case: int = 0, number: int | None = None) -> LoadRun:
        measured = serve(self, requests, concurrency, case=case, number=number)
        if case:
            slower = {"preprocess": 0.71, "ttft": 0.774, "total": 0.794}
            served = [r.model_copy(update={"seconds": r.seconds | slower}) for r in measured.requests]
            return measured.model_copy(update={"requests": served})
        return measured.model_copy(update={"encodings": 2})

    monkeypatch.setattr(fake, "run", late)
    found = run("profile", "--engine", "vllm", "--methods", "mmtok", "--rounds", 6, "--concurrency", 4)
    notes = " ".join(found.stderr.split())
    assert "mmtok @ 64, 4 in flight: later first tokens: preprocess 710 ms in place of 10 ms; 8 images are" in notes
    assert "encoded at once in place of 4, since more of the shorter prompts fit" in notes


@pytest.mark.parametrize(
    ("error", "status", "failure"),
    [(KeyboardInterrupt(), 130, None), (MMTokError("the engine stopped", "see its log"), 1, "the engine stopped")],
    ids=["interrupted", "failed"],
)
def test_a_profile_that_ends_early_keeps_its_rounds(
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    failure: str | None,
) -> None:
    serve = fake.run

    def ended(self: FakeEngine, requests: Any, concurrency: int, *, case: int = 0, number: int | None = None) -> Any:
        if number == 3 and case == 1:
            raise error
        return serve(self, requests, concurrency, case=case, number=number)

    monkeypatch.setattr(fake, "run", ended)
    result = run("profile", "--engine", "vllm", "--methods", "mmtok", "--concurrency", 1, "--json")
    assert result.exit_code == status
    found = json.loads(result.stdout)
    assert (found["interrupted"], found["failure"]) == (status == 130, failure)
    assert found["schedule"]["rounds"] == 3 and found["schedule"]["planned_rounds"] == 8
    assert found["cases"][1]["requests"] == 3 * 8
    shown = run("profile", "--engine", "vllm", "--methods", "mmtok", "--concurrency", 1).output
    assert "3 of 8 rounds were measured" in shown and ("the engine stopped" in shown) == bool(failure)


def test_a_profile_is_exported(fake: type[FakeEngine], tmp_path: Path) -> None:
    files = [tmp_path / f"load.{kind}" for kind in ("json", "csv", "md")]
    exports = [word for file in files for word in ("--export", file)]
    printed = profile_of("--concurrency", "1,4", "--budget", "64", *exports)
    assert json.loads(files[0].read_text()) == printed
    rows = list(csv.DictReader(files[1].open()))
    assert [(row["method"], row["budget"], row["concurrency"]) for row in rows[:2]] == [
        ("full", "", "1"),
        ("mmtok", "64", "1"),
    ]
    assert float(rows[1]["speedup_throughput_median"]) == printed["cases"][1]["speedup"]["throughput"]["median"]
    assert float(rows[1]["engine_select_s"]) == pytest.approx(0.1)
    text = files[2].read_text()
    assert "| in flight |" in text and "mmtok @ 64" in text


def test_requests_have_the_length_that_was_asked_for(fake: type[FakeEngine]) -> None:
    found = profile_of("--concurrency", "1", "--prompt-tokens", "40", "--new-tokens", "7", "--image-size", "50x30")
    assert all(len(each.prompt) == 41 and each.max_new_tokens == 7 and each.exact for each in fake.seen)
    assert {image.size for each in fake.seen for image in each.images} == {(50, 30)}
    assert found["schedule"]["exact"] and found["schedule"]["prompt_tokens"] == 40


def test_the_sizes_of_images_of_a_dataset_are_not_stated(fake: type[FakeEngine], tmp_path: Path) -> None:
    lines = []
    for number, size in enumerate([(30, 20), (20, 30)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "Is it red?"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = ("--concurrency", "1", "--data", tmp_path / "data.jsonl")
    assert profile_of(*arguments)["schedule"]["image_size"] is None
    assert profile_of(*arguments, "--image-size", "40x40")["schedule"]["image_size"] == [40, 40]


def test_no_sample_can_be_answered(fake: type[FakeEngine], tmp_path: Path) -> None:
    (tmp_path / "0.png").write_text("no image")
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "0.png", "question": "Is it red?", "answer": "yes"}))
    arguments = ("compare", "--engine", "vllm", "--methods", "mmtok", "--budget", 16, "--data", tmp_path / "data.jsonl")
    refused(run(*arguments), "no sample could be answered: sample 1: ", "0.png is not an image")


def test_quality_through_an_engine(fake: type[FakeEngine], tmp_path: Path) -> None:
    """The same samples and metrics as without an engine. One sample is refused, and left out of every case."""
    file = tmp_path / "answers.jsonl"
    found = parsed(
        run(
            "compare",
            "--engine",
            "vllm",
            "--methods",
            "mmtok,random",
            "--budget",
            16,
            "--limit",
            40,
            "--json",
            "--export",
            file,
        )
    )
    full, mmtok, random_ = found["cases"]
    assert found["samples"] == 39 and "sample 6" in found["left_out"][0] and "too large" in found["left_out"][0]
    references = [row["references"][0] for row in found["predictions"] if row["method"] == "full"]
    assert full["score"] == pytest.approx(references.count("yes") / 39) and full["retention"] is None
    assert mmtok["retention"] == 1 and mmtok["same"] == 1 and random_["same"] == 0
    assert random_["flips"]["right_wrong"] == references.count("yes") > 0
    assert (mmtok["kept"], mmtok["vision"]) == (16, 576)
    assert {row["kl"] for row in found["predictions"]} == {None}
    assert any("KL" in line for line in found["absent"])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == found["predictions"] and len(lines) == 3 * 39


def test_methods_of_a_comparison_that_names_none(fake: type[FakeEngine]) -> None:
    found = parsed(run("compare", "--engine", "vllm", "--budget", 16, "--limit", 3, "--json"))
    assert [case["case"]["method"] for case in found["cases"]] == ["full", "mmtok", "random", "uniform"]


# Budgets elsewhere


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"set": []}),
        ({"method": "full"}, {"method": "full", "budget": 16, "set": []}),
        ({"method": "mmtok"}, {"method": "mmtok", "budget": 16, "set": ["mmtok.alpha=0.5"]}),
        ({"method": "random", "budget": 8}, {"method": "random", "budget": 8, "set": []}),
        ({"budget": 8}, {"budget": 8, "set": []}),
        ({"set": ["random.x=1"]}, {"set": ["random.x=1"]}),
    ],
)
def test_defaults_of_a_server_that_have_no_effect(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    assert combined({"budget": 16, "set": ["mmtok.alpha=0.5"]}, asked) == expected


def test_messages_about_parameters_name_the_key_of_a_request() -> None:
    for text in ("mmtok.alpha=0.5", "alpha"):
        with pytest.raises(MMTokError, match=r"^set ") as caught:
            resolved({"method": "random", "budget": 8, "set": [text]}, "demo", "llava", 1)
        assert "--set" not in caught.value.hint


def test_unknown_methods_in_the_defaults_of_a_server_are_not_hidden() -> None:
    assert combined({"set": "mmtk.alpha=1"}, {})["set"] == ["mmtk.alpha=1"]


@pytest.mark.parametrize(
    ("budget", "rate", "ratio"),
    [("20%", 0.8, 80), ("10%", 0.9, 90), ("100%", 0, 0), ("33.3%", 0.667, 66.7), ("0.1%", 0.999, 99.9)],
)
def test_equivalents_of_shares(budget: str, rate: float, ratio: float) -> None:
    assert Budget.parse(budget).engine_settings == {"vllm.video_pruning_rate": rate, "openvino.pruning_ratio": ratio}


def test_a_number_of_tokens_has_no_equivalent() -> None:
    assert Budget.parse("64").engine_settings == {}


def test_equivalents_are_shown_with_and_without_an_engine(fake: type[FakeEngine]) -> None:
    words = "a budget of 20% corresponds to video_pruning_rate 0.8 of vLLM and pruning_ratio 80 of OpenVINO"
    found = run("infer", EXAMPLE, "Is it red?", "--budget", "20%")
    assert words in " ".join(found.stdout.split())
    found = run("compare", "--methods", "random", "--budget", "20%,64", "--limit", 2, "--no-quality", "--rounds", 1)
    assert words in " ".join(found.stderr.split()) and "budget of 64" not in found.stderr


# An engine that fails


def test_the_reason_is_read_from_the_log() -> None:
    log = """
(EngineCore pid=1) INFO 11-26 [core.py:1] Initializing
(Worker pid=2) ERROR 11-26 [multiproc_executor.py:953]   File "x.py", line 3, in load
(Worker pid=2) ERROR 11-26 [multiproc_executor.py:953] ValueError: To serve at least one request, 4 GiB are needed
(EngineCore pid=1) ERROR 11-26 [core.py:1510] Exception: Worker failed with error 'See root cause above'
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
    assert reason(log) == "To serve at least one request, 4 GiB are needed"
    assert reason("nothing of the kind") is None
