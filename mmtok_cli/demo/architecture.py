"""The embedded model's architecture, vocabulary and processor, all of them stock transformers classes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmtok_cli.demo.dense import ROWS, SIDES, WORDS
from mmtok_cli.demo.dense_questions import DENSE_PHRASES, EXTREMES
from mmtok_cli.demo.questions import CHOICES, PHRASES
from mmtok_cli.demo.scenes import COLOURS, IMAGE_SIZE, SHAPES
from mmtok_cli.models import hf

PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
WIDTH = 128
LAYERS = 4  # of the language model
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")

# Where the parts of a LlavaForConditionalGeneration are in its state dict, and in checkpoints such as
# llava-hf/llava-1.5-7b-hf. transformers and vLLM read the latter.
HUB_PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token: the special ones, then each word and mark of the questions and answers about scenes, then what
    dense pictures add to them."""
    words = _words_of(PHRASES.values()) - {"thing", "things"}
    words |= {word for answers in CHOICES.values() for word in answers}
    words |= {*COLOURS, *SHAPES, *SHAPES.values(), "a", "an", "objects", "background", "user", "assistant", ":"}
    added = _words_of(DENSE_PHRASES.values()) - {"side", "first", "second", "extreme"}
    added |= {*WORDS, *ROWS, *SIDES, *EXTREMES}
    return *SPECIAL_TOKENS, *sorted(words), *sorted(added - words)


def _words_of(phrases: Iterable[Sequence[str]]) -> set[str]:
    text = " ".join(itertools.chain.from_iterable(phrases)).lower()
    return set(re.findall(r"\w+|[^\w\s]", text)) - {"{", "}"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per lower-cased word; words it does not know become `<unk>`. Prompts begin with `<s>`."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor() -> LlavaProcessor:
    """Pads images to a square and resizes them to 336 px, as LLaVA-1.5 does; 576 vision tokens per image."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = hf.image_processor_class("llava")(do_pad=True, size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(attention: str = "sdpa") -> LlavaConfig:
    """A LLaVA-1.5 in miniature: CLIP encoder with a class token, two-layer projector, Llama."""
    tokens = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.05,  # the width is small
        tie_word_embeddings=False,
        pad_token_id=tokens.index("<pad>"),
        bos_token_id=tokens.index("<s>"),
        eos_token_id=tokens.index("</s>"),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokens.index("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )


def build_model(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """The untrained model in float32."""
    return LlavaForConditionalGeneration(build_config(attention))


def hub_layout(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a LLaVA's state dict, named as in the hub's LLaVA-1.5 checkpoints.

    Raises ValueError for a name that belongs to none of `HUB_PREFIXES`.
    """
    renamed = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in HUB_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{name!r} is not a tensor of a LLaVA: its name begins with none of {list(HUB_PREFIXES)}")
        renamed[HUB_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return renamed
