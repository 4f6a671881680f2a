"""The processor for Qwen-VL models: what it writes it reads, with the template from wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmtok_cli.errors import MMTokError
from mmtok_cli.models.qwen_processor import QwenProcessor
from mmtok_cli.profiles import known_profiles

TEMPLATE = known_profiles()["qwen3-vl-8b"].chat_template or ""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>red?<|im_end|>\n<|im_start|>assistant\n"


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"user": 0, "assistant": 1, "red": 2, "?": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", extra_special_tokens=[*SPECIAL, *special]
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    QwenProcessor(images, tokenizer("<|image_pad|>"), TEMPLATE).save_pretrained(tmp_path)
    return tmp_path


def test_what_is_written_is_read(directory: Path) -> None:
    processor = QwenProcessor.from_pretrained(directory, local_files_only=True)
    assert processor.chat_template == TEMPLATE and processor.image_token == "<|image_pad|>"
    prompt = processor.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False)
    assert prompt == PROMPT
    assert processor.apply_chat_template(TURN) == PROMPT.removesuffix("<|im_start|>assistant\n")
    pieces = processor.tokenizer.convert_ids_to_tokens(processor.tokenizer(prompt)["input_ids"])
    assert pieces[:5] == ["<|im_start|>", "user", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    seen = processor.image_processor(Image.new("RGB", (640, 480)), return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 30, 40]]
    assert seen["pixel_values"].shape == (1200, 3 * 2 * 16 * 16)
    assert float(seen["pixel_values"].min()) == -1.0  # black, by the mean and deviation that were written


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_templates_of_older_checkpoints(directory: Path, place: str) -> None:
    (directory / "chat_template.jinja").unlink()
    file = directory / place
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    assert QwenProcessor.from_pretrained(directory).chat_template == TEMPLATE


def test_the_processors_template_goes_before_the_tokenizers(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    assert QwenProcessor.from_pretrained(directory).chat_template == TEMPLATE


def test_what_is_missing_is_named(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(MMTokError, match="no chat template") as error:
        QwenProcessor.from_pretrained(directory)
    assert "chat_template.json" in error.value.hint
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer().save_pretrained(directory)
    with pytest.raises(MMTokError, match=r"no <\|image_pad\|>"):
        QwenProcessor.from_pretrained(directory)
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(OSError):
        QwenProcessor.from_pretrained(directory, local_files_only=True)
