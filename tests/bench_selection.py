"""Selection speed against the plain loop of the paper: `python tests/bench_selection.py [--quick] [--all]`.

The methods that are compared with mmtok, and their own plain loops, follow (see bench_methods.py).

Both sides run on the same features in alternation; the ratio is the median over the rounds. On one thread the clock
is that thread's CPU time, which other programs disturb less; on more it is the wall clock. The plain side is
rebuilt from the paper (arXiv 2508.18264, algorithm 2) in the form of the authors' release: similarities, softmax
and concatenation out of place, one image after the other, and a TorchScript loop that evaluates all tokens at every
pick (`mmtok:loop`). Where that loop takes minutes it is timed for a few picks, which all cost the same, and marked "≈".
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_methods
import psutil
import torch
from bench_inputs import human, make_features, tell, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmtok_cli.methods import coverage
from mmtok_cli.methods.plain_loop import compiled_loop, plain_matrix

LONG = 5000  # tokens from which the plain loop is extrapolated
SAMPLED_PICKS = 6

Inputs = tuple[Tensor, Tensor, Tensor]  # text, projected, features


@dataclass(frozen=True)
class Workload:
    """`images` x `tokens`, `words` in the question, `kept` per image, and the ratios demanded."""

    images: int
    tokens: int
    words: int
    kept: int
    greedy: float
    whole: float | None = None
    features: str = "clustered"
    one_buffer: bool = False  # compare with the plain loop on one preallocated buffer
    memory: float | None = None  # peak memory of the selection, in sizes of the coverage matrix


WORKLOADS = (
    Workload(1, 576, 8, 64, 2.0, 0.95),
    Workload(1, 576, 8, 192, 3.0, 1.05),
    Workload(5, 576, 8, 32, 1.1, 1.0),
    Workload(5, 576, 8, 64, 1.5, 1.1),
    Workload(5, 576, 8, 128, 1.7, 1.25),
    Workload(32, 196, 16, 20, 1.2, 1.0),
    Workload(32, 196, 16, 39, 1.2, 1.1),
    Workload(1, 1296, 16, 129, 3.4, 1.2),
    Workload(1, 1296, 16, 259, 4.2, 1.4),
    Workload(1, 2880, 8, 160, 16, 3.2),
    Workload(1, 2880, 8, 640, 25, 7.5),
    Workload(1, 2880, 8, 640, 20, features="iid"),
    Workload(1, 5000, 16, 500, 190, 33),
    Workload(1, 5000, 16, 500, 80, one_buffer=True),
    Workload(1, 5000, 16, 500, 70, features="iid"),
    Workload(1, 5000, 16, 1000, 190, 60),
    Workload(1, 6272, 16, 627, 200, 40),
    Workload(1, 16384, 16, 1638, 400, 90, memory=1.25),
)


def make_inputs(load: Workload) -> Inputs:
    generator = torch.Generator().manual_seed(load.tokens + load.kept)
    text = torch.randn(load.words, 4096, generator=generator)
    projected = make_features(load.features, load.images, load.tokens, 4096, generator)
    features = make_features(load.features, load.images, load.tokens, 1024, generator)
    return text, projected, features


def one_buffer_loop(matrix: Tensor, k: int) -> Tensor:
    best, taken = torch.zeros(matrix.shape[0], 1), torch.zeros(matrix.shape[1])
    order, buffer = [], torch.empty_like(matrix)
    for _ in range(k):
        gain = torch.sub(matrix, best, out=buffer).clamp_min_(0).sum(0).add_(taken)
        winner = gain.argmax().view(1)
        order.append(winner)
        taken.index_fill_(0, winner, -torch.inf)
        best = torch.maximum(best, matrix.index_select(1, winner))
    return torch.cat(order)


def peak_memory(load: Workload) -> float:
    """Highest resident memory of one selection above that before it, in sizes of the matrix.

    For a process of its own: memory that earlier work has freed, but not given back, would spoil the figure.
    """
    torch.set_num_threads(1)
    text, projected, features = make_inputs(load)
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    coverage.select_tokens(text, projected, features, load.kept)
    done.set()
    watcher.join()
    return peak / (4 * load.images * load.tokens * (load.words + load.tokens))


def plain_side(load: Workload, inputs: Inputs, picks: int) -> tuple[float, float, list[Tensor]]:
    """Seconds to build the matrices, seconds of the loop (scaled up from `picks` picks), and the orders."""
    text, projected, features = inputs
    nothing = torch.zeros(load.tokens, dtype=torch.bool)
    loop = one_buffer_loop if load.one_buffer else lambda matrix, k: compiled_loop()(matrix, k, nothing)[0]
    weights = {"alpha": coverage.ALPHA, "text_temperature": coverage.TEXT_TEMPERATURE}
    build_one = partial(plain_matrix, vision_temperature=coverage.VISION_TEMPERATURE, **weights)
    build, matrices = timed(lambda: list(map(build_one, [text] * load.images, projected, features)))
    greedy, orders = timed(lambda: [loop(matrix, picks) for matrix in matrices])
    return build, greedy * load.kept / picks, orders


def our_side(load: Workload, inputs: Inputs) -> tuple[float, float, Tensor]:
    """Seconds of the greedy alone, seconds of the whole selection, and the order."""
    text, projected, features = inputs
    whole, found = timed(lambda: coverage.select_tokens(text, projected, features, load.kept))
    matrix = coverage.coverage_matrix(text.unsqueeze(0), projected, features)
    nothing = torch.zeros(load.images, load.tokens, dtype=torch.bool)
    return timed(lambda: coverage.greedy(matrix, load.kept, nothing))[0], whole, found.order


def one_round(load: Workload, inputs: Inputs, picks: int) -> dict[str, float]:
    """Seconds of each part, and the share of tokens on which both sides agree."""
    build, plain_greedy, plain_orders = plain_side(load, inputs, picks)
    our_greedy, our_whole, our_orders = our_side(load, inputs)
    pairs = zip(plain_orders, our_orders, strict=True)
    same = min(len(set(plain.tolist()) & set(ours[:picks].tolist())) / picks for plain, ours in pairs)
    return {
        "plain_greedy": plain_greedy,
        "plain_whole": build + plain_greedy,
        "our_greedy": our_greedy,
        "our_whole": our_whole,
        "overlap": same,
    }


def measure(load: Workload, rounds: int, whole_loop: bool) -> dict[str, Any]:
    inputs = make_inputs(load)
    picks = load.kept if whole_loop else SAMPLED_PICKS
    one_round(load, inputs, min(picks, SAMPLED_PICKS))  # warms up
    taken = [one_round(load, inputs, picks) for _ in range(rounds)]
    greedy = statistics.median(t["plain_greedy"] / t["our_greedy"] for t in taken)
    whole = statistics.median(t["plain_whole"] / t["our_whole"] for t in taken)
    memory = None
    if load.memory is not None:
        with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
            memory = fresh_process.apply(peak_memory, (load,))
    return {
        **asdict(load),
        "seconds": {name: statistics.median(t[name] for t in taken) for name in taken[0] if name != "overlap"},
        "plain_estimated": not whole_loop,
        "rounds": rounds,
        "greedy_ratio": greedy,
        "whole_ratio": whole,
        "peak_memory": memory,
        "overlap": min(t["overlap"] for t in taken),
        "passed": greedy >= load.greedy
        and (load.whole is None or whole >= load.whole)
        and (load.memory is None or memory is None or memory <= load.memory),
    }


def table_of(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("images x tokens, words, kept", "plain greedy", "ours", "ratio", "plain whole", "ours", "ratio"):
        table.add_column(name, justify="left" if name.startswith("images") else "right")
    for name in ("same tokens", "peak memory", ""):
        table.add_column(name, justify="right")
    for r in results:
        about = "≈ " if r["plain_estimated"] else ""
        spent = r["seconds"]
        kind = ("" if r["features"] == "clustered" else ", iid") + (", one buffer" if r["one_buffer"] else "")
        table.add_row(
            f"{r['images']} x {r['tokens']}, {r['words']}, {r['kept']}{kind}",
            f"{about}{human(spent['plain_greedy'])}",
            human(spent["our_greedy"]),
            f"{about}{r['greedy_ratio']:.3g} (≥ {r['greedy']:g})",
            f"{about}{human(spent['plain_whole'])}",
            human(spent["our_whole"]),
            f"{about}{r['whole_ratio']:.3g}" + (f" (≥ {r['whole']:g})" if r["whole"] else ""),
            f"{r['overlap']:.1%}",
            f"{r['peak_memory']:.2f} (≤ {r['memory']:g})" if r["memory"] else "",
            "[green]pass[/]" if r["passed"] else "[red]FAIL[/]",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"leave out the rows from {LONG} tokens")
    parser.add_argument("--all", action="store_true", help="run every plain loop to its end (an hour)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1; the demands are for 1)")
    parser.add_argument("--tokens", type=int, help="only the rows with this many tokens")
    parser.add_argument("--rounds", type=int, help="rounds per row (default 15, and 3 from 2000 tokens)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, results = Console(width=None if sys.stdout.isatty() else 150), []
    clock = "CPU time of the thread" if args.threads == 1 else "wall clock"
    where = f"torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s), {clock}"
    for load in WORKLOADS:
        if (args.quick and load.tokens >= LONG) or (args.tokens and args.tokens != load.tokens):
            continue
        rounds = args.rounds or (15 if load.tokens < 2000 else 3)
        with torch.inference_mode():  # as the commands do
            results.append(measure(load, rounds, whole_loop=args.all or load.tokens < LONG))
        row = f"{load.images} x {load.tokens}, {load.words}, {load.kept}, {load.features}"
        tell(f"{row}: greedy {results[-1]['greedy_ratio']:.3g} (≥ {load.greedy:g})")
    console.print(table_of(results, f"Selection speed, medians; ratio = plain / ours (demanded). {where}"))
    with torch.inference_mode():
        others = bench_methods.measure_all(args.rounds, args.tokens)
    for table in bench_methods.tables_of(others):
        console.print(table)
    if args.json:
        found = {"environment": where, "results": results, **others}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(r["passed"] for r in (*results, *others["loops"], *others["methods"])) else 1


if __name__ == "__main__":
    sys.exit(main())
