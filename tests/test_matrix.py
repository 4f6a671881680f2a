"""What every method must do on every family; a new method is tested by being in the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import picture
from tiny_models import FAMILIES, stock_logits

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method, method_names
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.catalogue import method_class
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import Answers, answer
from mmtok_cli.rules import Positions, Rules, Track

BUDGET = Budget(count=8)  # a rectangle of 2x4 for those that resize
ALL = [name for name in method_names() if not method_class(name).needs_video]
TINY_LAYERS = {  # of a language model of four
    "fastv": {"layer": 1},
    "random:inside": {"layer": 2},
    "pyramiddrop": {"layers": (1, 3)},
    "sparsevlm": {"layers": (0, 1, 2)},
    "sparsevlm:v2": {"layers": (0, 1, 2)},
    "dart": {"layer": 2},
    "v2drop": {"layers": (1, 2, 3)},
    "pace": {"layer": 2},
}
FAMILY_LAYERS = {  # of other language models
    "qwen3_5": {  # of eight layers, of which the first, third and so on have linear attention
        "fastv": {"layer": 2},
        "random:inside": {"layer": 3},
        "pyramiddrop": {"layers": (3, 5)},
        "sparsevlm": {"layers": (1, 3, 5)},
        "sparsevlm:v2": {"layers": (1, 3, 5)},
        "dart": {"layer": 4},
        "v2drop": {"layers": (2, 3, 6)},
        "pace": {"layer": 4},
    }
}
MERGING = ("visionzip", "sparsevlm")  # whose merged tokens stand last


def tiny_method(name: str, family: str = "") -> Method:
    return make_method(name, **FAMILY_LAYERS.get(family, TINY_LAYERS).get(name, {}))


BUDGETED = [name for name in ALL if tiny_method(name).takes_budget]
INSIDE = [name for name in ALL if tiny_method(name).cuts(36, 8, 4)]
READ_ATTENTION = {"full", *INSIDE, *(name for name in ALL if tiny_method(name).signals)}  # and depend on its kernel
TRACKS = pytest.mark.parametrize("track", ["released", "harmonised"])


# Every family; of those marked extended, which `make test-families` runs, tests/test_families.py has a part.
EVERY_FAMILY: list[Any] = ["llava", "llava-eager", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"]
EVERY_FAMILY += [
    pytest.param(family, marks=pytest.mark.extended)
    for family in ("qwen3_5", "qwen3_5-eager", "qwen3_vl_moe", "gemma3", "llava_onevision")
]


@pytest.fixture(scope="session", params=EVERY_FAMILY)
def vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    family, _, attention = request.param.partition("-")
    return FAMILIES[family](attention or "sdpa")


REFUSED = {  # their signals come of a class token, or of CLIP
    "qwen2_5_vl": ("vispruner", "cdpruner"),
    "gemma3": ("vispruner", "cdpruner"),
    "llava_onevision": ("vispruner", "cdpruner"),
    "qwen3_5": ("vispruner", "cdpruner"),
    "qwen3_vl": ("vispruner", "cdpruner"),
    "qwen3_vl_moe": ("vispruner", "cdpruner"),
    "internvl": ("cdpruner",),
}


CROPPED = ("llava_next", "llava_onevision")


def skip_refused(name: str, vlm: VisionLanguageModel, track: Track = "released") -> None:
    if vlm.attention == "eager" and name not in READ_ATTENTION:
        pytest.skip(f"{name} reads no attention, so that it cannot depend on the kernel")
    if name in REFUSED.get(vlm.family, ()):
        pytest.skip(f"{vlm.family} cannot show {name} what it needs")
    if vlm.family == "gemma3" and name in INSIDE:
        pytest.skip("gemma3 runs nothing inside the language model: tests/test_gemma3.py")
    if name == "resize:pool" and vlm.family in CROPPED and (track == "harmonised" or vlm.family == "llava_onevision"):
        pytest.skip("eight tokens in three crops are no rectangles")


def totals(vlm: VisionLanguageModel, samples: list[Sample]) -> list[int]:
    return [vlm.total(sample.images[0]) for sample in samples]


def wanted(vlm: VisionLanguageModel, samples: list[Sample], track: Track) -> list[int]:
    return [vlm.keep(sample.images[0], BUDGET, track) for sample in samples]


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in REFUSED for name in REFUSED[family]])
def test_what_a_family_cannot_show_is_refused(family: str, name: str, samples: list[Sample]) -> None:
    with pytest.raises(MMTokError, match=f"the {family} family does not offer") as error:
        answer(FAMILIES[family]("sdpa"), tiny_method(name, family), samples[:1], BUDGET, max_new_tokens=1)
    assert "mmtok" in str(error.value.hint)


@pytest.mark.compat
@TRACKS
@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
def test_identity_at_full_budget(name: str, track: Track, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    skip_refused(name, vlm)
    for sample, total in zip(samples, totals(vlm, samples), strict=True):
        said = answer(
            vlm, tiny_method(name, vlm.family), [sample], Budget(percent=100), rules=Rules(track), max_new_tokens=1
        )
        assert said.reduced.tokens[0].kept == said.reduced.tokens[0].total == total
        assert said.reduced.tokens[0].layer_average == total
        assert torch.equal(said.first_logits, stock_logits(vlm, sample))


@TRACKS
@pytest.mark.parametrize("name", BUDGETED)
def test_exact_count(name: str, track: Track, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    skip_refused(name, vlm, track)
    said = answer(vlm, tiny_method(name, vlm.family), samples, BUDGET, rules=Rules(track), max_new_tokens=1)
    keep, whole = wanted(vlm, samples, track), totals(vlm, samples)
    if name == "resize":  # fitted under the budget where the encoder sees images at their own resolution
        assert all(0.85 * k <= s.kept <= k for s, k in zip(said.selections, keep, strict=True))
        assert vlm.family.startswith("qwen") or [s.kept for s in said.selections] == keep
        keep = [s.kept for s in said.selections]
    entered = whole if name in INSIDE else keep
    assert (said.reduced.inputs["input_ids"] == vlm.image_token_id).sum(1).tolist() == entered
    rows = said.reduced.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert vlm.family in ("gemma3", "internvl") or [len(image) for image in rows] == entered
    assert sum(len(image) for image in rows) == sum(entered)
    facts = zip(said.selections, said.reduced.tokens, keep, whole, strict=True)
    for selection, tokens, kept, total in facts:
        assert selection.kept == tokens.kept == kept
        assert tokens.total == total
        places = selection.places
        assert bool((places[1:] > places[:-1]).all())
        if name not in MERGING and not (vlm.family in CROPPED and track == "released"):
            assert selection.indices.equal(places)
        if selection.order is not None:
            assert selection.order.sort().values.equal(places)


@TRACKS
@pytest.mark.parametrize("name", BUDGETED)
def test_padding_is_never_selected(name: str, track: Track, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    """Every kept token covers some of the image, by the boxes that overlays are drawn from."""
    skip_refused(name, vlm, track)
    if track == "released" and (tiny_method(name, vlm.family).keeps_padding or vlm.family in CROPPED):
        pytest.skip("released so that padding competes for the budget")
    said = answer(vlm, tiny_method(name, vlm.family), samples, BUDGET, rules=Rules(track), max_new_tokens=1)
    grids = said.reduced.prompt.grids
    for sample, grid, selection in zip(samples, grids, said.selections, strict=True):
        (image,), boxes = sample.images, {}
        for panel in vlm.panels(image, grid):
            boxes |= dict(zip(panel.tokens, panel.boxes, strict=True))
        assert bool((selection.indices >= -1).all())
        for index in selection.places.tolist():
            left, top, right, bottom = boxes[index]
            assert left < image.width and top < image.height and right > 0 and bottom > 0


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_it_was(name: str, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    skip_refused(name, vlm)

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]

    before, hooks_before = [stock_logits(vlm, sample) for sample in samples], hooks()
    answer(vlm, tiny_method(name, vlm.family), samples, BUDGET, max_new_tokens=2)
    assert all(torch.equal(b, stock_logits(vlm, s)) for b, s in zip(before, samples, strict=True))
    assert hooks() == hooks_before


@pytest.mark.parametrize("rules", [Rules(), Rules("harmonised"), Rules("harmonised", positions="keep")], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single(name: str, rules: Rules, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    skip_refused(name, vlm, rules.track)
    method = tiny_method(name, vlm.family)
    together = answer(vlm, method, samples, BUDGET, rules=rules, max_new_tokens=5)
    for i, sample in enumerate(samples):
        alone = answer(vlm, method, [sample], BUDGET, rules=rules, max_new_tokens=5)
        assert together.selections[i].indices.equal(alone.selections[0].indices)
        assert together.reduced.tokens[i] == alone.reduced.tokens[0]
        torch.testing.assert_close(together.first_logits[i], alone.first_logits[0], atol=2e-5, rtol=1e-5)
        assert together.texts[i] == alone.texts[0]


@pytest.mark.parametrize("name", ALL)
def test_same_selection_every_time(name: str, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    skip_refused(name, vlm)
    first, second = (
        answer(vlm, tiny_method(name, vlm.family), samples, BUDGET, max_new_tokens=1).selections for _ in range(2)
    )
    assert all(a.indices.equal(b.indices) for a, b in zip(first, second, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in INSIDE])
def test_removing_rows_equals_a_prompt_without_them(
    name: str, positions: Positions, vlm: VisionLanguageModel, samples: list[Sample]
) -> None:
    """Greedy answers equal those from a plain forward pass over the shorter prompt and the answer, without any cache;
    positions are looked up in the whole prompt's own."""
    skip_refused(name, vlm, "harmonised")
    if positions not in vlm.positions:
        pytest.skip(f"{vlm.family} cannot {positions}")
    sample, rules = samples[1], Rules("harmonised", positions=positions)
    said = answer(vlm, tiny_method(name, vlm.family), [sample], BUDGET, rules=rules, max_new_tokens=4)
    inputs = dict(said.reduced.inputs)
    length = inputs["input_ids"].shape[1]
    expected_positions = torch.arange(length)[None]
    if positions == "keep":
        expected_positions = kept_positions(vlm, sample, said)
    assert inputs["position_ids"].equal(expected_positions)
    expected = []
    for _ in range(said.token_ids.shape[1]):
        logits = vlm.model(**inputs, use_cache=False).logits[:, -1]
        expected.append(logits.argmax(-1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], expected[-1][:, None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        places = inputs["position_ids"]
        inputs["position_ids"] = torch.cat([places, places[..., -1:] + 1], -1)
    assert said.token_ids.equal(torch.stack(expected, 1))


def kept_positions(vlm: VisionLanguageModel, sample: Sample, said: Answers) -> torch.Tensor:
    """Where the tokens that remain stood in the whole prompt, as transformers itself counts positions there."""
    prompt = vlm.prepare([sample.question], [sample.images], [sample.image_ids], said.reduced.prompt.grids)
    image = (prompt.input_ids[0] == vlm.image_token_id).nonzero().squeeze(1)
    kept = image[0] + said.selections[0].indices.clamp(min=0)
    columns = torch.cat([torch.arange(int(image[0])), kept, torch.arange(int(image[-1]) + 1, len(prompt.input_ids[0]))])
    if not vlm.family.startswith("qwen"):
        return columns[None]
    found = vlm.processor.image_processor(sample.images[0], return_tensors="pt")["image_grid_thw"]
    if grid := said.reduced.prompt.grids[0]:
        found = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    axes, _ = vlm.model.model.get_rope_index(
        prompt.input_ids, (prompt.input_ids == vlm.image_token_id).int(), found, attention_mask=prompt.attention_mask
    )
    return torch.cat([torch.arange(len(columns))[None, None], axes[:, :, columns]])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_gpu_selects_as_the_cpu_does(name: str, vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    skip_refused(name, vlm)
    on_cpu = answer(vlm, tiny_method(name, vlm.family), samples, BUDGET, max_new_tokens=1).selections
    vlm.model.cuda()
    try:
        on_gpu = answer(vlm, tiny_method(name, vlm.family), samples, BUDGET, max_new_tokens=1).selections
    finally:
        vlm.model.cpu()
    assert all(a.indices.equal(b.indices.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


@TRACKS
@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_panorama_in_a_batch(family: str, name: str, track: Track, samples: list[Sample]) -> None:
    """A budget that one image cannot meet, because it is mostly padding, reduces it as far as possible."""
    vlm, method = FAMILIES[family]("sdpa"), tiny_method(name)
    panorama = Sample((picture(400, 40),), "How many?", ("panorama",))
    whole, plain = vlm.total(panorama.images[0]), vlm.total(samples[0].images[0])
    budget = Budget(count=min(whole, plain) - 4)
    try:
        alone = answer(vlm, method, [samples[0]], budget, rules=Rules(track), max_new_tokens=1)
    except MMTokError as error:
        assert "CLIP" in error.message
        return
    answers = answer(vlm, method, [panorama, samples[0]], budget, rules=Rules(track), max_new_tokens=1)
    thin, kept = (tokens.kept for tokens in answers.reduced.tokens)
    assert kept == alone.reduced.tokens[0].kept and 1 <= thin <= whole
    if family == "llava" and not (track == "released" and method.keeps_padding) and method.exact:
        assert thin == int(answers.reduced.vision[0].eligible.sum()) < 20
