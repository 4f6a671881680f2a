"""The attention kernel of the vision encoder: its option, what records it, and what is said of kernels that loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comparisons import comparison
from test_profile_page import profile
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
from mmtok_cli.report.profiles import encoder_notes
from mmtok_cli.report.tables import settings_text
from mmtok_cli.results.profile import Operator
from mmtok_cli.results.records import planned_case
from mmtok_cli.timing.traces import trace_case


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
    case = Case("full", make_method("full"), None).id
    assert planned_case(case, environment, {}).key != planned_case(case, alike, {}).key


def test_runs_of_versions_without_the_option_can_be_resumed() -> None:
    environment = comparison([]).environment
    case = Case("full", make_method("full"), None).id
    older = SimpleNamespace(
        model_dump=lambda exclude: environment.model_dump(exclude={*exclude, "encoder_attention"}),
    )
    assert planned_case(case, environment, {}).key == planned_case(case, older, {}).key  # type: ignore[arg-type]


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


def test_an_encoder_that_loops_over_windows_is_named(samples: list[Sample], tmp_path: Path) -> None:
    """With the calls that its trace has, and nothing of encoders with a call for each block."""
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    trace = trace_case(model, Case("full", make_method("full"), None), samples[1:2], tmp_path, max_new_tokens=1)
    (attention,) = (
        o for o in trace.operators if o.stage == "encode" and o.name == "aten::scaled_dot_product_attention"
    )
    assert attention.calls > model.model.config.vision_config.depth
    plain = profile()
    case = plain.cases[0].case.label

    def operators(calls: int, stage: str = "encode") -> list[Operator]:
        return [Operator(case=case, stage=stage, name=attention.name, calls=calls, cpu_seconds=1.0, device_seconds=1.0)]

    (note,) = encoder_notes(plain.model_copy(update={"operators": operators(2270)}))
    assert f"{case} 2270 calls" in note.replace(",", "") and "--encoder-attention flash_attention_2" in note
    for few in (operators(32), operators(2270, "decode"), []):
        assert encoder_notes(plain.model_copy(update={"operators": few})) == []
