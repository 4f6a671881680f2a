"""Tiny models written in the form in which vLLM reads checkpoints of the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny_models import FAMILIES, scaled

HEAD = 32  # vLLM's attention on a CPU has no kernel for narrower heads


def export(family: str, path: Path) -> Path:
    """Write the tiny model of a family, with a language model that is wider than usual."""
    tiny = FAMILIES[family]("sdpa")
    config = tiny.model.config
    text = config.text_config
    text.hidden_size, text.head_dim = HEAD * text.num_attention_heads, HEAD
    if family.startswith("qwen"):
        config.vision_config.out_hidden_size = text.hidden_size
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [6, 5, 5]}
    torch.manual_seed(0)
    scaled(type(tiny.model)(config)).save_pretrained(path)
    tiny.processor.save_pretrained(path)

    # The tokenizer was made for LLaVA; Qwen's processor asks it for the token of an image.
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "image_token": tiny.processor.image_token}), encoding="utf-8")
    # On the hub, and so in vLLM, the parts of CLIP's encoder lie in `vision_model`.
    file = path / "model.safetensors"
    weights = load_file(file)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): weights[name] for name in weights}
    save_file(renamed, file, metadata={"format": "pt"})
    return path


if __name__ == "__main__":
    export(sys.argv[1], Path(sys.argv[2]))
