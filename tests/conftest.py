"""Tiny models built from configs, and samples to ask them about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmtok_cli.data.samples import Sample
from mmtok_cli.demo.architecture import CHAT_TEMPLATE, build_tokenizer
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.models.llava import Llava

PATCH, SIDE = 14, 6  # 36 vision tokens


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def build_tiny_llava(attention: str = "sdpa") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a few thousand weights, scaled up so that its attention is far from uniform."""
    tokenizer = build_tokenizer()
    image = {"height": SIDE * PATCH, "width": SIDE * PATCH}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE * PATCH,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE * PATCH}, crop_size=image),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def build_tiny_clip() -> CLIPModel:
    """The CLIP model that the tiny LLaVA's encoder might have been taken from; it reads six words at a time."""
    tokenizer = build_tokenizer()
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE * PATCH,
            patch_size=PATCH,
        ),
        projection_dim=16,
    )
    torch.manual_seed(1)
    return CLIPModel(config).eval()


def tiny_text_tower(dtype: torch.dtype) -> ClipText:
    return ClipText(build_tiny_clip().to(dtype), build_tokenizer())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave runs where they are called; that is not to be the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def tiny(request: pytest.FixtureRequest) -> Llava:
    return Llava("tiny", *build_tiny_llava(request.param), text_tower=tiny_text_tower)


@pytest.fixture(scope="session")
def tiny_sdpa() -> Llava:
    return Llava("tiny", *build_tiny_llava(), text_tower=tiny_text_tower)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, in the hub's format."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = build_tiny_llava()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise in blocks, so that patches differ."""
    blocks = np.random.default_rng(seed).integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """A square, a wide and a tall image, with questions of different lengths."""
    asked = [
        (picture(84, 84, 1), "Is there a red circle in the image?"),
        (picture(160, 100, 2), "What digit is on the blue square?"),
        (picture(60, 90, 3), "How many stars?"),
    ]
    return [Sample((image,), question, (f"picture-{i}",)) for i, (image, question) in enumerate(asked)]


@pytest.fixture()
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture(120, 80, 4).save(path)
    return path
