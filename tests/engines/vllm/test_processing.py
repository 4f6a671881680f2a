"""What happens to a request before any model sees it. No engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.plugins import load_general_plugins

import mmtok_cli
from mmtok_cli.data.samples import demo_samples
from mmtok_cli.integrations.vllm.processing import KEY
from mmtok_cli.integrations.vllm.qwen import QwenReducing
from mmtok_cli.integrations.vllm.request import ImageRequest

DEMO = Path(mmtok_cli.__file__).parent / "demo" / "weights"
RANDOM = {"method": "random", "budget": 16}


def processor(**defaults: Any) -> Any:
    """The multi-modal processor of a server that was started with these `--mm-processor-kwargs`."""
    load_general_plugins()
    config = ModelConfig(str(DEMO), dtype="float32", max_model_len=2048, mm_processor_kwargs=defaults or None)
    return MULTIMODAL_REGISTRY.create_processor(config)


def processed(of: Any, images: list[Any], asked: dict[str, Any]) -> tuple[list[ImageRequest], list[str]]:
    """What the model is told of each image, and the hash of each."""
    ids = of.info.get_tokenizer().encode(f"USER: {'<image>' * len(images)}\nIs it red? ASSISTANT:")
    inputs = ProcessorInputs(ids, of.info.parse_mm_data({"image": images}), hf_processor_mm_kwargs=asked)
    found = of.apply(inputs, TimingContext(enabled=False))
    told = [ImageRequest.read(item[KEY].data) for item in found["mm_kwargs"]["image"]]
    return told, found["mm_hashes"]["image"]


def test_equal_images_with_names_of_their_own_are_told_apart() -> None:
    """vLLM encodes images of one hash once, and methods that draw draw by name."""
    one, other = (sample.images[0] for sample in demo_samples(2))
    told, hashes = processed(processor(), [one, one.copy(), one, other], RANDOM | {"image_ids": ["a", "b", "a", "b"]})
    assert [request.image_id for request in told] == ["a", "b", "a", "b"]
    assert hashes[0] == hashes[2] and len(set(hashes)) == 3
    _, hashes = processed(processor(), [one, one.copy()], RANDOM)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("asked", [RANDOM, {}], ids=["random", "full"])
def test_arrays_of_any_type(asked: dict[str, Any]) -> None:
    pixels = np.array(demo_samples(1)[0].images[0])
    names = set()
    for array in (pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1).bfloat16()):
        (told,), _ = processed(processor(), [array], asked)
        assert told.method == asked.get("method", "")
        names.add(told.image_id)
    assert len(names) == (2 if asked else 1)


def test_parameters_in_the_defaults_of_a_server_leave_other_requests_alone() -> None:
    of = processor(method="mmtok", budget=16, set=["mmtok.alpha=0.25"])
    images = list(demo_samples(1)[0].images)
    (told,), _ = processed(of, images, {})
    assert told.parameters is not None and (told.keep, told.parameters["alpha"]) == (16, 0.25)
    assert processed(of, images, {"method": "random"})[0][0].method == "random"
    assert processed(of, images, {"method": "full"})[0][0].method == ""
    with pytest.raises(VLLMValidationError, match="has no effect"):
        processed(of, images, {"method": "random", "set": ["mmtok.alpha=0.5"]})


def test_positions_of_kept_tokens_are_written_where_cuda_graphs_read_them() -> None:
    class Whole:
        def __init__(self, **_: Any) -> None:
            """Nothing is loaded."""

        def forward(self, input_ids: Any, positions: torch.Tensor) -> torch.Tensor:
            return positions

    class Model(QwenReducing, Whole):
        """Only what adds the positions."""

    model, buffer = Model(vllm_config=None), torch.full((3, 8), 5)
    model._kept_places = torch.tensor([1, 3]), torch.tensor([[0, 2], [1, 4]])
    model.forward(None, buffer[:, :4])
    assert buffer[:, :4].tolist() == [[5, 5, 5, 5], [5, 5, 5, 6], [5, 7, 5, 9]]
    model.forward(None, buffer[:, :4])  # the next step has no kept tokens
    assert buffer[2, :4].tolist() == [5, 7, 5, 9]
