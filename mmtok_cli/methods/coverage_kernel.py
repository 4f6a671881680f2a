"""The exhaustive step of greedy maximum coverage as one Triton kernel: one launch for a pick of all images of a batch.

Each program owns `ROWS` tokens of one image. A grid has no barrier, so a launch ends each pick: a program leaves the
best of its tokens, and all programs of the next launch find the winner among them before they go on. What one launch
writes and others of the same launch still read has two places, which take turns.

Import this only where Triton is installed. Its interpreter (TRITON_INTERPRET=1) runs the kernel on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16, 128  # rows and targets of the matrix that a program holds at once


@triton.jit(do_not_specialize=["pick", "n", "targets", "parts", "k"])  # type: ignore[untyped-decorator]
def _pick(  # type: ignore[no-untyped-def]
    matrix, alive, cover, gain_of_part, token_of_part, factor, bonus, order, gains,
    pick, n, targets, parts, k,
    WITH_FACTOR: tl.constexpr, WITH_BONUS: tl.constexpr,
    ROWS: tl.constexpr, TARGETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Settle pick `pick - 1` from what the last launch left, and evaluate the tokens for pick `pick`."""
    image, part, images = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    matrix += image.to(tl.int64) * n * targets
    old, new = (pick + 1) % 2, pick % 2

    # The winner is the lowest token of the largest gain, as parts hold tokens in order.
    every = tl.arange(0, PARTS)
    left = (old * images + image) * parts + every
    present = every < tl.where(pick > 0, parts, 0)
    left_gains = tl.load(gain_of_part + left, mask=present, other=float("-inf"))
    left_tokens = tl.load(token_of_part + left, mask=present, other=n)
    gain = tl.max(left_gains, 0)
    winner = tl.min(tl.where(left_gains == gain, left_tokens, n), 0)
    if pick > 0:  # noqa: SIM102
        if part == 0:  # not `and`, which Triton takes for one of bits
            tl.store(order + image * k + pick - 1, winner.to(tl.int64))
            tl.store(gains + image * k + pick - 1, gain)

    if pick < k:
        rows = part * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        free = (tl.load(alive + image * n + rows, mask=inside, other=0) != 0) & (rows != winner)
        tl.store(alive + image * n + rows, free.to(tl.int8), mask=inside)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, targets, TARGETS):
            columns = start + tl.arange(0, TARGETS)
            real = columns < targets
            begun = columns < tl.where(pick > 0, targets, 0)
            covered = tl.load(cover + (old * images + image) * targets + columns, mask=begun, other=0.0)
            taken = tl.load(matrix + winner * targets + columns, mask=begun, other=0.0)
            covered = tl.maximum(covered, taken)
            if part == 0:
                tl.store(cover + (new * images + image) * targets + columns, covered, mask=real)
            values = tl.load(
                matrix + rows[:, None] * targets + columns[None, :], mask=inside[:, None] & real[None, :], other=0.0
            )
            total += tl.sum(tl.maximum(values - covered[None, :], 0.0), 1)
        if WITH_FACTOR:
            total *= tl.load(factor + image * n + rows, mask=inside, other=0.0)
        if WITH_BONUS:
            total += tl.load(bonus + image * n + rows, mask=inside, other=0.0)
        total = tl.where(free, total, float("-inf"))
        best = tl.max(total, 0)
        here = (new * images + image) * parts + part
        tl.store(gain_of_part + here, best)
        tl.store(token_of_part + here, tl.min(tl.where(total == best, rows, n), 0))


def greedy_in_kernel(
    matrix: Tensor,
    k: int,
    excluded: Tensor,
    factor: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    tile: tuple[int, int] = TILE,
) -> tuple[Tensor, Tensor]:
    """Greedy maximum coverage in k + 1 launches; arguments and results as in `greedy_exhaustive`.

    matrix: float32, contiguous. tile: rows and targets that a program holds at once, powers of two. Gains are summed in
    another order than torch's: tokens whose gains differ in the last digit alone may be picked in another order. Equal
    tokens have equal gains, and the lowest index wins.
    """
    batch, n, targets = matrix.shape
    parts = triton.cdiv(n, tile[0])
    alive = (~excluded).to(torch.int8).contiguous()
    cover = matrix.new_empty(2, batch, targets)
    gain_of_part = matrix.new_empty(2, batch, parts)
    token_of_part = torch.empty(2, batch, parts, dtype=torch.int32, device=matrix.device)
    order = torch.empty(batch, k, dtype=torch.int64, device=matrix.device)
    gains = matrix.new_empty(batch, k)
    priors = [matrix if x is None else x.contiguous() for x in (factor, bonus)]  # not read where there is none
    for pick in range(k + 1 if k else 0):
        _pick[(batch, parts if pick < k else 1)](
            matrix, alive, cover, gain_of_part, token_of_part, *priors, order, gains,
            pick, n, targets, parts, k,
            WITH_FACTOR=factor is not None, WITH_BONUS=bonus is not None,
            enable_fp_fusion=False, ROWS=tile[0], TARGETS=tile[1], PARTS=max(256, triton.next_power_of_2(parts)),
        )  # fmt: skip
    return order, gains
