"""Ways of the greedy on a GPU: `python tests/bench_gpu.py [--rounds 50]`, or `make bench-gpu`.

torch's form, the same captured in a CUDA graph, the Triton kernel, and the kernel captured in a graph, on one matrix of
each size, in turns within each round. Times are medians of CUDA events; ratios are those within a round. Fails where a
form picks other tokens than torch's, or is not to be had.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from bench_inputs import human, make_features
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmtok_cli.methods.coverage import coverage_matrix, greedy_exhaustive

SIZES = ((1, 576, 64), (5, 576, 64), (1, 1296, 129), (1, 2880, 320))  # images, tokens, kept
Picks = tuple[Tensor, Tensor]


def captured(form: Callable[[], Picks]) -> Callable[[], Picks]:
    """The launches of a form, recorded once and then launched together."""
    form()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = form()

    def replay() -> Picks:
        graph.replay()
        return found

    return replay


def seconds(form: Callable[[], Picks]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    form()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    from mmtok_cli.methods.coverage_kernel import greedy_in_kernel

    table = Table(title=f"Greedy, {torch.cuda.get_device_name()}; ratio = torch / form", title_justify="left")
    for name in ("images x tokens, kept", "form", "takes", "ratio", "same picks"):
        table.add_column(name)
    right = True
    for images, tokens, kept in SIZES:
        generator = torch.Generator().manual_seed(tokens + kept)
        text = torch.randn(1, 8, 4096, generator=generator)
        projected, features = (make_features("clustered", images, tokens, dim, generator) for dim in (4096, 1024))
        matrix = coverage_matrix(text.cuda(), projected.cuda(), features.cuda())
        nothing = torch.zeros(images, tokens, dtype=torch.bool, device="cuda")

        def by_torch(matrix: Tensor = matrix, nothing: Tensor = nothing, kept: int = kept) -> Picks:
            return greedy_exhaustive(matrix, kept, nothing)

        def by_kernel(matrix: Tensor = matrix, nothing: Tensor = nothing, kept: int = kept) -> Picks:
            return greedy_in_kernel(matrix, kept, nothing)

        with torch.inference_mode():
            forms = {
                "torch": by_torch,
                "torch, graph": captured(by_torch),
                "kernel": by_kernel,
                "kernel, graph": captured(by_kernel),
            }
            picks = {name: form()[0].clone() for name, form in forms.items()}
            taken = [{name: seconds(form) for name, form in forms.items()} for _ in range(rounds)]
        for name in forms:
            same = torch.equal(picks[name], picks["torch"])
            right &= same
            ratio = statistics.median(each["torch"] / each[name] for each in taken)
            spent = human(statistics.median(each[name] for each in taken))
            table.add_row(f"{images} x {tokens}, {kept}", name, spent, f"{ratio:.2f}", "yes" if same else "NO")
    Console().print(table)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
