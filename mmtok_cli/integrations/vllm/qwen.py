"""What Qwen2.5-VL and Qwen3-VL have in common in vLLM: windows and merged patches, positions that are kept.

Kept tokens keep the positions that they have in the whole image (M-RoPE), and the text after an image begins where it
begins after the whole image. The positions of text are known before the image is encoded. Those of kept tokens are not:
they travel with their rows as further columns, which `embed_input_ids` takes off and `forward` adds to the position at
which the image begins. vLLM has machinery of its own for that, for pruned videos, but not in all of its runners.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed import get_pp_group, tensor_model_parallel_all_gather

from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.vllm.processing import KEY, ReducingProcessor
from mmtok_cli.integrations.vllm.reducing import Reducing, watched
from mmtok_cli.integrations.vllm.request import ImageRequest
from mmtok_cli.models.qwen_signals import SIGNALS, attention_signals
from mmtok_cli.tokens import Selection, VisionTokens, all_eligible

BASE = 256  # positions are written as two digits, which even bfloat16 holds exactly
COLUMNS = 4  # two digits each of row and column


class QwenProcessor(ReducingProcessor):
    def _arguments(self, inputs: Any) -> dict[str, Any]:
        arguments = super()._arguments(inputs)
        config = self.info.ctx.get_mm_config()
        if KEY in arguments and config.mm_encoder_tp_mode == "data":
            raise MMTokError("images are not reduced with --mm-encoder-tp-mode data", "start vLLM without it")
        if KEY in arguments and config.is_multimodal_pruning_enabled():
            raise MMTokError("images are not reduced with --video-pruning-rate", "start vLLM without it")
        return arguments


class QwenReducing(Reducing):
    """Mixed into a model class.

    norm: the name of the layer inside the merger that sees each patch first.
    """

    signals = SIGNALS
    norm: str
    visual: Any
    config: Any
    _kept_places: tuple[Tensor, Tensor] | None = None  # of the tokens that the next forward pass reads

    # ---- encoding ----

    @property
    @abstractmethod
    def attention_block(self) -> int:
        """The last block that sees whole images."""

    def raster_order(self, sizes: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
        """Where each vision token in raster order comes from in the order of the encoder, [count]."""
        return torch.arange(count, device=device)

    def encode_images(self, requests: Sequence[ImageRequest], signals: Sequence[str], **inputs: Any) -> Any:
        image_input = self._parse_and_validate_image_input(**inputs)  # type: ignore[attr-defined]
        if image_input is None or image_input["type"] != "pixel_values":
            raise MMTokError("images that come as embeddings cannot be reduced", "send pixels")
        encoder, sizes = self.visual, image_input["image_grid_thw"].tolist()
        attention = encoder.blocks[self.attention_block].attn
        with (
            watched(getattr(encoder.merger, self.norm)) as merged_patches,
            watched(attention.qkv, wanted=bool(signals)) as qkv,
        ):
            merged = encoder(image_input["pixel_values"], grid_thw=sizes)
        side = encoder.spatial_merge_size
        counts = [t * h * w // side**2 for t, h, w in sizes]
        per_patch = {"features": merged_patches[0][0].flatten(0, -2)}  # what the last block gave
        if signals:
            metadata = encoder.prepare_encoder_metadata(sizes)
            rotary = metadata["rotary_pos_emb_cos"], metadata["rotary_pos_emb_sin"]
            queries, keys = rotated(attention, qkv[0][1], rotary)
            scale = attention.hidden_size_per_attention_head**-0.5
            per_patch |= attention_signals(queries, keys, scale, [n * side**2 for n in counts], signals)
        order = self.raster_order(sizes, sum(counts), merged.device)
        per_token = {
            name: values.unflatten(0, (-1, side**2)).mean(1)[order].split(counts) for name, values in per_patch.items()
        }
        features = per_token.pop("features")
        width = self.config.text_config.hidden_size
        return [
            VisionTokens(
                projected=rows[:, :width],
                features=features[i],
                grid=(sizes[i][1] // side, sizes[i][2] // side),
                eligible=all_eligible(counts[i], rows.device),
                image_id=requests[i].image_id,
                project=no_projector,
                signals={name: values[i] for name, values in per_token.items()},
                deepstack=tuple(rows[:, width:].split(width, dim=1)),
            )
            for i, rows in enumerate(merged.split(counts))
        ]

    def rows(self, vision: VisionTokens, selection: Selection) -> Tensor:
        rows = torch.cat([super().rows(vision, selection), *(each[selection.indices] for each in vision.deepstack)], 1)
        if selection.kept == vision.total and selection.tokens is None:
            return rows
        line = selection.indices.clamp(min=0)
        places = torch.stack([line // vision.grid[1], line % vision.grid[1]], dim=1)
        return torch.cat([rows, as_digits(places).to(rows.dtype)], dim=1)

    def get_encoder_cudagraph_config(self) -> Any:
        """Images are encoded without CUDA graphs, which would skip the selection."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return replace(config, modalities=[each for each in config.modalities if each != "image"])

    # ---- positions ----

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, tokens] of a prompt, and how many more than its tokens they count.

        Placeholders of images with fewer tokens than cells get the position at which their image begins.
        """
        side, images = self.visual.spatial_merge_size, []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            if feature.modality != "image":  # a prompt with videos is not reduced
                return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
            _, height, width = feature.data["image_grid_thw"].data.tolist()
            images.append((feature.mm_position.offset, feature.mm_position.length, height // side, width // side))
        if all(length == rows * columns for _, length, rows, columns in images):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        parts, at, position = [], 0, 0
        for offset, length, rows, columns in images:
            parts.append(np.broadcast_to(np.arange(offset - at), (3, offset - at)) + position)
            position += offset - at
            whole = length == rows * columns
            cells = np.indices((1, rows, columns)).reshape(3, -1) if whole else np.zeros((3, length), dtype=np.int64)
            parts.append(cells + position)
            at, position = offset + length, position + max(rows, columns)
        left = len(input_tokens) - at
        parts.append(np.broadcast_to(np.arange(left), (3, left)) + position)
        return torch.from_numpy(np.concatenate(parts, axis=1)), position - at

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """As in vLLM. The positions of kept tokens are taken off their rows for the forward pass that follows."""
        self._kept_places = None
        embedded = list(multimodal_embeddings) if multimodal_embeddings is not None else []
        width = self.config.text_config.hidden_size * (1 + len(self._deepstack_levels))
        if is_multimodal is not None and any(rows.shape[1] > width for rows in embedded):
            if get_pp_group().world_size > 1:
                raise RuntimeError("mmtok does not reduce the images of Qwen models with pipeline parallelism")
            if self.mmtok_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
                raise RuntimeError("mmtok does not reduce the images of Qwen models with cudagraph_mode FULL")
            places = [
                from_digits(rows[:, width:]) if rows.shape[1] > width else rows.new_zeros(len(rows), 2).long()
                for rows in embedded
            ]
            self._kept_places = is_multimodal.nonzero().squeeze(1), torch.cat(places)
            embedded = [rows[:, :width] for rows in embedded]
        given = embedded if multimodal_embeddings is not None else None
        return super().embed_input_ids(input_ids, given, is_multimodal=is_multimodal)  # type: ignore[misc]

    @property
    def _deepstack_levels(self) -> Sequence[int]:
        """Blocks of the encoder whose features the first decoder layers add, behind those of each row."""
        return getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._kept_places is not None:
            columns, places = self._kept_places
            self._kept_places = None
            # Changed in place, since a CUDA graph reads the tensor that it was captured with. vLLM sets it each step.
            positions[1:, columns.to(positions.device)] += places.T.to(positions)
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


def as_digits(places: Tensor) -> Tensor:
    """[tokens, 4] from rows and columns [tokens, 2]: two digits for each."""
    return torch.stack([places // BASE, places % BASE], dim=2).flatten(1)


def from_digits(columns: Tensor) -> Tensor:
    """Rows and columns [tokens, 2] from their digits [tokens, 4]."""
    digits = columns.float().round().long().unflatten(1, (2, 2))
    return digits[..., 0] * BASE + digits[..., 1]


def rotated(attention: Any, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys [heads, patches, head dim] of the whole model. qkv: [patches, 1, 3 x dim of this process]."""
    width = attention.hidden_size_per_attention_head
    parts = qkv.squeeze(1).unflatten(-1, (3, -1, width))  # [patches, 3, heads, head dim]
    both = parts[:, :2].transpose(0, 1).contiguous()
    queries, keys = attention.apply_rotary_emb(both, *rotary).transpose(1, 2)
    if attention.tp_size > 1:
        queries, keys = (tensor_model_parallel_all_gather(each.contiguous(), dim=0) for each in (queries, keys))
    return queries, keys


def no_projector(features: Tensor) -> Tensor:
    raise MMTokError(
        "the merger of Qwen's encoder takes four patches, not one row of features",
        "this is a defect of the method: it must merge projected tokens where there is no class token",
    )
