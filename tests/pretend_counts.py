"""How often methods make the host wait for a GPU, and how many kernels they launch: a table, on a pretend device.

    python tests/pretend_counts.py      measure everything again, and write pretend_counts.txt

`tests/test_pretend_cuda.py` keeps the numbers from growing. Write the table again where a change lowers them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import picture
from pretend_cuda import Counts, counting, in_process, on_gpu
from test_matrix import tiny_method
from tiny_models import FAMILIES

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample, demo_samples
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import load_model
from mmtok_cli.pipeline import answer

TABLE = Path(__file__).with_suffix(".txt")
MODELS = ("demo", "llava_next", "qwen2_5_vl")
BATCHES = (1, 4)
METHODS = (
    *("full", "random", "uniform", "mmtok", "divprune", "visionzip", "vispruner", "cdpruner", "hiprune", "otprune"),
    *("scope", "gots", "mmtok:stack", "fastv", "sparsevlm", "sparsevlm:v2", "pyramiddrop", "dart", "v2drop", "pace"),
    *("random:inside", "resize:pool"),
)
NOTES = """\
# Synchronisations between host and device and kernels launched, by tests/pretend_counts.py.
#
# select: synchronisations, and launches. prefill, decode: synchronisations; 4 new tokens at most are read. demo
# keeps 64 of its 576 tokens, tiny models keep 9 of an image (LLaVA-NeXT) or a quarter (Qwen2.5-VL).
#
# Two methods wait within select: sparsevlm once, to learn how many text tokens rate the others, and mmtok:stack once
# for each image of several crops, to learn how many tokens each won.
"""
QUESTIONS = (
    "Is there a red circle in the image?",
    "What digit is on the blue square?",
    "How many stars?",
    "What?",
)
SIZES = {
    "llava_next": ((84, 84), (160, 100), (60, 90), (120, 80)),
    "qwen2_5_vl": ((168, 168), (224, 168), (140, 196), (196, 196)),
}
Row = tuple[int, int, int, int]


def model_and_samples(name: str, batch: int) -> tuple[Any, list[Sample], Budget]:
    if name == "demo":
        model = load_model("demo", device="cpu")
        return model, [sample.open() for sample in demo_samples(batch)], Budget(count=64)
    shown = [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES[name][:batch])]
    samples = [Sample((image,), QUESTIONS[i], (f"picture {i}",)) for i, image in enumerate(shown)]
    return FAMILIES[name]("sdpa"), samples, Budget(percent=25) if name == "qwen2_5_vl" else Budget(count=9)


def rows_of(name: str, batch: int, methods: tuple[str, ...]) -> dict[str, Row]:
    """The numbers of each method that suits the model, as in the table. In a process of its own, see `in_process`."""
    model, samples, budget = model_and_samples(name, batch)
    if getattr(model, "_load_tower", None):
        on_gpu(model._text_tower())
    on_gpu(model.model)
    found = {}
    for method_name in methods:
        method, counts = tiny_method(method_name), Counts()
        try:
            with counting(counts):
                given = budget if method.takes_budget else None
                answer(model, method, samples, given, max_new_tokens=4, stage=counts.stage)
        except MMTokError:
            continue  # the model has no signal that the method reads
        waits = counts.synchronisations
        found[method_name] = waits["select"], counts.launches["select"], waits["prefill"], waits["decode"]
    return found


def table() -> dict[tuple[str, int], dict[str, Row]]:
    """The numbers that are written down, by model and batch size."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for line in TABLE.read_text().splitlines():
        if line and not line.startswith(("#", "model")):
            name, batch, method, *numbers = line.split()
            waits, launches, prefill, decode = map(int, numbers)
            found.setdefault((name, int(batch)), {})[method] = waits, launches, prefill, decode
    return found


def main() -> None:
    lines = [NOTES, f"{'model':<12}{'batch':<7}{'method':<15}{'select':>7}{'launches':>10}{'prefill':>9}{'decode':>8}"]
    for name in MODELS:
        for batch in BATCHES:
            for method, (waits, launches, prefill, decode) in in_process(rows_of, name, batch, METHODS).items():
                lines.append(f"{name:<12}{batch:<7}{method:<15}{waits:>7}{launches:>10}{prefill:>9}{decode:>8}")
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
