"""Inputs and outputs recorded from the authors' published code: where they lie and how to read them.

They are looked for in the directory that MMTOK_GOLDEN names, else in shared/golden beside the checkout, else among
the small copies in tests/golden. Tests take whatever cases they find there; none is known by name.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmtok_cli.data.samples import Sample
from mmtok_cli.models import load_model
from mmtok_cli.models.base import VisionLanguageModel

_TESTS = Path(__file__).parent
_BESIDE = _TESTS.parents[1] / "shared" / "golden"


def golden_directory(method: str) -> Path:
    """The directory of one method's cases. If MMTOK_GOLDEN is set there is no second choice."""
    if "MMTOK_GOLDEN" in os.environ:
        return Path(os.environ["MMTOK_GOLDEN"]).expanduser() / method
    return next((d for d in (_BESIDE / method, _TESTS / "golden" / method) if d.is_dir()), _BESIDE / method)


def golden_json(method: str, name: str) -> Any:
    """A JSON file beside the cases, or None where there is none."""
    path = golden_directory(method) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def golden_cases(method: str, *kinds: str) -> list[Any]:
    """All cases of a method (of these kinds, if any are given) as pytest parameters with readable names."""
    cases = (golden_json(method, "cases.json") or {"cases": []})["cases"]
    return [
        pytest.param(c, id=f"{c['name']}-{c.get('kind', method)}") for c in cases if not kinds or c["kind"] in kinds
    ]


def golden_items(method: str, name: str) -> list[Any]:
    """The `items` of a JSON file as pytest parameters."""
    return [
        pytest.param(item, id=str(i)) for i, item in enumerate((golden_json(method, name) or {"items": []})["items"])
    ]


def golden_tensors(method: str, case: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs and `expected_*` tensors of one case."""
    return load_file(golden_directory(method) / case["file"])


@lru_cache(maxsize=4)
def golden_model(method: str, name: str, attention: str) -> VisionLanguageModel:
    """A model that lies beside the cases, as users load theirs."""
    directory = (golden_directory(method) / name).resolve()
    return load_model(str(directory), device="cpu", dtype="float32", attention=attention)


def golden_sample(method: str, case: dict[str, Any]) -> Sample:
    """The pictures of a case and its question."""
    names = tuple(case["images"] if "images" in case else [case["image"]])
    pictures = [Image.open(golden_directory(method) / "images" / name).convert("RGB") for name in names]
    return Sample(tuple(pictures), case["question"], names)


def require_cases(method: str) -> None:
    """Fail where MMTOK_GOLDEN is set and holds no case of the method; called by one test of every golden file."""
    found = len(golden_cases(method))
    if not found and "MMTOK_GOLDEN" in os.environ:
        pytest.fail(f"MMTOK_GOLDEN is set, but {golden_directory(method)} holds no case")
    if not found:
        pytest.skip(f"no golden cases of {method}")
