"""Selection speed of the other methods: against mmtok at the same size, and of gots and scope against the loops of
their releases.

All methods take turns in every round, and ratios are those within a round. `bench_selection.py` runs this.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_inputs import human, make_features, tell, timed
from rich.table import Table
from torch import Tensor

from mmtok_cli.methods import make_method
from mmtok_cli.methods.cosine import unit_rows
from mmtok_cli.methods.coverage import greedy, self_product
from mmtok_cli.methods.pivoted_qr import pivoted_rows
from mmtok_cli.tokens import TextTokens, VisionTokens

SLOWEST = 1.5  # of mmtok's time that a method may take unless the reason stands here
REASONS = {
    "divprune": "cosines of projected tokens (4096 wide, features 1024)",
    "cdpruner": "cosines of projected tokens, and a Cholesky factor",
    "otprune": "as cdpruner, and a product of n x n matrices",
    "vispruner": "float64, and a round for every 8 tokens dropped",
    "mmtok:stack": "searches twice: for the image alone, then for both",
}
NAMES = (
    "mmtok",
    "gots",
    "scope",
    "hiprune",
    "mmtok:stack",
    "otprune",
    "visionzip",
    "vispruner",
    "divprune",
    "cdpruner",
)
SIZES = ((24, 24, 64), (24, 24, 192), (48, 60, 640))  # rows, columns, kept
SAMPLED_PICKS = 6  # of a loop whose picks all cost the same


@dataclass(frozen=True)
class Loop:
    """`kept` of `tokens`, `dim` wide, and by how much the loop of the release must take longer."""

    method: str
    tokens: int
    dim: int
    kept: int
    features: str
    demanded: float


LOOPS = (
    Loop("gots", 2880, 1280, 640, "uneven", 3),
    Loop("gots", 2880, 1280, 640, "clustered", 1.5),
    Loop("gots", 2880, 1280, 640, "iid", 0.9),
    Loop("gots", 576, 1280, 64, "clustered", 0.8),
    Loop("scope", 2880, 1024, 640, "clustered", 10),
    Loop("scope", 576, 1024, 64, "clustered", 1),
)


def released_gots(x: Tensor, k: int) -> Tensor:
    """The release's loop over rows, rebuilt from its description: all energies are updated after each pick."""
    energy, basis, along = x.square().sum(1), x.new_zeros(k, x.shape[1]), x.new_zeros(len(x), k)
    order = torch.empty(k, dtype=torch.int64)
    for step in range(k):
        pick = energy.argmax()
        residual = x[pick] - along[pick, :step] @ basis[:step]
        basis[step] = residual * energy[pick].clamp(min=1e-12).rsqrt()
        coefficients = x @ basis[step]
        along[:, step] = coefficients
        energy = energy - coefficients * coefficients
        energy[pick] = -torch.inf
        order[step] = pick
    return order


def released_scope(cosines: Tensor, saliency: Tensor, k: int) -> Tensor:
    """The release's loop: all gains at each pick."""
    cover, barred, order = torch.zeros(len(cosines), 1), torch.zeros(len(cosines)), []
    for _ in range(k):
        gains = (cosines - cover).clamp_min(0).sum(0)
        pick = (gains * saliency + barred).argmax().view(1)
        barred[pick] = -torch.inf
        cover = torch.maximum(cover, cosines.index_select(1, pick))
        order.append(pick)
    return torch.cat(order)


def sides(loop: Loop) -> tuple[Callable[[], Tensor], Callable[[], Tensor], int]:
    """The release's loop, our selection, and how many picks the former makes."""
    generator = torch.Generator().manual_seed(loop.tokens + loop.kept)
    x = make_features(loop.features, 1, loop.tokens, loop.dim, generator)[0]
    if loop.method == "gots":
        return lambda: released_gots(x, loop.kept), lambda: pivoted_rows([x], loop.kept)[0][0], loop.kept
    saliency, nothing = torch.rand(1, loop.tokens, generator=generator), torch.zeros(1, loop.tokens, dtype=torch.bool)
    cosines = self_product(unit_rows(x)).relu_()
    picks = loop.kept if loop.tokens < 1000 else SAMPLED_PICKS
    return (
        lambda: released_scope(cosines, saliency[0], picks),
        lambda: greedy(cosines[None], loop.kept, nothing, factor=saliency)[0][0],
        picks,
    )


def measure_loop(loop: Loop, rounds: int) -> dict[str, Any]:
    released, ours, picks = sides(loop)
    taken = []
    for number in range(rounds + 1):  # the first round warms up
        spent, expected = timed(released)
        own, found = timed(ours)
        taken += [(spent * loop.kept / picks, own)] if number else []
    ratio = statistics.median(a / b for a, b in taken)
    tell(f"{loop.method}, {loop.tokens} x {loop.dim}, {loop.kept}, {loop.features}: {ratio:.3g} (≥ {loop.demanded:g})")
    return {
        **asdict(loop),
        "seconds": {
            name: statistics.median(t) for name, t in zip(("released", "ours"), zip(*taken, strict=True), strict=True)
        },
        "estimated": picks < loop.kept,
        "ratio": ratio,
        "overlap": len({*expected.tolist()} & {*found[:picks].tolist()}) / picks,
        "passed": ratio >= loop.demanded,
    }


def image_of(rows: int, columns: int) -> tuple[VisionTokens, TextTokens]:
    """Clustered tokens of an image with every signal that a method reads, and a question of eight words."""
    generator, n = torch.Generator().manual_seed(rows * columns), rows * columns
    projected, features = (make_features("clustered", 1, n, dim, generator)[0] for dim in (4096, 1024))
    attention = torch.rand(16, n, generator=generator).softmax(-1)
    signals = {
        "class_attention": attention,
        "class_feature": features[0],
        "received_attention": attention.mean(0),
        "middle_attention": attention[0],
        "mean_keys": torch.randn(n, 64, generator=generator),
        "clip_image_embeds": torch.randn(n, 768, generator=generator),
        "clip_text_embeds": torch.randn(1, 768, generator=generator),
    }
    words, eligible = torch.randn(8, 4096, generator=generator), torch.ones(n, dtype=torch.bool)
    image = VisionTokens(
        projected, features, (rows, columns), eligible, "image", lambda rows: projected[: len(rows)], signals
    )
    return image, TextTokens("What is on the table?", lambda _: words)


def measure_methods(rows: int, columns: int, kept: int, rounds: int) -> list[dict[str, Any]]:
    image, text = image_of(rows, columns)
    methods = {name: make_method(name) for name in NAMES}
    taken: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        for name, method in methods.items():
            spent, _ = timed(lambda method=method: method.select(image, text, kept))
            taken[name] += [spent] if number else []
    found = []
    for name, spent in taken.items():
        ratio = statistics.median(own / base for own, base in zip(spent, taken["mmtok"], strict=True))
        tell(f"{name}, {rows * columns} tokens, {kept} kept: {ratio:.2f} times mmtok")
        found.append(
            {
                "method": name,
                "tokens": rows * columns,
                "kept": kept,
                "seconds": statistics.median(spent),
                "ratio": ratio,
                "reason": REASONS.get(name, "") if ratio > SLOWEST else "",
                "passed": ratio <= SLOWEST or name in REASONS,
            }
        )
    return found


def measure_all(rounds: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """tokens: only the sizes of so many tokens."""
    loops = [loop for loop in LOOPS if tokens in (None, loop.tokens)]
    sizes = [size for size in SIZES if tokens in (None, size[0] * size[1])]
    return {
        "loops": [measure_loop(loop, rounds or (9 if loop.tokens < 1000 else 5)) for loop in loops],
        "methods": [
            result
            for rows, columns, kept in sizes
            for result in measure_methods(rows, columns, kept, rounds or (9 if rows * columns < 1000 else 3))
        ],
    }


def tables_of(found: dict[str, Any]) -> list[Table]:
    loops = Table(title="Loops of releases, medians; ratio = released / ours (demanded)", title_justify="left")
    for name in ("method, tokens x dim, kept", "released", "ours", "ratio", "same tokens", ""):
        loops.add_column(name, justify="left" if name.startswith("method") else "right")
    for r in found["loops"]:
        about = "≈ " if r["estimated"] else ""
        loops.add_row(
            f"{r['method']}, {r['tokens']} x {r['dim']}, {r['kept']}, {r['features']}",
            f"{about}{human(r['seconds']['released'])}",
            human(r["seconds"]["ours"]),
            f"{about}{r['ratio']:.3g} (≥ {r['demanded']:g})",
            f"{r['overlap']:.1%}",
            "[green]pass[/]" if r["passed"] else "[red]FAIL[/]",
        )
    methods = Table(title=f"Whole selection; ratio = method / mmtok (≤ {SLOWEST:g})", title_justify="left")
    for name in ("method", "tokens, kept", "takes", "ratio", "", "reason"):
        methods.add_column(name, justify="right" if name in ("takes", "ratio") else "left")
    for r in found["methods"]:
        said = "[green]pass[/]" if r["passed"] and not r["reason"] else "stated" if r["passed"] else "[red]FAIL[/]"
        methods.add_row(
            r["method"], f"{r['tokens']}, {r['kept']}", human(r["seconds"]), f"{r['ratio']:.2f}", said, r["reason"]
        )
    return [loops, methods]
