"""The model `mmtok` of lmms-eval, and lmms-eval's tasks as datasets of `mmtok compare`.

lmms-eval finds the model by the entry point `mmtok` of the group `lmms_eval.models`:

    python -m lmms_eval --model mmtok --model_args model=llava-1.5-7b,method=mmtok,budget=64 --tasks pope

Nothing of lmms-eval is imported before it is needed.
"""

from __future__ import annotations

from typing import Any

_MODEL = f"{__name__}.model"


def __getattr__(name: str) -> Any:
    """`MANIFEST`, made when lmms-eval asks for it: its registry may be what imports this package."""
    if name != "MANIFEST":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="mmtok",
        simple_class_path=f"{_MODEL}.SimpleModel",
        chat_class_path=f"{_MODEL}.ChatModel",
    )
