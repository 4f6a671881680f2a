"""mmtok: benchmark and profile vision-token reduction in vision-language models.

The Python interface:

    import mmtok_cli as mmtok

    model = mmtok.load_model("demo")
    sample = mmtok.load_sample("photo.jpg", "What color is the car?")
    result = mmtok.answer(model, "mmtok", sample, budget=64)
    print(result.texts[0], result.seconds["prefill"])

load_model      a model by name, hub id or directory
make_method     a reduction method, with the parameters that the model's profile sets for it
load_sample     a question about one image or several, or about videos; `Sample` is its class
video_of_arrays a video of frames as an array
answer          answers to a batch of samples, with the tokens kept and the seconds of each stage
converse        answers to several questions about the same images, one after another
compare         methods measured side by side, as by `mmtok compare`: the results object
select_tokens   MMTok's selection over plain tensors, without a model
Budget, Rules   how many tokens an image keeps, and under which rules; MMTokError for all faults of the input

Names are imported when they are first used, so `import mmtok_cli` is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtok_cli.api import TimedAnswers as TimedAnswers
    from mmtok_cli.api import answer as answer
    from mmtok_cli.api import compare as compare
    from mmtok_cli.api import converse as converse
    from mmtok_cli.api import find_budgets as find_budgets
    from mmtok_cli.api import load_sample as load_sample
    from mmtok_cli.api import make_method as make_method
    from mmtok_cli.budget import Budget as Budget
    from mmtok_cli.data.samples import Sample as Sample
    from mmtok_cli.data.videos import video_of_arrays as video_of_arrays
    from mmtok_cli.errors import MMTokError as MMTokError
    from mmtok_cli.methods.coverage import select_tokens as select_tokens
    from mmtok_cli.models import load_model as load_model
    from mmtok_cli.rules import Rules as Rules

__version__ = "0.1.0"

_MODULES = {
    "Budget": "mmtok_cli.budget",
    "MMTokError": "mmtok_cli.errors",
    "Rules": "mmtok_cli.rules",
    "Sample": "mmtok_cli.data.samples",
    "TimedAnswers": "mmtok_cli.api",
    "answer": "mmtok_cli.api",
    "compare": "mmtok_cli.api",
    "converse": "mmtok_cli.api",
    "find_budgets": "mmtok_cli.api",
    "load_model": "mmtok_cli.models",
    "load_sample": "mmtok_cli.api",
    "make_method": "mmtok_cli.api",
    "select_tokens": "mmtok_cli.methods.coverage",
    "video_of_arrays": "mmtok_cli.data.videos",
}
__all__ = [
    "Budget",
    "MMTokError",
    "Rules",
    "Sample",
    "TimedAnswers",
    "__version__",
    "answer",
    "compare",
    "converse",
    "find_budgets",
    "load_model",
    "load_sample",
    "make_method",
    "select_tokens",
    "video_of_arrays",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
