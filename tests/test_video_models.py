"""Videos through the families that see them, on tiny models."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tiny_models import FAMILIES, PATCH

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.shared import SharedBatch
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.catalogue import method_class, method_names
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer, reduce
from mmtok_cli.report.tables import short_text
from mmtok_cli.rules import Rules, Track
from mmtok_cli.video import Video

SEEING = ("llava_onevision", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe")
SIDE = 2 * PATCH  # pixels of a vision token


def film(frames: int = 5, size: tuple[int, int] = (5 * SIDE, 3 * SIDE), step: int = 3) -> Video:
    """A square that moves over a plain background."""
    images = []
    for number in range(frames):
        image = Image.new("RGB", size, (90, 120, 150))
        left = step * number
        ImageDraw.Draw(image).rectangle((left, 4, left + 9, 13), fill=(250, 60, 20))
        images.append(image)
    return Video.of(tuple(images), tuple(0.5 * number for number in range(frames)), 2.0)


def about(*images: Video | Image.Image, question: str = "What color is the star?") -> Sample:
    return Sample(images, question, tuple(f"video-{number}" for number in range(len(images))))


@pytest.fixture(params=SEEING)
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    found = FAMILIES[request.param]("sdpa")
    found.fixed_tokens = 15  # frames of their own size, which processors would enlarge
    return found


def of_slice(model: VisionLanguageModel, video: Video) -> int:
    """Vision tokens of each slice in time."""
    return model.total(video) // model.slices(video)


def kept_of_slices(model: VisionLanguageModel, video: Video, kept: torch.Tensor) -> list[int]:
    return torch.bincount(kept // of_slice(model, video), minlength=model.slices(video)).tolist()


def stock(model: VisionLanguageModel, sample: Sample) -> dict[str, Any]:
    """What transformers' own forward takes, pixels and all."""
    prompt = model.prepare([sample.question], [sample.images], [sample.image_ids], [None] * len(sample.images))
    videos = [i for i, image in enumerate(sample.images) if isinstance(image, Video)]
    if model.family == "llava_onevision":
        found = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
        for i in {*range(len(sample.images))} - {*videos}:
            size = torch.tensor([sample.images[i].size[::-1]])
            found |= {"pixel_values": prompt.pixel_values[i], "image_sizes": size}
        return found | {"pixel_values_videos": torch.stack([prompt.pixel_values[i] for i in videos])}
    image_token, video_token = model.placeholder_ids
    kinds = (prompt.input_ids == image_token).int() + 2 * (prompt.input_ids == video_token).int()
    inputs: dict[str, Any] = {
        "input_ids": prompt.input_ids,
        "attention_mask": prompt.attention_mask,
        "mm_token_type_ids": kinds,
    }
    for name, suffix, wanted in (("image", "", False), ("video", "_videos", True)):
        mine = [i for i in range(len(sample.images)) if (i in videos) == wanted]
        if mine:
            inputs[f"pixel_values{suffix}"] = torch.cat([prompt.pixel_values[i] for i in mine])
            grids = [(max(1, model.slices(sample.images[i])), *model.whole_grid(sample.images[i])) for i in mine]
            inputs[f"{name}_grid_thw"] = torch.tensor([[t, rows // t * 2, columns * 2] for t, rows, columns in grids])
    seconds = [2 / image.frames.fps for image in sample.images if isinstance(image, Video)]
    if model.family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


@pytest.mark.parametrize(
    "sample",
    [
        about(film()),
        about(film(1)),
        about(film(4), film(3, (2 * SIDE, 6 * SIDE)), question="<image> What color is the star? <image>"),
        about(Image.new("RGB", (4 * SIDE, 3 * SIDE), "green"), film(2)),
    ],
    ids=["odd", "one frame", "two videos", "image and video"],
)
def test_all_tokens_give_the_logits_of_transformers(model: VisionLanguageModel, sample: Sample) -> None:
    """Bit for bit, for a prompt of one kind; images and videos together are encoded in one pass here, in two there."""
    if model.family == "llava_onevision":  # whose videos must have equally many frames in transformers alone
        alike = [
            image.part([0, 1, 2]) if isinstance(image, Video) and len(image) > 3 else image for image in sample.images
        ]
        sample = replace(sample, images=tuple(alike))
    inputs = stock(model, sample)
    with torch.inference_mode():
        expected = model.model(**inputs, logits_to_keep=1).logits[:, -1]
        said = model.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    found = answer(model, method_class("full")(), [sample], None, max_new_tokens=3)
    assert found.token_ids.tolist() == said.tolist()
    if len({type(image) for image in sample.images}) == 1:
        assert torch.equal(found.first_logits, expected)
    else:
        torch.testing.assert_close(found.first_logits, expected, atol=1e-5, rtol=1e-5)


def test_frames_become_the_patches_of_the_reference(model: VisionLanguageModel) -> None:
    """The layout of transformers' video processor, which cannot be loaded without torchvision, written out."""
    video = film(3)
    pixels = model.pixels(video, None)
    if model.family == "llava_onevision":  # each frame is what an image's view of the whole is
        views = [model.processor.image_processor(f, return_tensors="pt") for f in video.frames.images]
        assert torch.equal(pixels, torch.stack([each["pixel_values"][0, 0] for each in views]))
        return
    frames = [model.processor.image_processor(f, do_resize=False, return_tensors="pt") for f in video.frames.images]
    whole = torch.stack([_picture(each["pixel_values"], 3, 5) for each in frames])  # [frames, 3, height, width]
    whole = torch.cat([whole, whole[-1:]])
    patches = whole.view(2, 2, 3, 3, 2, PATCH, 5, 2, PATCH)  # time, pace, channel, rows, merge, patch, columns, ...
    expected = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(2 * 3 * 5 * 4, -1)
    assert torch.equal(pixels, expected)


def _picture(patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[3, height, width] of an image from its patches, of which time is a repetition."""
    cells = patches.view(rows, columns, 2, 2, 3, 2, PATCH, PATCH)[:, :, :, :, :, 0]
    return cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * SIDE, columns * SIDE)


def test_each_slice_keeps_its_times_and_places(model: VisionLanguageModel) -> None:
    """What is kept of a slice stands in the slice's part of the prompt, with the positions of the whole."""
    sample, method, rules = about(film(5)), method_class("random")(), Rules(positions="keep")
    whole = reduce(model, method_class("full")(), [sample], None, rules=rules)
    some = reduce(model, method, [sample], Budget(count=11), rules=rules)
    kept = some.selections[0].indices
    slices = len(sample.images[0]) if model.family == "llava_onevision" else 3
    assert some.vision[0].slices == slices and kept.tolist() == sorted(kept.tolist())
    marks = torch.tensor(model.placeholder_ids)
    before, after = (torch.isin(r.inputs["input_ids"][0], marks).nonzero().squeeze(1) for r in (whole, some))
    if model.family == "llava_onevision":  # the row behind the video stays
        kept = torch.cat([kept, torch.tensor([len(before) - 1])])
    assert len(after) == len(kept)
    positions = [r.inputs["position_ids"].view(-1, r.inputs["input_ids"].shape[1]) for r in (whole, some)]
    assert torch.equal(positions[1][-3:, after], positions[0][-3:, before[kept]])
    text = [[i for i in r.inputs["input_ids"][0].tolist() if i not in model.placeholder_ids] for r in (whole, some)]
    assert text[0] == text[1]
    if model.family == "qwen3_vl":  # the tokens between two times are those of the slice between them
        start = model.tokenizer.convert_tokens_to_ids("<|vision_start|>")
        runs = some.inputs["input_ids"][0].tolist()
        counts = [0, 0, 0]
        place = -1
        for token in runs:
            place += token == start
            if token in model.placeholder_ids:
                counts[place] += 1
        assert counts == kept_of_slices(model, sample.images[0], kept)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(230, 130), (90, 200)])
def test_patches_of_frames_land_where_they_were_seen(model: VisionLanguageModel, size: tuple[int, int]) -> None:
    """As in tests/test_pipeline.py for images: the boxes of frames of any shape, of their own size and made smaller."""
    model.fixed_tokens = 40
    for name, parameter in model.model.named_parameters():
        if re.search(r"(out_proj|attn\.proj)\.(weight|bias)$", name):
            parameter.zero_()
    dark = Image.new("RGB", size)
    slices = model.slices(film(4))

    def seen(images: list[Image.Image], grid: tuple[int, int] | None) -> torch.Tensor:
        video = Video.of(tuple(images), (0.0, 1.0, 2.0, 3.0), 1.0)
        return model.encode(model.prepare(["Is there a star?"], [[video]], [["x"]], [grid]))[0].features

    for grid in (None, (2 * slices, 2)):
        baseline = seen([dark] * 4, grid)
        for panel in model.panels(Video.of((dark,) * 4, (0.0, 1.0, 2.0, 3.0), 1.0), grid):
            for token, box in [*zip(panel.tokens, panel.boxes, strict=True)][:: max(1, len(panel.tokens) // 5)]:
                images = [dark.copy() for _ in range(4)]
                images[panel.frame].paste((255, 255, 255), tuple(map(round, box)))  # type: ignore[arg-type]
                assert int((seen(images, grid) - baseline).norm(dim=-1).argmax()) == token, panel.title


def video_methods() -> list[str]:
    """Every method that takes a budget, one name each."""
    return [name for name in method_names() if method_class(name).takes_budget and name != "mmtok:loop"]


def usable(model: VisionLanguageModel, name: str) -> Method | None:
    """The method with its defaults; None where the model cannot offer what it reads, or has too few layers."""
    kind = method_class(name)
    if not set(kind.signals_among(model.signals)) <= set(model.signals):
        return None
    method = kind()
    if kind.cuts is not Method.cuts:
        try:
            reduce(model, method, [about(film())], Budget(percent=40))
        except MMTokError:
            return None
    return method


@pytest.mark.parametrize("name", video_methods())
def test_methods_reduce_videos_exactly_and_alike_in_batches(model: VisionLanguageModel, name: str) -> None:
    method = usable(model, name)
    if method is None:
        pytest.skip("needs what the tiny model does not offer")
    samples = [about(film()), about(film(4, step=5), question="What shape is it?")]
    together = answer(model, method, samples, Budget(percent=40), max_new_tokens=2)
    for number, sample in enumerate(samples):
        alone = answer(model, method, [sample], Budget(percent=40), max_new_tokens=2)
        assert alone.reduced.tokens[0] == together.reduced.tokens[number]
        assert torch.equal(alone.selections[0].indices, together.selections[number].indices)
        torch.testing.assert_close(alone.first_logits[0], together.first_logits[number], atol=2e-5, rtol=2e-5)
        tokens = alone.reduced.tokens[0]
        assert tokens.kept < tokens.total and (
            tokens.kept <= round(0.4 * tokens.total) or name in ("evs", "uniform:frames")
        )


def test_evs_keeps_the_first_slice_and_what_moves(model: VisionLanguageModel) -> None:
    video = film(8, step=4)
    kept = reduce(model, method_class("evs")(), [about(video)], Budget(percent=40)).selections[0].indices
    first = of_slice(model, video)
    assert kept[:first].tolist() == list(range(first)) and len(kept) == int(0.4 * model.total(video))


@pytest.mark.parametrize("name", ["evs", "vidcom2"])
def test_methods_of_videos_refuse_images(model: VisionLanguageModel, name: str) -> None:
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), "red")
    with pytest.raises(MMTokError, match="is for the frames of a video"):
        reduce(model, method_class(name)(), [about(image)], Budget(count=4))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SEEING)))
def test_families_of_images_refuse_videos(family: str) -> None:
    model = FAMILIES[family]("sdpa")
    with pytest.raises(MMTokError, match="sees images only"):
        reduce(model, method_class("mmtok")(), [about(film())], Budget(count=4))


def test_resize_and_scale_make_all_frames_smaller(model: VisionLanguageModel) -> None:
    sample = about(film(6))
    slices = model.slices(sample.images[0])
    smaller = reduce(model, method_class("resize")(), [sample], Budget(count=20))
    assert 0.85 * (20 // slices) * slices <= smaller.tokens[0].kept <= 20 and smaller.tokens[0].kept % slices == 0
    half = reduce(model, method_class("mmtok")(), [sample], Budget(count=9), image_scale=0.5)
    assert half.tokens[0].encoded == (slices * 2 * 2,) and half.tokens[0].kept == 9
    auto = reduce(model, method_class("full")(), [sample], None, image_scale="auto")
    assert sum(auto.tokens[0].encoded or (slices,)) % slices == 0
    least = reduce(model, method_class("resize")(), [sample], Budget(count=1))
    assert least.tokens[0].kept == slices and least.tokens[0].short
    assert "a video cannot be made smaller" in short_text(least.tokens[0])  # more tokens than the budget


def test_the_first_slice_of_evs_is_that_of_the_smaller_video(model: VisionLanguageModel) -> None:
    total, encoded = model.total(film(6)), 4 * model.slices(film(6))
    reduced = reduce(model, method_class("evs")(), [about(film(6))], Budget(percent=5), image_scale=0.5)
    assert reduced.tokens[0].encoded == (encoded,) and reduced.tokens[0].kept == 4
    more = reduce(model, method_class("evs")(), [about(film(6))], Budget(percent=20), image_scale=0.5)
    assert more.tokens[0].kept == int(0.2 * total) and not more.tokens[0].short
    most = reduce(model, method_class("evs")(), [about(film(6))], Budget(percent=50), image_scale=0.5)
    assert most.tokens[0].kept == encoded and most.tokens[0].short


def test_fewer_frames_are_evenly_spaced_and_whole(model: VisionLanguageModel) -> None:
    sample = about(film(12))
    reduced = reduce(model, method_class("uniform:frames")(), [sample], Budget(percent=50))
    seen = reduced.prompt.images[0]
    total = model.total(sample.images[0])
    assert isinstance(seen, Video) and reduced.tokens[0].kept == total // 2 and reduced.tokens[0].total == total
    by_frame = model.family == "llava_onevision"
    chosen = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5) if by_frame else (1.0, 1.5, 3.0, 3.5, 5.0, 5.5)  # slices of two frames
    assert seen.frames.times == chosen and seen.frames.fps == 1.0
    logits = answer(model, method_class("full")(), [about(seen)], None, max_new_tokens=1).first_logits
    assert torch.equal(
        answer(model, method_class("uniform:frames")(), [sample], Budget(percent=50)).first_logits, logits
    )
    short = reduce(model, method_class("uniform:frames")(), [sample], Budget(count=3))
    assert short.tokens[0].kept == of_slice(model, sample.images[0]) and short.tokens[0].short


def test_harmonised_track(model: VisionLanguageModel) -> None:
    for name in ("mmtok", "evs", "vidcom2", "uniform"):
        reduced = reduce(
            model, method_class(name)(), [about(film())], Budget(count=17), rules=Rules(track="harmonised")
        )
        assert reduced.tokens[0].kept == 17


@pytest.mark.parametrize("track", ["released", "harmonised"])
@pytest.mark.parametrize("name", ["mmtok", "mmtok:stack", "visionzip", "divprune", "random", "uniform", "hiprune"])
def test_a_budget_per_frame_is_spread_evenly(model: VisionLanguageModel, name: str, track: Track) -> None:
    rules = Rules(track=track, budget_per="frame")
    slices = model.slices(film(6))
    reduced = reduce(model, method_class(name)(), [about(film(6))], Budget(count=5 * slices - 1), rules=rules)
    kept = kept_of_slices(model, film(6), reduced.selections[0].indices)
    assert kept == [5] * (slices - 1) + [4]
    whole = answer(model, method_class(name)(), [about(film(6))], Budget(percent=100), rules=rules, max_new_tokens=1)
    full = answer(model, method_class("full")(), [about(film(6))], None, max_new_tokens=1)
    assert torch.equal(whole.first_logits, full.first_logits)


@pytest.mark.parametrize("name", ["evs", "vidcom2", "fastv"])
def test_methods_that_need_all_frames_refuse_a_budget_per_frame(name: str) -> None:
    model, rules = FAMILIES["qwen2_5_vl"]("sdpa"), Rules(budget_per="frame")
    with pytest.raises(MMTokError, match="cannot reduce each frame by itself"):
        reduce(model, method_class(name)(), [about(film())], Budget(count=20), rules=rules)


def test_methods_inside_the_language_model_refuse_times_between_frames() -> None:
    model = FAMILIES["qwen3_vl"]("sdpa")
    with pytest.raises(MMTokError, match="has text between the frames"):
        reduce(model, method_class("fastv")(layer=2), [about(film())], Budget(count=20))


def test_cases_share_only_encodings_that_are_alike(model: VisionLanguageModel) -> None:
    """Fewer frames, or smaller ones, are encoded anew; each case answers as it does alone."""
    samples = [about(film(8))]
    shared = SharedBatch(model, samples)
    for name, budget in (("full", None), ("mmtok", 50.0), ("uniform:frames", 50.0), ("resize", 50.0), ("evs", 50.0)):
        case = Case(name, make_method(name), Budget(percent=budget) if budget else None)
        alone = answer(model, case.method, samples, case.budget, max_new_tokens=2)
        together = shared.answer(case, 2)
        assert together.token_ids.equal(alone.token_ids)
        assert together.first_logits.equal(alone.first_logits)
        assert together.reduced.tokens[0].kept == alone.reduced.tokens[0].kept
