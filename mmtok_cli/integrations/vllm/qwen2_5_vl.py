"""Qwen2.5-VL in vLLM, with vision tokens that are selected between encoder and language model.

Kept tokens keep the positions that they have in the whole image (M-RoPE), and the text after an image begins where it
begins after the whole image. The positions of text are known before the image is encoded; those of kept tokens travel
with their rows as further columns. vLLM takes them off again through its machinery for pruned videos; its runner for
CPUs leaves that step out, so that the model does it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.video_prune.evs import compute_mrope_for_media

from mmtok_cli.errors import MMTokError
from mmtok_cli.integrations.vllm.processing import ReducingProcessor, info_of
from mmtok_cli.integrations.vllm.reducing import Reducing, watched
from mmtok_cli.integrations.vllm.request import ImageRequest
from mmtok_cli.models.qwen_signals import SIGNALS, attention_signals
from mmtok_cli.tokens import Selection, VisionTokens

# The runner takes off columns of positions only where videos are pruned. At this rate no token of a video is.
NO_PRUNING = 1e-17
BASE = 256  # positions are written as two digits, which even bfloat16 holds exactly
COLUMNS = 6  # two digits each of time, row and column


class Processor(ReducingProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    family = "qwen2_5_vl"
    signals = SIGNALS

    def _arguments(self, inputs: Any) -> dict[str, Any]:
        arguments = super()._arguments(inputs)
        if "mmtok" in arguments and self.info.ctx.get_mm_config().mm_encoder_tp_mode == "data":
            raise MMTokError("images are not reduced with --mm-encoder-tp-mode data", "start the server without it")
        return arguments


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=info_of(qwen2_5_vl.Qwen2_5_VLProcessingInfo),
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class ReducingQwen2_5_VL(Reducing, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    signals = SIGNALS

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        multimodal = vllm_config.model_config.get_multimodal_config()
        if not multimodal.is_multimodal_pruning_enabled():
            multimodal.video_pruning_rate = NO_PRUNING
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.mmtok_config = vllm_config.model_config
        self._kept_places: tuple[Tensor, Tensor] | None = None

    # ---- encoding ----

    def encode_images(self, requests: Sequence[ImageRequest], signals: Sequence[str], **inputs: Any) -> Any:
        image_input = self._parse_and_validate_image_input(**inputs)
        if image_input is None or image_input["type"] != "pixel_values":
            raise MMTokError("images that come as embeddings cannot be reduced", "send pixels")
        encoder, sizes = self.visual, image_input["image_grid_thw"].tolist()
        attention = encoder.blocks[max(encoder.fullatt_block_indexes)].attn
        with (
            watched(encoder.merger.ln_q) as last,
            watched(attention.qkv, wanted=bool(signals)) as qkv,
        ):
            merged = encoder(image_input["pixel_values"], grid_thw=sizes)
        unit, metadata = encoder.spatial_merge_unit, encoder.prepare_encoder_metadata(sizes)
        order = metadata["reverse_indices"].to(merged.device)  # from the order of windows to that of the image
        counts = [t * h * w // unit for t, h, w in sizes]
        per_patch = {"features": last[0][0].flatten(0, -2)}  # what the last block gave
        if signals:
            rotary = metadata["rotary_pos_emb_cos"], metadata["rotary_pos_emb_sin"]
            queries, keys = rotated(attention, qkv[0][1], rotary)
            scale = attention.hidden_size_per_attention_head**-0.5
            per_patch |= attention_signals(queries, keys, scale, [n * unit for n in counts], signals)
        per_token = {
            name: values.unflatten(0, (-1, unit)).mean(1)[order].split(counts) for name, values in per_patch.items()
        }
        features = per_token.pop("features")
        side = encoder.spatial_merge_size
        return [
            VisionTokens(
                projected=rows,
                features=features[i],
                grid=(sizes[i][1] // side, sizes[i][2] // side),
                eligible=torch.ones(counts[i], dtype=torch.bool, device=rows.device),
                image_id=requests[i].image_id,
                project=no_projector,
                signals={name: values[i] for name, values in per_token.items()},
            )
            for i, rows in enumerate(merged.split(counts))
        ]

    def rows(self, vision: VisionTokens, selection: Selection) -> Tensor:
        rows = super().rows(vision, selection)
        line = selection.indices.clamp(min=0)
        places = torch.stack([torch.zeros_like(line), line // vision.grid[1], line % vision.grid[1]], dim=1)
        return torch.cat([rows, as_digits(places).to(rows.dtype)], dim=1)

    # ---- positions ----

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> tuple[Tensor, ...]:
        return self._with_positions(image_embeds_split, image_input["image_grid_thw"].tolist(), [1.0])

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> tuple[Tensor, ...]:
        if self.video_pruning_rate != NO_PRUNING:  # tokens are pruned, and keep their positions
            pruned = super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
            return tuple(torch.cat([v[:, :-4], as_digits(v[:, -4:-1].long()).to(v.dtype)], dim=1) for v in pruned)
        seconds = video_input["second_per_grid_ts"]
        factors = [float(each) * self.config.vision_config.tokens_per_second for each in seconds]
        return self._with_positions(video_embeds_split, video_input["video_grid_thw"].tolist(), factors)

    def _with_positions(
        self, embedded: Sequence[Tensor], sizes: Sequence[Sequence[int]], factors: Sequence[float]
    ) -> tuple[Tensor, ...]:
        """The rows of whole images or videos with their positions. factors: positions of time per frame."""
        side = self.visual.spatial_merge_size
        factors = list(factors) * (len(sizes) // len(factors))
        found = []
        for rows, size, factor in zip(embedded, sizes, factors, strict=True):
            places = compute_mrope_for_media(size, side, tokens_per_second=1.0, video_second_per_grid=factor)
            found.append(torch.cat([rows, as_digits(places[:, :3]).to(rows)], dim=1))
        return tuple(found)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, tokens] of a prompt whose images and videos have fewer placeholders than cells.

        Placeholders get the position at which their image or video begins, to which those of their cells are added when
        it is known which ones were kept.
        """
        lengths = {each.mm_position.offset: each.mm_position.length for each in mm_features}
        parts, at, position = [], 0, 0
        for offset, frames, rows, columns, factor in self.iter_mm_grid_thw(mm_features):
            parts.append(np.broadcast_to(np.arange(offset - at), (3, offset - at)) + position)
            position += offset - at
            cells = np.indices((frames, rows, columns))
            cells[0] = (cells[0] * factor).astype(np.int64)
            parts.append(np.full((3, lengths[offset]), position))
            at, position = offset + lengths[offset], position + int(cells.max()) + 1
        left = len(input_tokens) - at
        parts.append(np.broadcast_to(np.arange(left), (3, left)) + position)
        return torch.from_numpy(np.concatenate(parts, axis=1)), position + left - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Write the positions of media tokens that are about to be read, and take their columns off.

        multimodal_embeddings: rows of consecutive media tokens from `num_computed_tokens` on, of one image or video
        each, of which the first and the last may be a part only.
        """
        positions = mrope_positions.clone()
        ids = torch.as_tensor(input_ids, device=positions.device)
        media = torch.isin(ids, ids.new_tensor([self.config.image_token_id, self.config.video_token_id]))
        next_column = (media[num_computed_tokens:].nonzero().squeeze(1) + num_computed_tokens).split(
            [len(rows) for rows in multimodal_embeddings]
            + [int(media[num_computed_tokens:].sum()) - sum(len(rows) for rows in multimodal_embeddings)]
        )
        texts = (~media).nonzero().squeeze(1)
        for rows, columns in zip(multimodal_embeddings, next_column, strict=False):
            before = texts[texts < columns[0]][-1]  # the token that opens the image, just before its first placeholder
            first = positions[:, before] + 1
            positions[:, columns] = first[:, None] + from_digits(rows[:, -COLUMNS:]).T.to(positions)
        text_end = int(positions[:, texts[-1]].max()) + 1
        return [rows[:, :-COLUMNS] for rows in multimodal_embeddings], positions, text_end - len(ids)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """As in vLLM; columns of positions that the runner has not taken off are kept for `forward`."""
        rows = list(multimodal_embeddings) if multimodal_embeddings is not None else []
        if rows and is_multimodal is not None and rows[0].shape[1] > self.config.text_config.hidden_size:
            places = torch.cat([from_digits(each[:, -COLUMNS:]) for each in rows])
            self._kept_places = is_multimodal.nonzero().squeeze(1), places
            multimodal_embeddings = [each[:, :-COLUMNS] for each in rows]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._kept_places is not None:
            columns, places = self._kept_places
            self._kept_places = None
            positions = positions.clone()
            positions[:, columns.to(positions.device)] += places.T.to(positions)
        return super().forward(input_ids, positions, *args, **kwargs)


def as_digits(positions: Tensor) -> Tensor:
    """[tokens, 6] from positions [tokens, 3]: two digits for each."""
    return torch.stack([positions // BASE, positions % BASE], dim=2).flatten(1)


def from_digits(columns: Tensor) -> Tensor:
    """Positions [tokens, 3] from columns [tokens, 6]."""
    digits = columns.float().round().long().unflatten(1, (3, 2))
    return digits[..., 0] * BASE + digits[..., 1]


def rotated(attention: Any, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys [heads, patches, head dim] of the whole model. qkv: [patches, 1, 3 x dim of this process]."""
    width = attention.hidden_size_per_attention_head
    both = (
        qkv.squeeze(1).unflatten(-1, (3, -1, width))[:, :2].transpose(0, 1).contiguous()
    )  # [2, patches, heads, width]
    queries, keys = attention.apply_rotary_emb(both, *rotary).transpose(1, 2)
    if attention.tp_size > 1:
        queries, keys = (tensor_model_parallel_all_gather(each.contiguous(), dim=0) for each in (queries, keys))
    return queries, keys


def no_projector(features: Tensor) -> Tensor:
    raise MMTokError(
        "the merger of Qwen2.5-VL takes four patches, not one row of features",
        "this is a defect of the method: it must merge projected tokens where there is no class token",
    )
