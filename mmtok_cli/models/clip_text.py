"""CLIP's text tower and projections, which LLaVA does not have: they map questions and image features to one space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.checkpoint import check_directory
from mmtok_cli.models.foreign_errors import errors_as
from mmtok_cli.models.pretrained import require_finite, require_same_weights
from mmtok_cli.values import to_device


class ClipText(nn.Module):
    """CLIP's text tower and its two projections; of its vision tower only the last norm.

    clip: a transformers `CLIPModel`. tokenizer: the one that belongs to it.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        parts = hf.clip_text_parts(clip)
        self.text_model, self.text_projection, self.post_layernorm, self.visual_projection = parts
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, source: str, dtype: torch.dtype) -> ClipText:
        """Load from a hub id or a directory in the hub's format.

        Raises MMTokError where it is neither local nor downloadable, or is not a CLIP model.
        """
        if Path(source).is_dir():
            check_directory(Path(source), source)
        with errors_as(f"{source} could not be loaded as a CLIP text tower", hf.or_tested("name a whole CLIP model")):
            try:
                loaded = hf.load_clip(source, dtype)
                tokenizer = hf.load_tokenizer(source)
            except OSError as error:
                if Path(source).is_dir():
                    raise
                raise MMTokError(
                    f"the CLIP text tower {source} is not in the local cache and could not be fetched from the hub",
                    f"check the network, or bring it into the cache with `hf download {source}`",
                ) from error
        require_same_weights(loaded, source)
        require_finite(loaded.model, source)
        return cls(loaded.model, tokenizer)

    @torch.no_grad()
    def image_embeds(self, features: Tensor) -> Tensor:
        """Patch features of the vision encoder in the shared space: `[..., vision dim]` to `[..., clip dim]`.

        Raises MMTokError for features of another width than CLIP's own encoder has.
        """
        width = self.visual_projection.in_features
        if features.shape[-1] != width:
            raise MMTokError(
                f"the CLIP text tower belongs to an encoder {width} wide, and these features are {features.shape[-1]}",
                "the profile's text_tower must be the CLIP model that the vision encoder was taken from",
            )
        return self.visual_projection(self.post_layernorm(features))

    @torch.no_grad()
    def text_embeds(self, question: str) -> Tensor:
        """The question in the shared space: `[pieces, clip dim]`, one row for each piece that the tower can read."""
        device = self.text_projection.weight.device
        pieces = [to_device(torch.tensor([piece]), device) for piece in self._pieces(question)]
        return torch.cat([self.text_projection(hf.pooled(self.text_model, piece)) for piece in pieces])

    def _pieces(self, question: str) -> list[list[int]]:
        """The question's tokens, split to fit the tower (77 of CLIP's, its two special ones included)."""
        ids = self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        size = self.text_model.config.max_position_embeddings - 2
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [[start, *ids[i : i + size], end] for i in range(0, max(len(ids), 1), size)]
