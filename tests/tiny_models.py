"""A tiny model of every family, built from configs; weights are scaled up so that attention is far from uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmtok_cli.data.samples import Sample
from mmtok_cli.demo.architecture import CHAT_TEMPLATE, build_tokenizer
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.clip_text import ClipText
from mmtok_cli.models.gemma3 import Gemma3, Gemma3Processor
from mmtok_cli.models.internvl import InternVL, InternVLImageTextProcessor
from mmtok_cli.models.llava import Llava
from mmtok_cli.models.llava_next import LlavaNext
from mmtok_cli.models.llava_onevision import LlavaOneVision, OneVisionProcessor
from mmtok_cli.models.qwen_processor import QwenProcessor
from mmtok_cli.models.qwen_vl import Qwen3VL, Qwen3VLMoe, Qwen35, QwenVL

PATCH, SIDE = 14, 6  # 36 vision tokens
SQUARE = SIDE * PATCH
PINPOINTS = [[SQUARE, 2 * SQUARE], [2 * SQUARE, SQUARE], [2 * SQUARE] * 2, [3 * SQUARE, SQUARE], [SQUARE, 3 * SQUARE]]
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
LAYERS = 4  # of every language model

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SQUARE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def scaled(model: Any) -> Any:
    """The model with larger weights, so that its answers differ. Like a trained one, it answers with no image token."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        for name in ("image_token_id", "video_token_id"):
            if (token := getattr(model.config, name, None)) is not None:
                model.get_output_embeddings().weight[token] = 0
    return model.eval()


def text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        **TEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_tiny_llava(attention: str = "sdpa") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text_config(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SQUARE}, crop_size={"height": SQUARE, "width": SQUARE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return scaled(LlavaForConditionalGeneration(config)), processor


def build_tiny_llava_next(attention: str = "sdpa") -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    tokenizer = build_tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text_config(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SQUARE},
            crop_size={"height": SQUARE, "width": SQUARE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return scaled(LlavaNextForConditionalGeneration(config)), processor


def build_tiny_llava_onevision(
    attention: str = "sdpa",
) -> tuple[LlavaOnevisionForConditionalGeneration, OneVisionProcessor]:
    """Sixteen crops, which it scales down, for large images."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    pinpoints = [*PINPOINTS, [4 * SQUARE, 4 * SQUARE]]
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "qwen2", **text_config(tokenizer), "max_position_embeddings": 2048},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": SQUARE, "width": SQUARE}, image_grid_pinpoints=pinpoints
    )
    model = scaled(LlavaOnevisionForConditionalGeneration(config))
    return model, OneVisionProcessor(image_processor, tokenizer, CHAT_TEMPLATE)


def build_tiny_qwen(
    attention: str = "sdpa", tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Qwen2_5_VLForConditionalGeneration, QwenProcessor]:
    tokenizer = tokenizer or qwen_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    config = Qwen2_5_VLConfig(
        vision_config={**QWEN_VISION, "fullatt_block_indexes": [0, 2], "window_size": 4 * PATCH},
        text_config={**text_config(tokenizer), "rope_parameters": rope, "max_position_embeddings": 2048},
        **qwen_ids(tokenizer),
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return scaled(Qwen2_5_VLForConditionalGeneration(config)), qwen_processor(tokenizer)


def build_tiny_qwen3(attention: str = "sdpa", experts: int = 0) -> tuple[Any, QwenProcessor]:
    """experts: of each decoder layer, in the architecture that has them."""
    tokenizer = qwen_tokenizer()
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    }
    text = {**text_config(tokenizer), "rope_parameters": rope, "head_dim": 12, "max_position_embeddings": 2048}
    vision = {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    ids = qwen_ids(tokenizer)
    if experts:
        text |= {"moe_intermediate_size": 24, "num_experts": experts, "num_experts_per_tok": 2}
        config = Qwen3VLMoeConfig(vision_config=vision, text_config=text, **ids, attn_implementation=attention)
        kind = Qwen3VLMoeForConditionalGeneration
    else:
        config = Qwen3VLConfig(vision_config=vision, text_config=text, **ids, attn_implementation=attention)
        kind = Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    return scaled(kind(config)), qwen_processor(tokenizer)


def build_tiny_qwen3_5(attention: str = "sdpa") -> tuple[Qwen3_5ForConditionalGeneration, QwenProcessor]:
    """Eight decoder layers, of which every other one has linear attention; a quarter of each head is rotated."""
    tokenizer = qwen_tokenizer()
    text = {
        **text_config(tokenizer),
        "num_hidden_layers": 2 * LAYERS,
        "layer_types": ["linear_attention", "full_attention"] * LAYERS,
        "head_dim": 24,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 1],
            "mrope_interleaved": True,
        },
    }
    config = Qwen3_5Config(
        vision_config={**QWEN_VISION, "num_position_embeddings": 64},
        text_config=text,
        **qwen_ids(tokenizer),
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return scaled(Qwen3_5ForConditionalGeneration(config)), qwen_processor(tokenizer)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}
    )
    return tokenizer


def qwen_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen_processor(tokenizer: PreTrainedTokenizerBase, template: str = QWEN_TEMPLATE) -> QwenProcessor:
    """At least twelve vision tokens per image, which the samples' small pictures are scaled up to."""
    size = {"shortest_edge": 12 * (2 * PATCH) ** 2, "longest_edge": 64 * (2 * PATCH) ** 2}
    image_processor = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    return QwenProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=template)


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
        vision_config=CLIPVisionConfig(**VISION),
        projection_dim=16,
    )
    torch.manual_seed(1)
    return CLIPModel(config).eval()


def tiny_text_tower(dtype: torch.dtype) -> ClipText:
    return ClipText(build_tiny_clip().to(dtype), build_tokenizer())


def build_tiny_internvl(
    attention: str = "sdpa",
) -> tuple[InternVLForConditionalGeneration, InternVLImageTextProcessor]:
    """Tiles of 16 vision tokens, six at most."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
    side = 8 * PATCH
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [side, side], "patch_size": [PATCH, PATCH], "attention_bias": True},
        text_config={"model_type": "qwen2", **text_config(tokenizer), "max_position_embeddings": 2048},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = scaled(InternVLForConditionalGeneration(config))
    for name, parameter in model.named_parameters():  # zero and 0.1 where nothing was trained
        if name.endswith(("position_embeddings", "cls_token")):
            torch.nn.init.normal_(parameter)
        elif "lambda_" in name:
            torch.nn.init.ones_(parameter)
    image_processor = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, max_patches=6)
    template = CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>")
    return model, InternVLImageTextProcessor(image_processor, tokenizer, template)


def build_tiny_gemma3(attention: str = "sdpa") -> tuple[Gemma3ForConditionalGeneration, Gemma3Processor]:
    """36 vision tokens of 2 x 2 patches; every other decoder layer sees a window that is shorter than the prompts."""
    tokenizer = build_tokenizer()
    tokens = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    start, end, image = tokenizer.convert_tokens_to_ids(tokens)
    config = Gemma3Config(
        vision_config={**SIGLIP, "image_size": 2 * SQUARE},
        text_config={
            **text_config(tokenizer),
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "max_position_embeddings": 2048,
        },
        mm_tokens_per_image=SIDE**2,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = scaled(Gemma3ForConditionalGeneration(config))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero where nothing is trained
    image_processor = Gemma3ImageProcessorPil(size={"height": 2 * SQUARE, "width": 2 * SQUARE})
    return model, Gemma3Processor(image_processor, tokenizer, CHAT_TEMPLATE.replace("<image>", "<start_of_image>"))


FAMILIES: dict[str, Callable[[str], VisionLanguageModel]] = {
    "gemma3": lambda attention: Gemma3("tiny", *build_tiny_gemma3(attention)),
    "internvl": lambda attention: InternVL("tiny", *build_tiny_internvl(attention)),
    "llava": lambda attention: Llava("tiny", *build_tiny_llava(attention), text_tower=tiny_text_tower),
    "llava_next": lambda attention: LlavaNext("tiny", *build_tiny_llava_next(attention), text_tower=tiny_text_tower),
    "llava_onevision": lambda attention: LlavaOneVision("tiny", *build_tiny_llava_onevision(attention)),
    "qwen2_5_vl": lambda attention: QwenVL("tiny", *build_tiny_qwen(attention)),
    "qwen3_5": lambda attention: Qwen35("tiny", *build_tiny_qwen3_5(attention)),
    "qwen3_vl": lambda attention: Qwen3VL("tiny", *build_tiny_qwen3(attention)),
    "qwen3_vl_moe": lambda attention: Qwen3VLMoe("tiny", *build_tiny_qwen3(attention, experts=4)),
}


def stock_inputs(model: VisionLanguageModel, sample: Sample) -> dict[str, Any]:
    """What transformers' own forward takes for a sample, pictures and all."""
    prompt = model.prepare([sample.question], [sample.images], [sample.image_ids], [None] * len(sample.images))
    inputs: dict[str, Any] = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
    if model.family == "llava":
        return inputs | {"pixel_values": torch.stack(prompt.pixel_values)}
    if model.family == "gemma3":
        of_images = (prompt.input_ids == model.image_token_id).long()
        return inputs | {"pixel_values": torch.stack(prompt.pixel_values), "token_type_ids": of_images}
    if model.family == "internvl":
        return inputs | {"pixel_values": torch.cat(prompt.pixel_values)}
    if model.family in ("llava_next", "llava_onevision"):
        sizes = torch.tensor([[image.height, image.width] for image in sample.images])
        return inputs | {"pixel_values": torch.cat(prompt.pixel_values), "image_sizes": sizes}
    found = [model.processor.image_processor(image, return_tensors="pt") for image in sample.images]
    return inputs | {
        "pixel_values": torch.cat([each["pixel_values"] for each in found]),
        "image_grid_thw": torch.cat([each["image_grid_thw"] for each in found]),
        "mm_token_type_ids": (prompt.input_ids == model.image_token_id).int(),
    }


def stock_logits(model: VisionLanguageModel, sample: Sample) -> torch.Tensor:
    """The next token's logits by transformers alone."""
    with torch.inference_mode():
        return model.model(**stock_inputs(model, sample), logits_to_keep=1).logits[:, -1]
