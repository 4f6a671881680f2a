"""The attention kernel of the vision encoder: its option, what records it, and what is said of kernels that loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comparisons import case, comparison
from tiny_models import FAMILIES

from mmtok_cli.cases import Case
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf, load_model
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.devices import require_attention
from mmtok_cli.models.room import laid_out, needs_of
from mmtok_cli.models.sources import architecture
from mmtok_cli.report.checks import encoder_notes, notes
from mmtok_cli.report.tables import settings_text
from mmtok_cli.results.records import planned_case
from mmtok_cli.results.schema import CaseResult, FlopCoverage
from mmtok_cli.timing.flops import measure_flops


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_encoder_may_have_a_kernel_of_its_own(weights: str, tiny_directory: Path) -> None:
    model = load_model(str(tiny_directory), device="cpu", weights=weights, encoder_attention="eager")
    assert (model.attention, model.encoder_attention) == ("sdpa", "eager")
    environment = environment_of(model)
    assert environment.encoder_attention == "eager" and "sdpa attention (eager in the encoder)" in settings_text(
        environment
    )
    alike = environment_of(load_model(str(tiny_directory), device="cpu", weights=weights, encoder_attention="sdpa"))
    assert alike.encoder_attention is None and settings_text(alike).endswith("sdpa attention")
    full = Case("full", make_method("full"), None).id
    assert planned_case(full, environment, {}).key != planned_case(full, alike, {}).key


def test_runs_of_versions_without_the_option_can_be_resumed() -> None:
    environment = comparison([]).environment
    full = Case("full", make_method("full"), None).id
    older = SimpleNamespace(
        model_dump=lambda exclude: environment.model_dump(exclude={*exclude, "encoder_attention"}),
    )
    assert planned_case(full, environment, {}).key == planned_case(full, older, {}).key  # type: ignore[arg-type]


def test_every_family_has_both_kernels(vlm: VisionLanguageModel) -> None:
    assert vlm.encoder_attention == vlm.attention
    other = "eager" if vlm.attention == "sdpa" else "sdpa"
    config = type(vlm.model.config).from_dict(vlm.model.config.to_dict())
    mixed = laid_out(config, torch.float32, hf.attention_kernels(vlm.attention, other))
    assert (hf.attention_kernel(mixed), hf.encoder_attention_kernel(mixed)) == (vlm.attention, other)


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "has_flash_attention", lambda: False)
    cuda = torch.device("cuda")
    with pytest.raises(MMTokError, match="needs the package flash-attn") as error:
        require_attention("flash_attention_2", cuda, None, "--encoder-attention")
    assert error.value.hint == "pip install flash-attn"
    monkeypatch.setattr(hf, "has_flash_attention", lambda: True)
    require_attention("flash_attention_2", cuda, torch.bfloat16, "--encoder-attention")
    with pytest.raises(MMTokError, match="does not run in float32") as error:
        require_attention("flash_attention_2", cuda, torch.float32, "--encoder-attention")
    assert "--encoder-attention sdpa" in error.value.hint
    with pytest.raises(MMTokError, match="needs a CUDA device, and the device is cpu"):
        load_model("demo", device="cpu", encoder_attention="flash_attention_2")


def test_the_memory_of_an_eager_encoder_is_its_own() -> None:
    layout = laid_out(architecture("llava-1.5-7b", ""), torch.bfloat16)
    plain = needs_of(layout, torch.bfloat16, (576,))
    eager = needs_of(layout, torch.bfloat16, (576,), "sdpa", "eager")
    assert eager.working == plain.working and eager.encoder - plain.encoder == 16 * 576**2 * 6


def test_an_encoder_that_loops_over_windows_is_named(samples: list[Sample]) -> None:
    """With the calls that were counted, and nothing of encoders with a call for each block."""
    counted = {}
    for family, eager in (("qwen2_5_vl", False), ("llava", False), ("qwen2_5_vl", True)):
        model = FAMILIES[family]("eager" if eager else "sdpa")
        flops = measure_flops(model, Case("full", make_method("full"), None), samples[1:2], 1)
        counted[family, eager] = flops.coverage.encoder_attention
    blocks = model.model.config.vision_config.depth
    assert counted["qwen2_5_vl", False] > blocks and counted["qwen2_5_vl", True] == 0
    assert counted["llava", False] <= blocks

    def results(*calls: int, batch_size: int = 1) -> list[CaseResult]:
        made = []
        for method, number in zip(("full", "mmtok"), calls, strict=False):
            one = case(method)
            seen = FlopCoverage(calls=9999, counted={}, missed={}, encoder_attention=number)
            at = one.case.model_copy(update={"batch_size": batch_size})
            made.append(one.model_copy(update={"case": at, "flop_coverage": seen}))
        return made

    (note,) = encoder_notes(results(2270, 2270))
    assert "per sample: 2270 calls" in note and "--encoder-attention flash_attention_2" in note
    (note,) = encoder_notes(results(2270, 568))
    assert "full 2270, mmtok" in note and "568 calls" in note
    assert encoder_notes(results(4 * 48, batch_size=4)) == encoder_notes(results(32)) == encoder_notes([]) == []
    assert note in notes(comparison(results(2270, 568)))
