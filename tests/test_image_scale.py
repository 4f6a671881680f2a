"""Smaller images before any method, the sizes that images choose themselves, and resolution as a setting."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_helpers import QUESTION, refused, run, run_json
from conftest import picture
from tiny_models import FAMILIES

from mmtok_cli import api
from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.configuration import cases_of
from mmtok_cli.conversation import Conversation
from mmtok_cli.data.samples import Sample, Turn
from mmtok_cli.drafts import Draft
from mmtok_cli.engines import require_options
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.shared import SharedBatch
from mmtok_cli.image_plan import plan_images
from mmtok_cli.image_scale import encoded_grids
from mmtok_cli.methods import make_method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer, check_budget, reduce
from mmtok_cli.planning import require_same_environment
from mmtok_cli.results.records import digest, planned_case
from mmtok_cli.results.schema import CaseId, Environment
from mmtok_cli.rules import AUTO, ImageScale, Rules
from mmtok_cli.settings import CompareSettings
from mmtok_cli.stages import unwatched
from mmtok_cli.timing.runner import run_case
from mmtok_cli.timing.turns import run_conversation

SCALES: tuple[ImageScale, ...] = (0.5, AUTO)
COMPARE = ("compare", "--limit", 2, "--rounds", 1, "--warmup", 0, "--max-new-tokens", 2, "-b", 8)
FIRST_BLOCK = re.compile(r"(vision_tower\.encoder\.layers?|visual\.blocks)\.0$")


@pytest.mark.parametrize("scale", SCALES)
def test_a_method_sees_what_it_would_see_of_the_smaller_image(
    vlm: VisionLanguageModel, samples: list[Sample], scale: ImageScale
) -> None:
    images = [image for sample in samples for image in sample.images]
    grids = [
        grid or vlm.whole_grid(image) for grid, image in zip(encoded_grids(vlm, images, scale), images, strict=True)
    ]
    # On the harmonised track a count is that of every image, and the grids have no padding and no crops.
    rules = Rules("harmonised")
    for name in ("mmtok", "random"):
        method = make_method(name)
        found = reduce(vlm, method, samples, Budget(count=3), rules=rules, image_scale=scale)
        by_hand = reduce(vlm, method, samples, Budget(count=3), rules=rules, grids=grids)
        for image, one, other in zip(images, found.images, by_hand.images, strict=True):
            assert one.plan.total == vlm.total(image)
            if one.plan.grid:
                assert one.plan.encoded == one.vision.total == other.vision.total < vlm.total(image)
                assert torch.equal(one.vision.projected, other.vision.projected)
                assert torch.equal(one.selection.indices, other.selection.indices)
    if scale != AUTO:
        assert all(
            (2 * grid[0] - whole[0], 2 * grid[1] - whole[1]) <= (1, 1)
            for grid, whole in zip(grids, map(vlm.whole_grid, images), strict=True)
        )


@pytest.mark.parametrize(("name", "scale"), [("full", 0.5), ("fastv", 0.5), ("mmtok", AUTO), ("visionzip", AUTO)])
def test_a_batch_is_answered_as_its_samples_alone(
    vlm: VisionLanguageModel, samples: list[Sample], name: str, scale: ImageScale
) -> None:
    method = make_method(name)
    budget = Budget(count=5) if method.takes_budget else None
    both = Sample((*samples[0].images, *samples[1].images), "Which is darker?", ("a", "b"))
    batch = [*samples, both]
    together = answer(vlm, method, batch, budget, max_new_tokens=2, image_scale=scale)
    alone = [answer(vlm, method, [sample], budget, max_new_tokens=2, image_scale=scale) for sample in batch]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.first_logits[i], one.first_logits[0], atol=2e-3, rtol=1e-3)
        assert together.reduced.tokens[i] == one.reduced.tokens[0]
    if scale != AUTO:
        counts = together.reduced.tokens[-1]
        assert len(counts.encoded) == 2 and sum(counts.encoded) < counts.total
        assert counts.kept == (sum(counts.encoded) if name == "full" else min(counts.kept, sum(counts.encoded)))


def test_the_preview_is_what_the_first_block_gives(vlm: VisionLanguageModel) -> None:
    sample = Sample((picture(84, 84, 5),), QUESTION, ("square",))
    (block,) = (module for name, module in vlm.model.named_modules() if FIRST_BLOCK.search(name))
    seen: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        prompt = vlm.prepare([sample.question], [sample.images], [sample.image_ids], [None])
        vlm.encode(prompt)
        whole, hooks = seen.pop(), dict(block._forward_hooks)
        found = vlm.first_block(sample.images[0])
        assert block._forward_hooks == hooks
    handle.remove()
    if whole.dim() == 3:  # a class token first; InternVL's whole image last
        whole = whole[-1 if vlm.family == "internvl" else 0, 1:]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_a_flat_image_becomes_smaller_than_a_detailed_one(vlm: VisionLanguageModel) -> None:
    flat, detailed = picture(7, 7).resize((112, 112)), picture(112, 112, 3)
    (small,), (large,) = (encoded_grids(vlm, [image], AUTO) for image in (flat, detailed))
    assert small is not None and small[0] * small[1] < vlm.total(flat)
    whole = large or vlm.whole_grid(detailed)
    assert small[0] * small[1] < whole[0] * whole[1]


def test_budgets_are_of_the_image_at_its_own_size(tiny_sdpa: VisionLanguageModel, samples: list[Sample]) -> None:
    square, method = samples[:1], make_method("mmtok")
    share = reduce(tiny_sdpa, method, square, Budget(percent=20), image_scale=0.5)
    assert (share.tokens[0].kept, share.tokens[0].total, share.tokens[0].encoded) == (7, 36, (9,))
    much = reduce(tiny_sdpa, method, square, Budget(count=12), image_scale=0.5)
    assert (much.tokens[0].kept, much.tokens[0].short) == (9, True)
    for scale in (0.5, AUTO):  # no run is refused for what one of its scales cannot meet
        check_budget(tiny_sdpa, method, square, Budget(count=12), image_scale=scale)
    with pytest.raises(MMTokError, match="the budget of 40 is more than the 36 vision tokens"):
        check_budget(tiny_sdpa, method, square, Budget(count=40), image_scale=0.5)
    plans = plan_images(
        tiny_sdpa,
        make_method("fastv"),
        square[0].images,
        Budget(count=6),
        Rules(budget_means="layer-average"),
        smaller=[(3, 3)],
    )
    assert plans[0].keep < 6 and not plans[0].short  # 9 tokens in the first layers
    with pytest.raises(MMTokError, match="Resize makes images smaller itself"):
        reduce(tiny_sdpa, make_method("resize"), square, Budget(count=4), image_scale=0.5)


def test_evaluation_of_many_cases_shares_what_is_encoded_alike(
    tiny_sdpa: VisionLanguageModel, samples: list[Sample]
) -> None:
    shared = SharedBatch(tiny_sdpa, samples)
    for scale in (1, *SCALES, 0.5):
        case = Case("mmtok", make_method("mmtok"), Budget(count=4), image_scale=scale)
        found, alone = shared.answer(case, 2), case.answer(tiny_sdpa, samples, 2, unwatched)
        assert torch.equal(found.first_logits, alone.first_logits)
    assert len(shared._encodings._encoded) == 3


def test_the_preview_is_a_stage_of_its_own(
    tiny_sdpa: VisionLanguageModel, samples: list[Sample], ticking: None
) -> None:
    case = Case("mmtok", make_method("mmtok"), Budget(count=4), image_scale=AUTO)
    found, plain = (run_case(tiny_sdpa, each, samples[:1], 2) for each in (case, replace(case, image_scale=0.5)))
    assert found.seconds["preview"] > 0 and "preview" not in plain.seconds
    assert found.seconds["ttft"] == pytest.approx(plain.seconds["ttft"] + found.seconds["preview"])
    talk = run_conversation(tiny_sdpa, case, "reselect", replace(samples[0], later=(Turn("And now?"),)), 2)
    assert [turn.seconds["preview"] > 0 for turn in talk] == [True, False]
    assert [turn.tokens.encoded for turn in talk] == [found.tokens[0].encoded] * 2


def test_a_conversation_and_a_draft_keep_the_size(tiny_sdpa: VisionLanguageModel, samples: list[Sample]) -> None:
    sample, method, budget = samples[1], make_method("mmtok"), Budget(count=4)
    with Conversation(tiny_sdpa, method, sample, budget, image_scale=0.5, max_new_tokens=2) as talk:
        said = talk.ask(sample.question)
    assert said.text == answer(tiny_sdpa, method, [sample], budget, max_new_tokens=2, image_scale=0.5).texts[0]
    case = Case("mmtok", method, budget, draft=Draft("self", 2), image_scale=0.5)
    assert case.drafts(tiny_sdpa, [sample]) == [said.text]


def test_cases_side_by_side() -> None:
    settings = CompareSettings.of(
        methods="full,mmtok,resize", budget="16,4", image_scale="1,0.50,auto", batch_size="1,2"
    )
    ids = [case.id for case in cases_of(settings)]
    assert [str(case) for case in ids[:9]] == [
        "full", "full, scale 0.5", "full, scale auto", "mmtok @ 16", "mmtok @ 16, scale 0.5", "mmtok @ 16, scale auto",
        "mmtok @ 4", "mmtok @ 4, scale 0.5", "mmtok @ 4, scale auto",
    ]  # fmt: skip
    assert [str(case) for case in ids[9:12]] == ["resize @ 16", "resize @ 4", "full (again)"]
    assert sum(case.is_baseline for case in ids) == 2 and len(ids) == 24
    only = CompareSettings.of(methods="mmtok", budget="4", image_scale=0.5)
    assert [str(case) for case in cases_of(only)] == ["full", "mmtok @ 4, scale 0.5"]


def test_what_cannot_be_done_is_refused(photo: Path) -> None:
    refused(run(*COMPARE, "--methods", "resize", "--image-scale", "0.5"), "Resize makes images smaller itself")
    refused(run("infer", photo, QUESTION, "--method", "resize", "--image-scale", "auto"), "has no --image-scale")
    assert "the budget is not met" in run("infer", photo, QUESTION, "-b", 64, "--image-scale", 0.2).stdout
    for scale in ("0", "1.5", "half", "50%", ""):
        refused(run(*COMPARE, f"--image-scale={scale}"), "is not a scale of images", "a factor on both sides")
    refused(run("compare", "--retain", "98%", "--image-scale", 0.5), "--retain searches at images' own size")
    refused(run("profile", "--scaling", "--image-scale", 0.5), "--scaling measures given numbers of vision tokens")
    for option in ("image_scale", "pixels"):
        with pytest.raises(MMTokError, match="does not go with --engine vllm: vLLM encodes images"):
            require_options("vllm", "compare", {option: f"--{option}"})
    refused(run("infer", photo, QUESTION, "--pixels", "fixed:2048"), "demo sees images at a fixed resolution")
    refused(run("infer", photo, QUESTION, "--pixels", "2048"), "is not a resolution", "--pixels fixed:2048")


def test_a_comparison_at_several_scales(tmp_path: Path) -> None:
    files = [tmp_path / f"result.{kind}" for kind in ("csv", "md", "html", "jsonl")]
    exports = [part for file in files for part in ("--export", file)]
    given = ("--methods", "full,mmtok", "--image-scale", "1,0.5,auto")
    found = run_json(*COMPARE, *given, *exports)
    names = ["full", "full @ 0.5", "full @ auto", "mmtok", "mmtok @ 0.5", "mmtok @ auto", "again"]
    by_name = dict(zip(names, found["results"], strict=True))
    assert by_name["full"]["case"]["image_scale"] is None and by_name["full"]["saved"] == {}
    half, auto = by_name["full @ 0.5"], by_name["mmtok @ auto"]
    assert half["tokens"]["kept"] == half["tokens"]["encoded"] == 144 and half["tokens"]["total"] == 576
    assert half["saved"].keys() == {"encode", "prefill", "ttft"} and half["fidelity"]["kl"] > 0
    assert auto["tokens"]["kept"] == 8 and 8 < auto["tokens"]["encoded"] < 576
    assert auto["seconds"]["preview"]["median"] > 0 and auto["flops"]["preview"] > 0
    assert by_name["mmtok @ 0.5"]["flops"]["encode"] < by_name["mmtok"]["flops"]["encode"] / 3
    rows = list(csv.DictReader(files[0].open()))
    assert [row["image_scale"] for row in rows] == ["", "0.5", "auto", "", "0.5", "auto", ""]
    assert rows[1]["encoded_tokens"] == "144.0" and rows[1]["encode_saved_s"]
    lines = list(map(json.loads, files[3].read_text().splitlines()))
    assert [line["image_scale"] for line in lines[:7]] == [None, 0.5, "auto", None, 0.5, "auto", None]
    assert [line["encoded"] for line in lines[:2]] == [None, [144]]
    assert "stage-preview" in files[2].read_text() and "encode saved" in files[2].read_text()
    resumed = run("compare", "--resume", "--run-dir", found["run_directory"])
    assert resumed.exit_code == 0 and "mmtok, scale auto" in resumed.stdout and "144/576" in resumed.stdout
    said = " ".join(resumed.stderr.split())
    assert "at scale 0.5, prepare and encode take" in said and "at scale auto, preview, prepare and encode" in said
    refused(run("compare", "--resume", "--run-dir", found["run_directory"], "--image-scale", "1"), "--image-scale is 1")


def test_every_command_shows_the_size(photo: Path, tmp_path: Path) -> None:
    shown = run("infer", photo, QUESTION, "-b", 8, "--image-scale", "0.5", "--baseline")
    assert shown.exit_code == 0 and "vision tokens encoded" in shown.stdout and "96/576" in shown.stdout
    found = run_json("infer", photo, QUESTION, "-b", 8, "--image-scale", "0.5", "--turn", "And?")
    assert (found["image_scale"], found["pixels"], found["turns"][1]["tokens"]["encoded"]) == (0.5, "native", [96])
    found = run_json("prune", photo, QUESTION, "-b", 8, "--image-scale", "auto")
    (entry,) = found["images"]
    assert entry["grid"][0] * entry["grid"][1] == entry["encoded"] < 576 and found["seconds"]["preview"] > 0
    command = ("profile", "--rounds", 1, "--warmup", 0, "--layers", 2, "--image-scale", "auto")
    result = run_json(*command, "-b", 8, "--trace-dir", tmp_path / "traces")
    assert [case["case"]["image_scale"] for case in result["cases"]] == [None, "auto"]
    assert {operator["stage"] for operator in result["operators"]} >= {"preview", "encode"}


def test_keys_at_the_own_size_are_those_of_older_runs() -> None:
    case = CaseId(method="mmtok", parameters={}, budget="8")
    older = {"method": "mmtok", "parameters": {}, "budget": "8", "batch_size": 1, "again": False, "run": None}
    environment = Environment.model_construct(device="cpu", layers=None, fallback=None, pixels=None)
    native, fixed = (environment.model_copy(update={"pixels": pixels}) for pixels in ("native", "fixed:64"))
    key = planned_case(case, environment, {}).key
    newer = {"command", "fallback", "pixels", "encoder_attention", "linear_layers", "linear_reference"}
    assert key == digest([older, environment.model_dump(exclude=newer), {}])
    assert planned_case(case, native, {}).key == key != planned_case(case, fixed, {}).key
    assert planned_case(case.model_copy(update={"image_scale": 0.5}), environment, {}).key != key


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_fixed_number_of_tokens(family: str, samples: list[Sample]) -> None:
    model = FAMILIES[family]("sdpa")
    before = environment_of(model)
    model.fixed_tokens = 64
    for sample in samples:
        rows, columns = model.whole_grid(sample.images[0])
        assert 48 <= rows * columns == model.total(sample.images[0]) <= 81
        assert abs(rows / columns / (sample.images[0].height / sample.images[0].width) - 1) < 0.3
    assert (before.pixels, environment_of(model).pixels) == ("native", "fixed:64")
    counts = reduce(model, make_method("mmtok"), samples, Budget(percent=25), image_scale=0.5).tokens
    assert all(sum(one.encoded) < one.total / 3 for one in counts)
    require_same_environment(before.model_copy(update={"pixels": None}), before)
    with pytest.raises(MMTokError, match="pixels native then, fixed:64 now"):
        require_same_environment(before, environment_of(model))


def test_a_scale_may_be_given_as_a_text_in_python(tiny_sdpa: VisionLanguageModel, samples: list[Sample]) -> None:
    found = [api.answer(tiny_sdpa, "mmtok", samples[0], 2, max_new_tokens=1, image_scale=s) for s in (0.5, "0.5")]  # type: ignore[arg-type]
    assert found[0].reduced.tokens == found[1].reduced.tokens and found[0].reduced.tokens[0].encoded
    with pytest.raises(MMTokError, match="'half' is not a scale"):
        api.answer(tiny_sdpa, "mmtok", samples[0], 2, image_scale="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_other_families_have_a_fixed_resolution(family: str) -> None:
    model = FAMILIES[family]("sdpa")
    assert model.resolution is None
    with pytest.raises(MMTokError, match="sees images at a fixed resolution"):
        model.require_resolution("it", 64)
