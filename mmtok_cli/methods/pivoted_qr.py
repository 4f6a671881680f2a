"""Greedy QR with row pivoting: rows picked one by one, each the one that those before explain least.

Each pick costs one product of all rows with a new direction. Residual energies only shrink, so an energy that leaves
out the latest directions is an upper bound, and only rows whose bound reaches the best energy need a fresh one. Those
are few, and the others catch up with many directions at once, in matrix products instead of matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import ranked_from, stacked
from mmtok_cli.methods.cosine import aligned_empty
from mmtok_cli.values import on_host, require

NEGLIGIBLE = 1e-6  # of the largest squared norm: residual energies below are rounding noise
_LAZY_FROM = 2048  # rows from which bounds pay on a CPU; on a GPU each look at them would wait for the device

_ADMITTED = 64  # rows that become near at once
_NEAR, _KEPT = 512, 128  # most near rows, and how many of them stay when they are too many
_DIRECTIONS = 64  # after which far rows catch up
_CHUNK = 256  # far rows that catch up in one product
_SWEEP = 8  # picks with all rows, after energies have fallen so fast that bounds are of no use


@torch.no_grad()
def pivoted_rows(features: Sequence[Tensor], k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick `k` rows of each image, each time the one of largest residual energy: its squared length outside the span of
    the picks.

    As many picks as the rows have directions equal the pivots of `scipy.linalg.qr(features.T, pivoting=True)`. Once no
    residual energy reaches 1e-6 of the largest squared norm, what is left is rounding noise: the others follow by
    descending norm. The lowest index wins a tie, and no row comes twice.

    Args:
        features: [n, d] of each image; computed in float32.
        k: rows to pick.
        excluded: bool [images, n], True for rows never to be picked.

    Returns:
        order [images, k], the picks, and energies [images, k], the residual energy of each when it was picked, 0 where
        it is noise. Any first part is what a smaller `k` gives.

    Raises:
        MMTokError: fewer than `k` rows are left, or a value is not finite.
    """
    x = [rows.float() for rows in features]
    norms = stacked([rows.square().sum(1) for rows in x])
    images, n = norms.shape
    eligible = n if excluded is None else int((~on_host(excluded)).sum(1).min())
    if not 0 <= k <= eligible:
        raise MMTokError(f"cannot keep {k} vision tokens: {eligible} of {n} are eligible")
    if not k:
        return torch.empty(images, 0, dtype=torch.int64, device=norms.device), norms.new_empty(images, 0)
    lazy = n >= _LAZY_FROM and norms.device.type == "cpu"
    finite, error = norms.isfinite().all(), MMTokError("features hold NaN or infinity", "score in a wider dtype")
    if lazy and not bool(finite):  # a search that would not end
        raise error
    require(finite, error)
    if excluded is not None:
        norms = norms.masked_fill(excluded, -torch.inf)
    floor = NEGLIGIBLE * norms.amax(1, keepdim=True)
    order, energies = _lazily(x, norms, k, floor) if lazy else _sweep(x, norms, k, floor)
    noise = ((energies < floor) | (energies <= 0)).cumsum(1) > 0
    return ranked_from(noise, order, norms), energies.masked_fill(noise, 0)


def _lazily(x: Sequence[Tensor], norms: Tensor, k: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The picks of `_sweep` for each image; the first that is noise is repeated."""
    found = [_Lazy(rows, own, k).picks(float(least)) for rows, own, least in zip(x, norms, floor, strict=True)]
    order = torch.stack([torch.cat([picks, picks[-1:].expand(k - len(picks))]) for picks, _ in found])
    return order, torch.stack([pad(energies, (0, k - len(energies))) for _, energies in found])


def _sweep(x: Sequence[Tensor], norms: Tensor, k: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """`k` picks with the energies of all rows updated each time; nothing waits for the device."""
    energy, images = norms.clone(), len(x)
    basis, along = (aligned_empty(norms, images, k, width) for width in (x[0].shape[1], norms.shape[1]))
    each = [*zip(x, basis, along, strict=True)]
    order, energies = [], []
    least = floor.clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(k):
        best, pick = energy.max(1, keepdim=True)
        lengths = best.clamp(min=least).rsqrt()
        for image, (rows, directions, shares) in enumerate(each):  # batched products round differently
            own, direction = pick[image], directions[step]
            row = rows.index_select(0, own).squeeze(0)
            if step:
                row.addmv_(directions[:step].T, shares[:step].index_select(1, own).squeeze(1), alpha=-1)
            torch.mul(row, lengths[image], out=direction)
            torch.mv(rows, direction, out=shares[step])
        latest = along[:, step]
        energy.addcmul_(latest, latest, value=-1).scatter_(1, pick, -torch.inf)
        order.append(pick)
        energies.append(best)
    return torch.cat(order, 1), torch.cat(energies, 1)


class _Lazy:
    """The picks of `_sweep`, with energies that are exact for near rows alone and upper bounds for all others.

    bound: [n], of all rows; far: the same without near and picked rows, which are minus infinity. known: [n], how many
    directions a far row's bound accounts for. rows, energy, near: of the near rows, in their slots; slot: [n], the
    slot of each near row, -1 for others.
    """

    def __init__(self, x: Tensor, norms: Tensor, k: int) -> None:
        room = min(len(x), _NEAR + _ADMITTED)
        self.x, self.bound, self.far = x, norms.clone(), norms.clone()
        self.known = torch.zeros(len(x), dtype=torch.int64)
        self.rows, self.energy = x.new_empty(room, x.shape[1]), x.new_empty(room)
        self.near, self.slot = torch.zeros(room, dtype=torch.int64), torch.full((len(x),), -1)
        self.numbers = torch.arange(max(k, room))
        self.gathered = x.new_empty(_CHUNK, x.shape[1])
        self.basis = x.new_zeros(k, x.shape[1])
        self.count = self.step = self.caught_up = 0  # near rows; directions; directions when far rows caught up
        self.top = float(norms.max())  # the best energy then

    def picks(self, floor: float) -> tuple[Tensor, Tensor]:
        """Order and energies of the picks up to the first one whose energy is below `floor`, or 0."""
        order: list[int] = []
        energies: list[float] = []
        sweeping = 0
        while self.step < len(self.basis):
            if sweeping:
                row, energy = self._swept()
                sweeping -= 1
                if not sweeping:
                    self._end_sweep()
            else:
                began = self.caught_up
                row, energy = self._picked()
                if self.caught_up > began and self.caught_up - began < _SWEEP // 2:
                    sweeping = _SWEEP
                    self._begin_sweep()
            order.append(row)
            energies.append(energy)
            if energy < floor or energy <= 0:
                break
        return torch.tensor(order), torch.tensor(energies)

    def _picked(self) -> tuple[int, float]:
        if self.step - self.caught_up >= _DIRECTIONS:
            self._catch_up()
        row = int(self.bound.argmax())
        while (slot := int(self.slot[row])) < 0:
            if self.count > _NEAR and self.caught_up < self.step:
                self._catch_up()
            else:
                self._admit(row)
            row = int(self.bound.argmax())
        best = float(self.energy[slot])
        self._add_direction(self.rows[slot], best)
        near, energy = self.near[: self.count], self.energy[: self.count]
        along = self.rows[: self.count] @ self.basis[self.step - 1]
        energy.addcmul_(along, along, value=-1)
        self.energy[slot] = -torch.inf
        self.bound.index_copy_(0, near, energy)
        return row, best

    def _add_direction(self, row: Tensor, energy: float) -> None:
        """Add what a row of this residual energy has outside of the earlier directions, to length 1."""
        basis, new = self.basis[: self.step], self.basis[self.step]
        if energy > 0:
            torch.addmv(row, basis.T, basis @ row, alpha=-1, out=new).mul_(energy**-0.5)
        self.step += 1

    def _admit(self, row: int) -> None:
        """Make the rows of the highest bounds near, `row` among them."""
        if self.count + _ADMITTED > len(self.rows):
            self._release(_KEPT)
        number = min(_ADMITTED, len(self.rows) - self.count)
        block = self.far.topk(number, sorted=False).indices
        if not bool((block == row).any()):  # more ties than a block holds
            block[-1] = row
        slots = slice(self.count, self.count + number)
        torch.index_select(self.x, 0, block, out=self.rows[slots])
        self.energy[slots] = self._fresh(block, self.rows[slots])
        self.near[slots] = block
        self.bound[block] = self.energy[slots]
        self.far[block] = -torch.inf
        self.slot[block] = self.numbers[slots]
        self.count += number

    def _fresh(self, block: Tensor, rows: Tensor) -> Tensor:
        """Exact energies of far rows. block: their numbers; rows: [rows, d], themselves."""
        known = self.known[block]
        first = int(known.min())
        if first == self.step:
            return self.far[block]
        along = rows @ self.basis[first : self.step].T
        if int(known.max()) > first:
            along.masked_fill_(self.numbers[first : self.step] < known[:, None], 0)
        return self.far[block] - along.square_().sum(1)

    def _catch_up(self) -> None:
        """Bring the bounds of far rows up to date, unless they are so low that this can wait, and release near rows."""
        best = float(self.bound.max())
        lowest = best - 2 * max(self.top - best, 0.0)  # of those that may be needed soon, if energies go on falling
        self._release(_KEPT)
        stale = ((self.far >= lowest) & (self.known < self.step)).nonzero().squeeze(1)
        self._refresh(stale)
        self.top, self.caught_up = best, self.step

    def _refresh(self, stale: Tensor) -> None:
        if not len(stale):
            return
        stale = stale[self.known[stale].argsort(stable=True)]  # rows that lack the same directions side by side
        fresh = [
            self._fresh(block, torch.index_select(self.x, 0, block, out=self.gathered[: len(block)]))
            for block in stale.split(_CHUNK)
        ]
        self.far[stale] = self.bound[stale] = torch.cat(fresh)
        self.known[stale] = self.step

    def _release(self, keep: int) -> None:
        """Make near rows far again, but for those of the highest energies."""
        at = self.energy[: self.count].topk(min(keep, self.count), sorted=False).indices
        leaving = torch.ones(self.count, dtype=torch.bool).index_fill_(0, at, False)
        rows, energy = self.near[: self.count][leaving], self.energy[: self.count][leaving]
        self.slot[self.near[: self.count]] = -1
        self.far[rows], self.known[rows] = energy, self.step
        self.count = len(at)
        here = slice(self.count)
        self.rows[here], self.energy[here], self.near[here] = self.rows[at], self.energy[at], self.near[at]
        self.slot[self.near[here]] = self.numbers[here]

    def _begin_sweep(self) -> None:
        """Make all energies exact."""
        self._release(0)
        self._refresh(((self.far > -torch.inf) & (self.known < self.step)).nonzero().squeeze(1))

    def _swept(self) -> tuple[int, float]:
        """A pick for which, and after which, the energies of all rows are exact."""
        row = int(self.bound.argmax())
        best = float(self.bound[row])
        self._add_direction(self.x[row], best)
        along = self.x @ self.basis[self.step - 1]
        self.bound.addcmul_(along, along, value=-1)
        self.bound[row] = -torch.inf
        return row, best

    def _end_sweep(self) -> None:
        self.far.copy_(self.bound)
        self.known.fill_(self.step)
        self.top, self.caught_up = float(self.bound.max()), self.step
