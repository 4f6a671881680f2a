"""The part of a request that is processed before the model sees it: options, numbers of placeholders, cache keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import InputProcessingContext, PromptUpdateDetails

from mmtok_cli import hooks
from mmtok_cli.budget import Budget
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_plan import plan_images
from mmtok_cli.integrations.vllm.question import last_question
from mmtok_cli.integrations.vllm.request import (
    ImageRequest,
    Reduction,
    check_others,
    combined,
    require_supported,
    resolved,
    split,
)
from mmtok_cli.methods.base import Method
from mmtok_cli.models import outline
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import select, selection_tasks
from mmtok_cli.rules import Rules
from mmtok_cli.tokens import TextTokens

KEY = "mmtok"  # of the resolved request among the processor's arguments, and of the tensor beside the pixels
logger = init_logger(f"vllm.plugins.{__name__}")


class Context(InputProcessingContext):
    """A context without the plug-in's options among the server's `--mm-processor-kwargs`: the model's own processor
    does not know them.

    mmtok_defaults: those options.
    """

    def __init__(self, context: InputProcessingContext) -> None:
        config = copy(context.model_config)
        multimodal = config.multimodal_config = copy(config.get_multimodal_config())
        defaults, others = split(multimodal.mm_processor_kwargs or {})
        multimodal.mm_processor_kwargs = others or None
        super().__init__(config, context.tokenizer)
        object.__setattr__(self, "mmtok_defaults", defaults)


def info_of(factory: Callable[[InputProcessingContext], Any]) -> Callable[[InputProcessingContext], Any]:
    """The factory of a model's processing info, which is given a `Context`."""
    return lambda context: factory(Context(context))


@dataclass(frozen=True)
class Picture:
    """An image of a request: as it is, or an empty one of the same size beside the array that came in."""

    image: Image
    array: np.ndarray[Any, Any] | Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """A name that depends on the pixels alone."""
        pixels = self.image.convert("RGB").tobytes() if self.array is None else _bytes(self.array)
        return hashlib.sha256(f"{self.image.size}".encode() + pixels).hexdigest()[:16]


class ReducingProcessor:
    """Mixed into the multi-modal processor of a model.

    family: the model's in `mmtok_cli.models`.
    """

    family: str
    info: Any

    @cached_property
    def layout(self) -> VisionLanguageModel:
        """The model without its weights, which knows the tokens of an image and the chat template."""
        return outline(self.info.model_id, device="cpu", attention="sdpa")

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The largest input for which vLLM reserves memory: an image that is not reduced."""
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={"method": "full"})  # type: ignore[misc]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        try:
            arguments = self._arguments(inputs)
        except MMTokError as error:
            text = f"{error.message}: {error.hint}" if error.hint else error.message
            raise VLLMValidationError(text, parameter="mm_processor_kwargs") from error
        return super().apply(replace(inputs, hf_processor_mm_kwargs=arguments), timing_ctx)  # type: ignore[misc]

    def _arguments(self, inputs: Any) -> dict[str, Any]:
        """The processor's arguments, with the resolved request in place of the plug-in's options.

        They are a part of the hash of each image. Raises MMTokError.
        """
        asked, others = split(inputs.hf_processor_mm_kwargs)
        images = inputs.mm_data_items.get_count("image", strict=False)
        if set(others) - {"truncation"}:
            check_others(others, set().union(*self.info.supported_mm_processor_kwargs.values()))
        given = combined(self.info.ctx.mmtok_defaults, asked)
        if not given or not images:
            return others
        reduction = resolved(given, self.info.model_id, self.family, images)
        if not reduction.reduces and not reduction.pad:
            return others
        method = reduction.made()
        require_supported(reduction.method, method, self.family)
        if reduction.reduces and inputs.mm_data_items.get_count("video", strict=False):
            raise MMTokError("videos are not reduced in vLLM", 'send videos with "method": "full"')
        if not method.reads_question:
            reduction = replace(reduction, question="")
        elif not reduction.question:
            reduction = replace(reduction, question=last_question(self.layout, inputs.prompt))
        if not reduction.reduces:
            reduction = replace(reduction, image_ids=None)
        return others | {KEY: reduction.text()}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """As in vLLM. Equal images of a request with names of their own are told apart."""
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        arguments = inputs.hf_processor_mm_kwargs
        ids = Reduction.read(str(arguments[KEY])).image_ids if KEY in arguments else None
        if ids is None or len(set(ids)) == 1:
            return hashes
        return {**hashes, "image": [f"{key}-{ids.index(name)}" for key, name in zip(hashes["image"], ids, strict=True)]}

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        arguments = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        if KEY not in arguments:
            return arguments
        missing = [number for number, known in enumerate(mm_is_cached.get("image", [])) if not known]
        return {**arguments, KEY: Reduction.read(arguments[KEY]).of_images(missing).text()}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        others = {key: value for key, value in hf_kwargs.items() if key != KEY}
        images = _pictures(mm_items["image"]) if "image" in mm_items else []
        reduction = Reduction.read(str(hf_kwargs[KEY])) if KEY in hf_kwargs else None
        if reduction and reduction.pad:
            squares = [self._square(picture) for picture in images]
            mm_items = self.info.parse_mm_data({"image": squares}, validate=False)
        processed = super()._apply_hf_processor_main(mm_items, others)  # type: ignore[misc]
        if images:
            processed[KEY] = self._image_requests(images, reduction)
        return processed

    def _image_requests(self, pictures: Sequence[Picture | None], reduction: Reduction | None) -> list[Tensor]:
        """One tensor for each image, which says what is to be kept of it."""
        if reduction is None or not reduction.reduces:
            return [ImageRequest().tensor() for _ in pictures]
        method, requests = reduction.made(), []
        for number, picture in enumerate(pictures):
            if picture is None:
                raise VLLMValidationError(
                    "images that come as embeddings cannot be reduced: send pixels", parameter="mm_processor_kwargs"
                )
            image = picture.image
            budget, keep = self._kept(method, image, reduction)
            requests.append(
                ImageRequest(
                    method=reduction.method,
                    parameters=reduction.parameters,
                    track=reduction.track,
                    question=reduction.question,
                    image_id=reduction.image_ids[number] if reduction.image_ids else picture.fingerprint,
                    budget=budget,
                    keep=keep,
                    padded_from=image.size if reduction.pad else None,
                ).tensor()
            )
        return requests

    def _kept(self, method: Method, image: Image, reduction: Reduction) -> tuple[int, int]:
        """How many vision tokens the method is asked to keep of an image, and how many it will keep."""
        rules = Rules(track=reduction.track)
        budget = Budget.parse(reduction.budget) if reduction.budget else None
        vision = unencoded(self.layout, image, padded=reduction.pad)
        (plan,) = plan_images(self.layout, method, [image], budget, rules)
        if plan.short:
            logger.warning_once("%s: an image has fewer vision tokens than the budget and is not reduced", budget)
        text = TextTokens(reduction.question, _no_words)
        (plan,), (task,) = selection_tasks(method, [vision], [text], [plan], Rules(reduction.track))
        if method.exact or task.budget == vision.total:
            return task.budget, task.budget
        # A method that keeps fewer tokens than the budget decides by the shape of the image alone, or is refused.
        if method.signals or method.reads_question:
            raise VLLMValidationError(
                f"{reduction.method} does not keep as many tokens as the budget says, so that the number of "
                "placeholders is not known",
                parameter="mm_processor_kwargs",
            )
        (selection,) = select(method, [task])
        hooks.check_kept(method, selection.kept, task.budget, vision, "select")
        return task.budget, selection.kept

    def _square(self, picture: Picture | None) -> Image:
        """The image padded to a square with the mean colour, as LLaVA-1.5 was trained."""
        if picture is None or picture.array is not None:
            raise VLLMValidationError(
                '"image_aspect_ratio": "pad" needs pictures, not arrays', parameter="mm_processor_kwargs"
            )
        return self.layout.square(picture.image)  # type: ignore[attr-defined]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        others = {key: value for key, value in hf_processor_mm_kwargs.items() if key != KEY}
        return {
            **super()._get_mm_fields_config(hf_inputs, others),  # type: ignore[misc]
            KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        """Fewer placeholders for images that are reduced."""
        others = {key: value for key, value in hf_processor_mm_kwargs.items() if key != KEY}
        updates = super()._get_mm_prompt_updates(mm_items, others, out_mm_kwargs)  # type: ignore[misc]
        if KEY not in hf_processor_mm_kwargs or "image" not in updates:
            return updates
        shorter = []
        for number, of_image in enumerate(updates["image"]):
            request = ImageRequest.read(out_mm_kwargs["image"][number][KEY].data)
            if request.method:
                of_image = [update.with_content(_shortened(update.content, request.keep)) for update in of_image]
            shorter.append(of_image)
        return {**updates, "image": shorter}


def unencoded(layout: VisionLanguageModel, image: Image, *, padded: bool) -> Any:
    """The tokens of an image before it is encoded. Unless it is padded, none of LLaVA-1.5's show padding."""
    if layout.family == "llava" and not padded:
        image = PILImage.new("RGB", (1, 1))
    return layout.unencoded(image)


def _shortened(content: Any, keep: int) -> Any:
    """A replacement with the first `keep` of its placeholders."""
    ids = list(content.full)
    if len(set(ids)) != 1 or content.is_embed is not None:
        raise ValueError("the placeholders of an image are not all the same token")
    return PromptUpdateDetails.from_seq(ids[:keep])


def _pictures(items: Any) -> list[Picture | None]:
    """The pictures of image items; None for one that comes as embeddings."""
    found: list[Picture | None] = []
    for number in range(items.get_count()):
        item = items.get(number) if isinstance(items, ImageProcessorItems) else None
        if item is None:
            found.append(None)
        elif isinstance(item, Image):
            found.append(Picture(item))
        else:  # an array, of which only the size matters
            size = items.get_image_size(number)
            found.append(Picture(PILImage.new("RGB", (size.width, size.height)), item))
    return found


def _bytes(array: np.ndarray[Any, Any] | Tensor) -> bytes:
    if isinstance(array, Tensor):  # NumPy has no bfloat16
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.tobytes()


def _no_words(words: Sequence[str]) -> Tensor:
    raise MMTokError("a method read the question before the image was encoded", "it must set reads_question")
