"""Prompts and answers of exact lengths, and the rates that they are for."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import refused, run, run_json
from test_matrix import INSIDE, skip_refused, tiny_method

from mmtok_cli.budget import Budget, TokenCounts
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample, demo_samples
from mmtok_cli.decoding import answer_mask
from mmtok_cli.errors import MMTokError
from mmtok_cli.lengths import of_prompt_length
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.families import family_class
from mmtok_cli.models.llava import Llava
from mmtok_cli.models.room import laid_out
from mmtok_cli.models.sources import architecture, source_of
from mmtok_cli.pipeline import answer, reduce
from mmtok_cli.profiles import known_profiles
from mmtok_cli.report.checks import outlier_notes
from mmtok_cli.results.records import TimedRun, sample_name
from mmtok_cli.results.schema import Comparison, from_json
from mmtok_cli.timing.runner import run_case
from mmtok_cli.timing.summary import summarise_case

FULL = make_method("full")
PAIR = Case("full", FULL, None, batch_size=2)
MARKED = "<image>\nIs there a red circle?"


def text_tokens(vlm: VisionLanguageModel, samples: list[Sample]) -> list[int]:
    return [tokens.text for tokens in reduce(vlm, FULL, samples, None).tokens]


@pytest.mark.parametrize("length", [60, 61, 150])
def test_prompts_have_exactly_the_length(length: int, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    """In every family, with an image of any shape, with a marker or without one."""
    for sample in (*samples[:2], replace(samples[0], question=MARKED)):
        padded = of_prompt_length(vlm, sample, length)
        assert text_tokens(vlm, [padded]) == [length]
        assert padded.question.endswith(sample.question.removeprefix("<image>\n"))
        assert sample_name(padded) == sample_name(sample)


def test_a_prompt_of_the_right_length_is_left_as_it_is(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    (length,) = text_tokens(tiny_sdpa, samples[:1])
    assert of_prompt_length(tiny_sdpa, samples[0], length) is samples[0]
    assert text_tokens(tiny_sdpa, [of_prompt_length(tiny_sdpa, samples[0], length + 1)]) == [length + 1]
    with pytest.raises(MMTokError, match=f"takes {length} text tokens .* more than --prompt-tokens {length - 1}"):
        of_prompt_length(tiny_sdpa, samples[0], length - 1)
    with pytest.raises(MMTokError, match="do not fit into the"):
        of_prompt_length(tiny_sdpa, samples[0], tiny_sdpa.context_length)


@pytest.mark.parametrize(
    "name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-3b", "qwen3-vl-4b", "qwen3.5-4b", "internvl3-2b"]
)
def test_stand_ins_for_a_vocabulary_make_exact_lengths(name: str) -> None:
    source = source_of(name)
    config = architecture(name, source)
    family, template = family_class(config.model_type), known_profiles()[name].chat_template
    assert template is not None
    vlm = family(name, laid_out(config, torch.bfloat16), family.stand_in_processor(config, template))
    sample = demo_samples(1)[0]
    padded = of_prompt_length(vlm, sample, 2000)
    length = vlm.tokenize([padded.question], [padded.images], [None])["input_ids"].shape[1]
    assert length == 2000 + vlm.total(sample.images[0])


@pytest.mark.parametrize("name", ["full", "mmtok", *INSIDE])
def test_an_ignored_end_token_ends_nothing(name: str, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    """Up to its first end token, every answer of a batch is the usual one, and behind it decoding continues as if the
    token were any other."""
    skip_refused(name, vlm)
    method = tiny_method(name)
    budget = Budget(count=8) if method.takes_budget else None
    batch = samples[:2]
    exact = answer(vlm, method, batch, budget, max_new_tokens=6, ignore_eos=True)
    assert exact.token_ids.shape == (2, 6)
    alone = [answer(vlm, method, [each], budget, max_new_tokens=6, ignore_eos=True).token_ids for each in batch]
    assert torch.equal(exact.token_ids, torch.cat(alone))
    with pytest.MonkeyPatch.context() as patch:  # now the second token of the first answer ends answers
        end = int(exact.token_ids[0, 1])
        patch.setattr(type(vlm), "eos_token_ids", property(lambda self: (end,)))
        again = answer(vlm, method, batch, budget, max_new_tokens=6, ignore_eos=True).token_ids
        usual = answer(vlm, method, batch, budget, max_new_tokens=6).token_ids
        live = answer_mask(usual, vlm.eos_token_ids)
    assert torch.equal(again, exact.token_ids)
    assert not live[0].all() or usual.shape[1] <= 2
    assert torch.equal(usual[live], exact.token_ids[:, : usual.shape[1]][live])


def test_tokens_of_an_answer_are_counted_up_to_its_end(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    exact = run_case(tiny_sdpa, PAIR, samples[:2], 5, ignore_eos=True)
    assert exact.new_tokens == [5, 5] and exact.steps == 5
    most = run_case(tiny_sdpa, PAIR, samples[:2], 5)
    assert max(most.new_tokens) == most.steps <= 5


def timed(steps: int, decode: float, new_tokens: list[int], number: int = 0) -> TimedRun:
    seconds = {"prepare": 1.0, "encode": 2.0, "select": 0.0, "prefill": 1.0, "decode": decode}
    seconds |= {"ttft": 4.0, "total": 4.0 + decode}
    count = len(new_tokens)
    return TimedRun(
        round=number,
        case=0,
        samples=[str(i) for i in range(count)],
        seconds=seconds,
        repetitions={stage: [value] for stage, value in seconds.items()},
        tokens=[TokenCounts(total=8, kept=8, text=4, layer_average=8.0)] * count,
        positions="keep",
        answers=["x"] * count,
        steps=steps,
        new_tokens=new_tokens,
        kv_cache=10,
        peak=None,
        reserved=None,
        host=1,
    )


def summary(runs: list[TimedRun], baseline: list[TimedRun] | None = None) -> Any:
    return summarise_case(PAIR.id, runs, baseline, {})


def test_rates_by_hand() -> None:
    """Five tokens in four seconds of decoding, four of them after the first; the second answer ended after three."""
    found = summary([timed(5, 4.0, [5, 3])] * 3)
    assert found.seconds["tpot"].median == 1.0
    assert found.decode_tokens_per_second == 1.0
    assert found.batch_decode_tokens_per_second == (4 + 2) / 4
    assert found.samples_per_second == 2 / 8


def test_the_speedup_of_tpot_is_paired_over_rounds_that_decoded() -> None:
    """Two rounds in which one of the two cases stopped after its first token count for neither."""
    method = [timed(1, 0.0, [1, 1]), timed(5, 2.0, [5, 5]), *[timed(3, 1.0, [3, 3])] * 7]
    baseline = [timed(5, 4.0, [5, 5]), timed(1, 0.0, [1, 1]), *[timed(5, 4.0, [5, 5])] * 7]
    found = summary(method, baseline)
    assert len(found.seconds["tpot"].values) == 8
    speedup = found.speedup["tpot"]
    assert speedup.median == 2.0 and speedup.low == pytest.approx(2.0) and speedup.conclusive
    silent = summary([timed(1, 0.0, [1, 1])] * 7, baseline[2:])
    assert "tpot" not in silent.seconds and "tpot" not in silent.speedup
    assert silent.decode_tokens_per_second is silent.batch_decode_tokens_per_second is None


def test_a_disturbed_decode_is_an_outlier_where_lengths_are_exact() -> None:
    runs = [timed(5, 4.0, [5, 5]) for _ in range(9)] + [timed(5, 400.0, [5, 5])]
    usual, exact = (summarise_case(PAIR.id, runs, None, {}, exact_length=exact) for exact in (False, True))
    assert (usual.checked, usual.outliers) == ("ttft", [])
    assert (exact.checked, exact.outliers) == ("total", [9])
    (note,) = outlier_notes([exact])
    assert "round 10 of 10 took up to 404 s in all, with a median of 8 s" in note


def test_records_of_earlier_versions_have_no_rate_of_the_batch() -> None:
    old = timed(5, 4.0, [5, 5]).model_dump(exclude={"new_tokens"})
    found = summary([TimedRun(**old)])
    assert found.decode_tokens_per_second == 1.0 and found.batch_decode_tokens_per_second is None


LENGTHS = ("--prompt-tokens", 40, "--new-tokens", 5)


def test_a_profile_has_the_lengths_in_every_format(tmp_path: Path) -> None:
    files = [tmp_path / f"profile.{kind}" for kind in ("json", "csv", "md")]
    written = [part for file in files for part in ("--export", file)]
    result = run(
        *("profile", "--methods", "fastv", "--budget", 64, "--batch-size", "1,2", "--rounds", 6, "--warmup", 0),
        *(*LENGTHS, *written),
    )
    assert result.exit_code == 0, result.output
    assert "Throughput" in result.stdout and "batch tok/s" in " ".join(result.stdout.split())
    profile = json.loads(files[0].read_text())
    assert (profile["schedule"]["prompt_tokens"], profile["schedule"]["new_tokens"]) == (40, 5)
    for case in profile["cases"]:
        assert (case["tokens"]["text"], case["tokens"]["new"]) == (40, 5)
        tpot = case["seconds"]["tpot"]
        assert tpot["values"] == pytest.approx([decode / 4 for decode in case["seconds"]["decode"]["values"]])
    (full, fastv) = (case for case in profile["cases"] if case["case"]["batch_size"] == 2)
    assert fastv["speedup"]["tpot"]["low"] is not None and "tpot" not in full["speedup"]
    assert full["batch_decode_tokens_per_second"] == pytest.approx(2 * full["decode_tokens_per_second"])
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert {row["exact_new_tokens"] for row in rows} == {"5"} and {row["prompt_tokens"] for row in rows} == {"40"}
    assert float(rows[-1]["tpot_median_s"]) == fastv["seconds"]["tpot"]["median"]
    assert float(rows[-1]["samples_per_s"]) == fastv["samples_per_second"]
    text = files[2].read_text()
    assert "| samples/s |" in text and "exactly 5 new tokens" in text and "prompts of 40 text tokens" in text


def test_evaluated_answers_do_not_depend_on_the_timed_lengths(tmp_path: Path) -> None:
    common = ("compare", "--limit", 4, "--methods", "fastv", "--budget", 64, "--rounds", 1, "--warmup", 0)
    usual = run_json(*common, "--run-dir", tmp_path / "usual")
    exact = run_json(*common, *LENGTHS, "--run-dir", tmp_path / "exact")
    for before, after in zip(usual["results"], exact["results"], strict=True):
        assert before["score"] == after["score"] and before["fidelity"] == after["fidelity"]
        assert (after["tokens"]["text"], after["tokens"]["new"]) == (40, 5) != before["tokens"]["text"]
    answers = [
        [
            p["answer"]
            for file in sorted((tmp_path / name / "predictions").iterdir())
            for p in json.loads(file.read_text())["predictions"]
        ]
        for name in ("usual", "exact")
    ]
    assert answers[0] == answers[1]
    assert exact["schedule"]["new_tokens"] == 5 and exact["schedule"]["max_new_tokens"] == 16
    merged = run("report", tmp_path / "usual", tmp_path / "exact")
    said = " ".join(merged.stderr.split())
    assert "exact number of new tokens differs: None (A), 5 (B)" in said
    assert "exact number of prompt tokens differs: None (A), 40 (B)" in said
    for pair in ("usual", "exact"), ("exact", "usual"):  # the lengths of one run are not those of both
        assert "timed with" not in run("report", *(tmp_path / name for name in pair)).stdout


def test_a_run_with_lengths_is_resumed_with_them(tmp_path: Path) -> None:
    place = tmp_path / "run"
    common = ("compare", "--limit", 2, "--methods", "random", "--budget", 16, "--warmup", 0, "--no-quality")
    first = run_json(*common, *LENGTHS, "--rounds", 2, "--run-dir", place)
    for file in (place / "rounds").glob("00001-*.json"):
        file.unlink()
    refused(run("compare", "--run-dir", place, "--resume", "--new-tokens", 6), "--new-tokens is 6 here and 5 in")
    refused(run("compare", "--run-dir", place, "--resume", "--prompt-tokens", 41), "--prompt-tokens")
    again = from_json(Comparison, json.dumps(run_json("compare", "--run-dir", place, "--resume")))
    assert [case.tokens.new for case in again.results] == [5.0, 5.0]
    assert [case.tokens.text for case in again.results] == [40.0, 40.0]
    assert again.schedule.rounds == first["schedule"]["rounds"] == 2


def test_questions_that_are_longer_already(tmp_path: Path) -> None:
    """Refused by name where they are all there is; one among others is left out of timing alone."""
    asked = ("profile", "--rounds", 1, "--warmup", 0, "--prompt-tokens", 8)
    refused(run(*asked), "text tokens with its chat template, which is more than --prompt-tokens 8")
    image = tmp_path / "image.png"
    demo_samples(1)[0].images[0].save(image)
    long = " ".join(["Is there a red circle?"] * 12)
    lines = [{"image": "image.png", "question": text} for text in (long, "Is there a red circle?", "Is there a star?")]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    common = ("compare", "--data", data, "--methods", "random", "--budget", 16, "--rounds", 1, "--warmup", 0)
    result = run(*common, "--prompt-tokens", 30, "--run-dir", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert "sample 1 is left out: the question 'Is there a red circle?" in " ".join(result.stderr.split())
    found = json.loads(result.stdout)
    assert found["schedule"]["samples"] == 3 and found["schedule"]["timed"] == 1
    refused(
        run(*common, "--prompt-tokens", 8, "--run-dir", tmp_path / "none"), "only 0 of 3 samples", "--prompt-tokens"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_numbers_that_cannot_be_followed(command: str, tmp_path: Path) -> None:
    where = ("--run-dir", tmp_path / "run") if command == "compare" else ("--trace-dir", tmp_path / "run")
    refused(run(command, *where, "--new-tokens", 4, "--max-new-tokens", 4), "contradict each other")
    for own in ("mmtok@16,random@8", "full,mmtok@16,none"):
        refused(run(command, *where, "--methods", own, "--budget", 64), "--budget has no effect", "omit --budget")
    refused(run(command, *where, "--prompt-tokens", 2000), "do not fit into the 2048 tokens")
    # The padded prompt and the new tokens count together: 576 + 1400 + 80 > 2048.
    refused(run(command, *where, "--prompt-tokens", 1400, "--new-tokens", 80), "1976 tokens and 80 new ones do not fit")
    assert not (tmp_path / "run").exists()


def test_a_bound_on_the_speedup_of_tpot(tmp_path: Path) -> None:
    common = ("compare", "--limit", 6, "--methods", "random", "--budget", 16, "--warmup", 0, "--no-quality")
    checked = ("--fail-below", 0, "--fail-below-stage", "tpot")
    result = run(*common, *LENGTHS, "--rounds", 6, *checked, "--run-dir", tmp_path / "a")
    assert result.exit_code == 0, result.output
    result = run(*common, "--new-tokens", 1, "--rounds", 6, *checked, "--run-dir", tmp_path / "b")
    assert result.exit_code == 1 and "no token was decoded after the first" in " ".join(result.stderr.split())
