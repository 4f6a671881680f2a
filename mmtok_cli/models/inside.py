"""Reduction inside the language model: hooks on the decoder layers that drop or merge vision tokens.

Layers after a cut see a shorter sequence and cache no more than that, so the KV cache becomes ragged. Nothing of the
model is changed, and no attention matrix is built: what a method reads of the attention is computed for its few
queries alone, or summed up a few rows at a time. What a layer was called with is held only where a cut asks for it.
Where layers lie on several devices, a cut is made on the device of the layer behind it. Written for decoder layers such
as those of transformers' Llama, Mistral and Qwen. Layers of linear attention among them read the shorter sequence as
well, and keep a state that has no length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.attention_rows import attention_rows, keys_at, mean_attention, rotary_response
from mmtok_cli.models.sequences import CutImage, ImageTokens, LayerSequence, Row, causal_mask, gather_slots, step_mask
from mmtok_cli.rules import Positions
from mmtok_cli.stages import CHECK
from mmtok_cli.tokens import Cut, LayerTokens, Selection
from mmtok_cli.values import deferred, on_host, to_device


class Inside:
    """Context within which a prompt's images are cut down between decoder layers.

    It serves forward passes, greedy decoding, sampling and beams of one prompt, padded on the left, without gradients.
    Every forward pass with an empty cache is a prefill and chooses tokens; without a cache, so does every step, from
    the attention of the last generated token. Kept tokens stay at their positions (`keep`), or each shorter sequence is
    renumbered and decoding continues from its end (`renumber`). Further text, such as the next question of a
    conversation, may be read after the prompt in one piece. On exit the hooks are removed. A cache that was filled
    in this context must be decoded in it.

    selections: after a prefill, for each image which of the tokens that entered went through the last layer.

    Raises MMTokError for padding on the right, a cache other than the default one, and a prompt read in pieces.
    """

    def __init__(
        self,
        language_model: Any,
        attention_mask: Tensor,
        images: Sequence[CutImage],
        positions: Positions,
        stage: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.selections: list[Selection] = []
        self._model = language_model
        self._layers = hf.decoder_layers(language_model)
        self._attends = [hf.mixes_by_attention(layer) for layer in self._layers]
        self._attention = self._layers[self._attends.index(True)]  # one layer of it; all rotate in the same way
        self._images = images
        self._positions = positions
        self._stage = stage
        shown = on_host(attention_mask)
        self._lengths: list[int] = shown.sum(1).tolist()
        self._width = shown.shape[1]
        if not bool((shown.diff(dim=1) >= 0).all()):
            raise MMTokError(
                "methods inside the language model need prompts that are padded on the left",
                "set the tokenizer's padding_side to left",
            )
        self._cut_layers = {cut.before for image in images for cut in image.cuts}
        self._held = _held_until(cut for image in images for cut in image.cuts)
        self._handles: list[Any] = []
        self._prefilled = 0  # tokens of the last prefill's rows, padding included
        self._cached = 0  # tokens in the cache after the last forward pass
        self._reached: LayerSequence | None = None  # at the layer that a prefill has come to
        self._behind: dict[int, LayerSequence] = {}  # after the cut before each layer
        self._read: dict[int, Tensor] = {}  # what the layers that are read from were called with
        self._generated = 0  # tokens after the prompt at a step of decoding, and the arguments of that step
        self._step: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Inside:
        if self._handles:
            raise RuntimeError("this context is open already")
        layers = list(self._layers)
        if len(layers) in self._cut_layers:
            layers.append(hf.final_norm(self._model))  # a cut after the last layer is made before the final norm
        for index, layer in enumerate(layers):
            enter = partial(self._enter_layer, index, hf.device_of(layer))
            self._handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._read.clear()

    def _enter_layer(
        self, index: int, device: torch.device, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """device: of the layer. What the previous layer left on another one is moved only after this hook."""
        # The final norm is called with hidden states alone.
        call = hf.LayerCall.read(args, kwargs) if index < len(self._layers) else None
        hidden = hf.hidden_of(args, kwargs).to(device)
        if index == 0 and call:
            self._begin(call)
        if self._reached is None:
            return args, kwargs | self._step_arguments(index, call, device) if call else kwargs
        now = self._reached = self._reached.to(device)
        if call and not self._behind and self._attends[index]:  # the masks of linear attention have another form
            mask = None if call.mask is None else call.mask.to(device)
            now = self._reached = replace(now, mask=mask, mask_dtype=mask_dtype_of(mask))
        if index in self._cut_layers:
            with self._stage("select"):
                hidden, now = self._cut(index, now, hidden, call.cache if call else None)
            if index == max(self._cut_layers):  # nothing reads the images any more
                now = replace(now, rows=[])
            self._reached = now
            self._behind[index] = replace(now, mask=None, rows=[])  # decoding builds its own mask
        if self._held.get(index, index) > index:
            self._read[index] = hidden
        if self._behind and call:
            mask = now.mask if self._attends[index] else hf.linear_mask(now.live)
            kwargs = kwargs | hf.layer_arguments(mask, now.position_ids, now.rotary)
        return hf.with_hidden(args, kwargs, hidden)

    def _begin(self, call: hf.LayerCall) -> None:
        """Distinguish a prefill from a step of decoding, and refuse anything else."""
        hidden, cache = call.hidden, call.cache
        if cache is not None and not hf.is_plain_cache(cache):
            raise MMTokError(
                f"methods inside the language model cannot use a {type(cache).__name__}, since their layers cache "
                "different lengths",
                "use the default cache, without cache_implementation or a sliding window",
            )
        cached = 0 if cache is None else hf.cached_tokens(cache)
        batch, width, _ = hidden.shape
        fits = width == self._width or (cache is None and width > self._width)
        if cached == 0 and fits and batch % len(self._lengths) == 0:
            self._behind.clear()
            self._prefilled = width
            self._reached = self._start(call)
        elif 0 < self._prefilled <= cached and (width == 1 or cached == self._cached):
            self._reached = None
            self._generated = cached + width - self._prefilled
            self._step.clear()
        else:
            raise MMTokError(
                f"{batch} x {width} tokens were read after {cached} cached ones, but the reduced prompt has "
                f"{len(self._lengths)} x {self._width}: methods inside the language model need the "
                "prompt in one piece and decode token by token",
                "leave prefill_chunk_size, assistant models and caches of other prompts out",
            )
        self._cached = cached + width

    def _start(self, call: hf.LayerCall) -> LayerSequence:
        """The sequence before any cut. Beams repeat rows; without a cache, generated tokens follow the prompt."""
        hidden = call.hidden
        batch, width, _ = hidden.shape
        copies = batch // len(self._lengths)
        rows = []
        for number in range(batch):
            prompt = self._lengths[number // copies]
            row = Row(
                length=prompt + width - self._width,
                images=tuple(
                    ImageTokens(
                        plan=plan,
                        start=plan.start - (self._width - prompt),
                        places=torch.arange(len(plan.eligible), device=hidden.device),
                        eligible=plan.eligible.to(hidden.device),
                        merged=torch.zeros(len(plan.eligible), dtype=torch.bool, device=hidden.device),
                    )
                    for plan in self._images
                    if plan.row == number // copies
                ),
            )
            rows.append(row)
        if any(image.plan.asks for row in rows for image in row.images):
            with self._stage("select"):
                rows = self._with_queries(rows, hidden)
        if self._positions == "renumber" and call.position_ids is None:
            raise MMTokError("the positions of this model cannot be renumbered", "use --positions keep")
        return LayerSequence(
            rows=rows,
            width=width,
            live=None,
            removed=torch.zeros(batch, dtype=torch.long, device=hidden.device),
            mask=call.mask,
            mask_dtype=mask_dtype_of(call.mask),
            position_ids=call.position_ids,
            rotary=call.rotary,
        )

    def _with_queries(self, rows: Sequence[Row], hidden: Tensor) -> list[Row]:
        """The rows with what their images ask for. hidden: [batch, width, dim], as it enters the first layer."""
        found: dict[tuple[int, int], Tensor] = {}
        with deferred() as settle:
            for number, row in enumerate(rows):
                own = hidden[number, hidden.shape[1] - row.length :]
                for place, image in enumerate(row.images):
                    if not image.plan.asks:
                        continue
                    text = row.text_behind(image, own)
                    if not len(text):
                        raise MMTokError(
                            f"no text follows {image.plan.image_id}, so there is no text whose attention could be read",
                            "put the question after the image, or use a method that acts before the language model",
                        )
                    found[number, place] = image.plan.queries(own[image.start : image.end], text, self._stage)
            with self._stage(CHECK):
                settle()
        masks = {key: queries for key, queries in found.items() if queries.dtype == torch.bool}
        if masks:
            read = torch.cat(list(masks.values())).cpu().split([len(mask) for mask in masks.values()])
            for key, mask in zip(masks, read, strict=True):
                found[key] = to_device(mask.nonzero().squeeze(1), hidden.device)

        def asking(number: int, row: Row) -> Row:
            images = (replace(image, queries=found.get((number, place))) for place, image in enumerate(row.images))
            return replace(row, images=tuple(images))

        return [asking(number, row) for number, row in enumerate(rows)]

    def _cut(self, layer: int, now: LayerSequence, hidden: Tensor, cache: Any) -> tuple[Tensor, LayerSequence]:
        """Make the cuts before a layer: the hidden states that remain, [batch, shorter width, dim], and their frame."""
        batch = hidden.shape[0]
        rows, slots, states = [], [], []
        places = torch.arange(now.width, device=hidden.device)
        for number, row in enumerate(now.rows):
            offset = now.width - row.length
            shorter, kept, row_states = self._cut_row(
                layer, now, number, hidden[number, offset:], places[offset:], cache
            )
            rows.append(shorter)
            slots.append(kept)
            states.append(row_states)
        lengths = [row.length for row in rows]
        width = max(lengths)
        index = torch.stack([s if len(s) == width else pad(s, (width - len(s), 0)) for s in slots])
        live = None
        if min(lengths) < width:
            missing = torch.tensor([width - length for length in lengths])
            live = to_device(torch.arange(width) >= missing[:, None], hidden.device)
        needed = {read: states for read, states in self._read.items() if self._held[read] > layer}
        self._read = {read: gather_slots(states, index.to(states.device)) for read, states in needed.items()}
        position_ids, rotary = now.position_ids, now.rotary
        removed = [row.length - length for row, length in zip(now.rows, lengths, strict=True)]
        remaining = torch.stack([s if len(s) == width else pad(s, (0, 0, width - len(s), 0)) for s in states])
        if self._positions == "keep":
            rotary = (gather_slots(rotary[0], index), gather_slots(rotary[1], index))
            if position_ids is not None:
                position_ids = position_ids.expand(batch, -1).gather(1, index)
        else:
            numbers = torch.arange(width) - (width - torch.tensor(lengths))[:, None]
            position_ids = to_device(numbers.clamp(min=0), hidden.device)
            rotary = hf.rotary_embedding(self._model, remaining, position_ids, hidden.device)
        copies = batch // len(self._lengths)
        images = {id(image.plan): image for row in rows[::copies] for image in row.images}
        left = [images[id(plan)] for plan in self._images]
        self.selections = [
            Selection(image.places.to(plan.eligible.device), merged=image.merged.to(plan.eligible.device))
            for plan, image in zip(self._images, left, strict=True)
        ]
        return remaining, LayerSequence(
            rows=rows,
            width=width,
            live=live,
            removed=now.removed + to_device(torch.tensor(removed), hidden.device),
            mask=causal_mask(width, live, now.mask_dtype, hidden.device),
            mask_dtype=now.mask_dtype,
            position_ids=position_ids,
            rotary=rotary,
        )

    def _cut_row(
        self, layer: int, now: LayerSequence, number: int, hidden: Tensor, slots: Tensor, cache: Any
    ) -> tuple[Row, Tensor, Tensor]:
        """Cut the images of one row: the row, its slots among the [length] of before, and its states."""
        row = now.rows[number]
        images, kept_slots, kept_states = [], [], []
        end = length = 0
        for image in row.images:
            cut = next((cut for cut in image.plan.cuts if cut.before == layer), None)
            kept_slots.append(slots[end : image.start])
            kept_states.append(hidden[end : image.start])
            length += image.start - end
            if cut is None:
                images.append(replace(image, start=length))
                kept_slots.append(slots[image.start : image.end])
                kept_states.append(hidden[image.start : image.end])
            else:
                tokens = self._tokens(cut, now, image, number, hidden, cache)
                own = slots[image.start : image.end]
                chosen = image.plan.choose(tokens, cut, self._stage)
                merged = image.merged[chosen.indices]
                images.append(
                    replace(
                        image,
                        start=length,
                        places=image.places[chosen.indices],
                        eligible=image.eligible[chosen.indices],
                        merged=merged if chosen.merged is None else merged | chosen.merged,
                    )
                )
                kept_slots.append(own[chosen.indices])
                kept_states.append(tokens.hidden[chosen.indices] if chosen.tokens is None else chosen.tokens.to(hidden))
            length += len(images[-1].places)
            end = image.end
        row = Row(length + row.length - end, tuple(images))
        return row, torch.cat([*kept_slots, slots[end:]]), torch.cat([*kept_states, hidden[end:]])

    def _tokens(
        self, cut: Cut, now: LayerSequence, image: ImageTokens, number: int, hidden: Tensor, cache: Any
    ) -> LayerTokens:
        """What the method sees of an image at a cut. hidden: [length, dim], the live tokens of its row."""
        row, device = now.rows[number], hidden.device
        offset = now.width - row.length
        live = torch.arange(row.length, device=device)
        text, places = row.text_behind(image, live), live[image.start : image.end]
        queries = text[:0] if image.queries is None else text[image.queries]
        cos, sin = (part.expand(len(now.rows), -1, -1)[number, offset:] for part in now.rotary)
        earlier = {read: self._read[read][number, offset:] for read in cut.earlier}
        attention, keys = None, None
        if cut.reads is not None:
            layer, seen, cached = self._layers[cut.reads], hidden, None
            if cut.reads < cut.before:
                seen = self._read[cut.reads][number, offset:]
                cached = None if cache is None else hf.cached_keys(cache, cut.reads)[number, :, offset:]
            there = seen.device  # where the layer's weights are
            rotary = cos.to(there), sin.to(there)
            if cut.rows == "queries":
                attention = attention_rows(layer, seen, rotary, queries.to(there), cached)[
                    :, :, image.start : image.end
                ]
            elif cut.rows == "mean":
                attention = mean_attention(layer, seen, rotary, cached)[:, None, image.start : image.end]
            attention = None if attention is None else attention.to(device)
            read_keys = partial(keys_at, layer, seen, rotary, places.to(there), text.to(there), cached)

            def keys() -> tuple[Tensor, Tensor]:
                of_image, of_text = read_keys()
                return of_image.to(device), of_text.to(device)

        return LayerTokens(
            hidden=hidden[image.start : image.end],
            attention=attention,
            rotary_response=partial(rotary_response, self._attention, (cos, sin), queries, places),
            eligible=image.eligible,
            image_id=image.plan.image_id,
            earlier={read: states[image.start : image.end].to(device) for read, states in earlier.items()},
            text=lambda: row.text_behind(image, hidden),
            keys=keys,
            norm=partial(hf.normed, self._model),
            vision=None if image.plan.vision is None else image.plan.vision.to(device),
            places=image.places if image.plan.entered is None else image.plan.entered.to(device)[image.places],
        )

    def _step_arguments(self, index: int, call: hf.LayerCall, device: torch.device) -> dict[str, Any]:
        """What a layer is called with at a step of decoding, where that differs from what the model would pass."""
        behind = max((layer for layer in self._behind if layer <= index), default=None)
        if behind is None or not self._attends[index]:  # the state of linear attention has no length
            return {}
        if behind not in self._step:
            sequence = self._behind[behind].to(device)
            position_ids, rotary = call.position_ids, call.rotary
            mask = step_mask(sequence, call.hidden.shape[1], self._generated, device)
            if self._positions == "renumber" and position_ids is not None:
                position_ids = position_ids.to(device) - sequence.removed[:, None]
                rotary = hf.rotary_embedding(self._model, call.hidden, position_ids, device)
            self._step[behind] = hf.layer_arguments(mask, position_ids, rotary)
        return self._step[behind]


def mask_dtype_of(mask: Tensor | None) -> torch.dtype:
    """See `LayerSequence`."""
    return torch.bool if mask is None else mask.dtype


def _held_until(cuts: Iterable[Cut]) -> dict[int, int]:
    """The layers whose input a cut is made from, and the last layer that comes before such a cut."""
    held: dict[int, int] = {}
    for cut in cuts:
        for layer in (*cut.earlier, *(() if cut.reads is None else (cut.reads,))):
            held[layer] = max(held.get(layer, 0), cut.before)
    return held
