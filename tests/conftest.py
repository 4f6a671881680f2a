"""Tiny models built from configs, and samples to ask them about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from tiny_models import FAMILIES, build_tiny_llava

from mmtok_cli.data.samples import Sample
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.llava import Llava
from mmtok_cli.timing import ceilings

# One thread, here and in the processes that tests start: tiny models gain nothing from more, and threads that share
# busy cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# No example fails, and no test, for being slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", params=["llava", "llava-eager", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def vlm(request: pytest.FixtureRequest) -> VisionLanguageModel:
    """A tiny model of every family."""
    family, _, attention = request.param.partition("-")
    return FAMILIES[family](attention or "sdpa")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave runs where they are called; that is not to be the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session", autouse=True)
def one_measurement_of_ceilings() -> Iterator[None]:
    """Every profile is shown against the ceilings of this machine, which need measuring but once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "measure_ceilings", cache(ceilings.measure_ceilings))
        yield


@pytest.fixture()
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time the clock of a stage is read, 10 ms have passed."""
    read = partial(next, count(step=0.01))
    monkeypatch.setattr("mmtok_cli.timing.clock.time", SimpleNamespace(perf_counter=read))


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def tiny(request: pytest.FixtureRequest) -> Llava:
    return FAMILIES["llava"](request.param)


@pytest.fixture(scope="session")
def tiny_sdpa() -> Llava:
    return FAMILIES["llava"]("sdpa")


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
