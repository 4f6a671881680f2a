"""transformers' names are known in one file, which reads them strictly."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cli_helpers import QUESTION, refused, run
from huggingface_hub.utils import logging as hub_logging
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

import mmtok_cli
from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import make_method
from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.pipeline import answer, reduce

pytestmark = pytest.mark.compat

PACKAGE = Path(mmtok_cli.__file__).parent
SEAM = PACKAGE / "models" / "hf.py"
# The embedded model is built and trained from transformers' public classes; that code may name them and the modules of
# the one model that they make.
TRAINING = {PACKAGE / "demo" / name for name in ("architecture.py", "evaluate.py", "forward.py", "train.py")}
ELSEWHERE = sorted(set(PACKAGE.rglob("*.py")) - {SEAM} - TRAINING)

NAMES = set(
    """
    language_model visual blocks attn return_dict
    get_input_embeddings get_output_embeddings generation_config layer_types
    past_key_values mm_encoder_outputs mm_token_type_ids image_grid_thw pixel_values_videos logits_to_keep
    use_cache output_hidden_states interpolate_pos_encoding hidden_states last_hidden_state pooler_output
    deepstack_features position_embeddings get_seq_length get_image_features pack_image_features image_newline
    get_rope_index get_vision_window_index smart_resize get_anyres_image_grid_shape rotary_emb q_proj k_proj
    v_proj o_proj q_norm k_norm qkv self_attn input_layernorm vision_tower multi_modal_projector
    apply_rotary_pos_emb apply_rotary_pos_emb_vision DynamicCache DynamicLayer BaseModelOutputWithPooling
    _attn_implementation attn_implementation _no_split_modules initialize_weights tie_weights
    get_processor_dict token_type_ids mm_input_projection_weight mm_soft_emb_norm
    linear_attn conv_states recurrent_states partial_rotary_factor
    """.split()
)


def names_of(path: Path) -> set[str]:
    """Attributes, keyword arguments and whole strings of a file, apart from what it asks of the seam itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "hf"):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def modules_of(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_knows_transformers(path: Path) -> None:
    assert not {module for module in modules_of(path) if module.split(".")[0] == "transformers"}
    if PACKAGE / "integrations" not in path.parents:  # models of vLLM and tasks of lmms-eval share some of the names
        assert not names_of(path) & NAMES


@pytest.mark.parametrize("path", sorted(TRAINING), ids=lambda path: path.name)
def test_training_imports_public_classes_alone(path: Path) -> None:
    assert {module for module in modules_of(path) if module.startswith("transformers")} <= {"transformers"}


def test_the_names_are_those_that_the_seam_uses() -> None:
    """A name that was renamed in the seam, and is still looked for here, would let the old one in elsewhere."""
    text = SEAM.read_text(encoding="utf-8")
    assert {name for name in NAMES if name not in text} <= {"pixel_values_videos", "v_proj", "o_proj"}


def test_one_range_is_declared_and_tested() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (declared,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    assert declared.specifier == Requirement(hf.tested_range()).specifier
    assert hf.is_tested("5.18.0") and hf.is_tested(f"{hf.OLDEST}.7") and not hf.is_tested("5.17.3")
    assert not hf.is_tested(f"{hf.BEYOND}.0") and not hf.is_tested(f"{hf.BEYOND}.0.dev0") and not hf.is_tested("6.0rc1")
    assert hf.is_tested() == (Version(transformers.__version__) in declared.specifier)


def names_the_way_out(error: pytest.ExceptionInfo[MMTokError], *words: str) -> None:
    for word in (transformers.__version__, hf.OLDEST, hf.BEYOND, *words):
        assert word in error.value.message
    assert f'pip install "{hf.tested_range()}"' in error.value.hint


def test_what_is_gone_is_named() -> None:
    with pytest.raises(MMTokError) as error:
        hf.part(nn.Linear(2, 2), "weight.of_gold")
    names_the_way_out(error, "Parameter.of_gold")
    for module, name in (("no_such_module", "Anything"), ("cache_utils", "NoSuchCache")):
        with pytest.raises(MMTokError) as error:
            hf.imported(module, name)
        names_the_way_out(error, f"{module}.{name}")


def test_an_argument_that_would_be_swallowed_is_refused() -> None:
    class Renamed(nn.Module):
        def forward(self, hidden: torch.Tensor, images: Any = None, **kwargs: Any) -> torch.Tensor:
            return hidden

    assert hf.call(Renamed(), torch.ones(1), images=3, use_cache=True).item() == 1
    with pytest.raises(MMTokError) as error:
        hf.call(Renamed(), torch.ones(1), mm_encoder_outputs={})
    names_the_way_out(error, "'mm_encoder_outputs' of Renamed")


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids", "position_embeddings", "cache"])
def test_a_layer_call_without_an_argument_is_refused(lost: str) -> None:
    """Absent is not None: a cache under an unknown name would be taken for none at all."""
    call = {"attention_mask": None, "position_ids": None, "position_embeddings": (), "cache": None}
    assert hf.LayerCall.read((torch.ones(1, 1, 2),), call).cache is None
    old = {"past_key_values" if name == "cache" else name: value for name, value in call.items()}
    assert hf.LayerCall.read((), old | {"hidden_states": torch.ones(1, 1, 2)}).mask is None
    del call[lost]
    with pytest.raises(MMTokError) as error:
        hf.LayerCall.read((torch.ones(1, 1, 2),), call | {"keys_and_values": None})
    names_the_way_out(error, "past_key_values" if lost == "cache" else lost)


def test_hidden_states_under_another_name_are_refused() -> None:
    with pytest.raises(MMTokError) as error:
        hf.hidden_of((), {"states": torch.ones(1)})
    names_the_way_out(error, "hidden_states")


def test_an_output_without_a_cache_is_refused() -> None:
    with pytest.raises(MMTokError) as error:
        hf.cache_of({"logits": torch.ones(1)})
    names_the_way_out(error, "cache")


def test_an_encoder_that_gives_no_features_is_refused(tiny_sdpa: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    out = SimpleNamespace(hidden_states=(None,) * 4)
    monkeypatch.setattr(hf, "call", lambda *args, **kwargs: out)
    with pytest.raises(MMTokError) as error:
        hf.clip_hidden_states(tiny_sdpa.model, torch.ones(1, 3, 84, 84), [-2], interpolate=False)
    names_the_way_out(error, "features")


def test_an_unknown_attention_is_refused(tiny_sdpa: Llava) -> None:
    """A projection or norm that is not known here would be left out of the attention that methods read."""
    layer = hf.decoder_layers(hf.language_model(tiny_sdpa.model))[0]
    hidden = torch.ones(2, 48)
    rotary = (torch.ones(2, 12), torch.zeros(2, 12))
    assert hf.queries(layer, hidden, rotary).shape == (4, 2, 12) and hf.keys(layer, hidden, rotary).shape == (2, 2, 12)
    layer.self_attn.add_module("gate", nn.Identity())
    try:
        with pytest.raises(MMTokError, match="gate"):
            hf.queries(layer, hidden, rotary)
    finally:
        del layer.self_attn.gate


def test_a_renamed_cache_reaches_the_user_as_one_line(
    tiny_directory: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "CACHE_NAMES", ("keys_and_values",))
    for method in ("mmtok", "fastv", "none"):
        result = run(
            "infer", photo, QUESTION, "-m", tiny_directory, "--method", method, *("-b", 4) * (method != "none")
        )
        refused(result, transformers.__version__, "keys_and_values", hf.tested_range())


def test_a_fault_under_an_untested_release_names_the_tested_ones(
    tiny_directory: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "forward", lambda *args: 1 / 0)
    tested = run("infer", photo, QUESTION, "-m", tiny_directory, "-b", 4).exception
    assert isinstance(tested, ZeroDivisionError) and bool(getattr(tested, "__notes__", [])) != hf.is_tested()
    monkeypatch.setattr(hf, "BEYOND", "5.18")
    (note,) = run("infer", photo, QUESTION, "-m", tiny_directory, "-b", 4).exception.__notes__
    assert transformers.__version__ in note and hf.tested_range() in note


def test_the_cache_is_kept(vlm: VisionLanguageModel, samples: list[Sample]) -> None:
    reduced = reduce(vlm, make_method("mmtok"), samples[:1], Budget(count=8))
    with torch.inference_mode():
        _, cache = hf.forward(vlm.model, reduced.inputs)
    length = reduced.inputs["input_ids"].shape[1]
    assert hf.is_plain_cache(cache) and hf.cached_tokens(cache) == length
    assert hf.cached_keys(cache, 1).shape[2] == length and len(hf.cached_bytes(cache)) == 4


def test_a_library_that_warns_is_not_called(vlm: VisionLanguageModel, samples: list[Sample], recwarn: Any) -> None:
    for method in (make_method("mmtok"), make_method("fastv", layer=2)):
        answer(vlm, method, samples[:1], Budget(count=8), max_new_tokens=3)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_python_users_see_nothing_of_the_libraries() -> None:
    """Loading, answering inside and before the language model: no progress bar, log message or warning."""
    code = """
from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import sample_from_file
from mmtok_cli.demo.evaluate import WEIGHTS
from mmtok_cli.methods import make_method
from mmtok_cli.models import load_model
from mmtok_cli.pipeline import answer

model = load_model("demo")
sample = sample_from_file(str(WEIGHTS.parent / "example.png"), "What color is the star?")
for method in (make_method("mmtok"), make_method("fastv", layer=1), make_method("visionzip")):
    print(answer(model, method, [sample], Budget(64)).texts[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["red"] * 3


def test_command_line_users_see_nothing_of_the_libraries(photo: Path) -> None:
    command = [sys.executable, "-m", "mmtok_cli", "infer", str(photo), QUESTION, "--method", "fastv", "-b", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr and "%|" not in done.stderr
    assert done.stdout.strip() and "[transformers]" not in done.stderr


def test_a_release_that_lost_a_public_class_is_named() -> None:
    with pytest.raises(MMTokError) as error:
        hf.public("AutoModelOfTomorrow")
    names_the_way_out(error, "AutoModelOfTomorrow")


def test_weights_that_the_files_lack_are_not_made_up(tiny_directory: Path, photo: Path, tmp_path: Path) -> None:
    """transformers draws them at random: answers would be wrong without a word."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_directory, damaged)
    weights = load_file(damaged / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight"))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, damaged / "model.safetensors")
    refused(run("infer", photo, QUESTION, "-m", damaged, "-b", 4), "lack", "layers.1.self_attn.q_proj.weight")


def test_faults_name_the_tested_releases_under_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "BEYOND", "99.0")
    assert hf.or_tested("download it again") == "download it again"
    monkeypatch.setattr(hf, "BEYOND", "5.18")
    hint = hf.or_tested("download it again")
    assert hint.startswith("download it again") and transformers.__version__ in hint and hf.tested_range() in hint


def test_a_parameter_of_attention_that_is_not_known_is_refused(tiny_sdpa: Llava) -> None:
    layer = hf.decoder_layers(hf.language_model(tiny_sdpa.model))[0]
    encoder = hf.clip_attention(tiny_sdpa.model, 0)
    for attention in (layer.self_attn, encoder):
        attention.register_parameter("sinks", nn.Parameter(torch.zeros(4)))
    try:
        with pytest.raises(MMTokError, match="sinks"):
            hf.keys(layer, torch.ones(2, 48), (torch.ones(2, 12), torch.zeros(2, 12)))
        with pytest.raises(MMTokError, match="sinks"):
            hf.clip_keys(encoder, torch.ones(1, 2, 32))
    finally:
        for attention in (layer.self_attn, encoder):
            del attention.sinks


def test_quiet_restores_what_it_found() -> None:
    def settings() -> tuple[Any, ...]:
        return logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()

    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        before = settings()
        with pytest.raises(ZeroDivisionError), hf.quiet():
            1 / 0  # noqa: B018
        assert settings() == before
        first, second = hf.quiet(), hf.quiet()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as in two threads
        assert settings() != before
        second.__exit__(None, None, None)
        assert settings() == before
    finally:
        logging.set_verbosity_warning()


@torch.inference_mode()
def test_images_that_the_forward_pass_does_not_look_for_are_noticed(
    vlm: VisionLanguageModel, samples: list[Sample]
) -> None:
    reduced = reduce(vlm, make_method("mmtok"), samples[:1], Budget(count=8))
    hf.forward(vlm.model, reduced.inputs)
    encoded = reduced.inputs["mm_encoder_outputs"]
    encoded["picture"] = encoded.pop("image")  # as if the forward pass looked for another key
    with pytest.raises(MMTokError) as error:
        hf.forward(vlm.model, reduced.inputs)
    names_the_way_out(error, "'picture'", type(vlm.model).__name__)
