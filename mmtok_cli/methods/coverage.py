"""MMTok's token selection as plain functions over tensors: no model, no tokenizer.

Vision tokens are chosen by greedy maximum coverage (MMTok, arXiv 2508.18264, algorithm 2): a few tokens
are kept so that every target, which is a text token or a vision token, has a similar token among them.

The greedy pick is exact but lazy. Adding tokens only ever shrinks the gain of the others (the objective is
submodular), so an old gain is an upper bound of the present one, and only the tokens with the largest bounds need
a fresh look. A pick then costs a few dozen rows of the coverage matrix instead of all of them.

The same picks are found in two ways, and `greedy` chooses by the number of tokens and the device:

- `greedy_lazy`, as above, keeps its bounds in NumPy on the host, whose calls have less overhead than torch's, and
  evaluates gains where the matrix lies. On a CPU from 257 tokens on. On a GPU each round waits for the device, which
  pays only from 4,096 tokens on.
- `greedy_exhaustive` evaluates all tokens at each pick, with a fixed sequence of launches and no answer from the
  device. On a CPU it is as fast for few tokens; on a GPU it is the way up to 4,095. Where Triton is installed, as it
  comes with torch for CUDA, coverage_kernel.py takes its place: a launch for each pick instead of about nine.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.errors import MMTokError
from mmtok_cli.values import mirrored, on_host, require, to_device

_Given = TypeVar("_Given", Tensor, Tensor | None)
Block: TypeAlias = npt.NDArray[np.int64]
Gains: TypeAlias = npt.NDArray[np.float32]

ALPHA = 0.5  # weight of vision-vision coverage; the paper keeps these values for all models but one
TEXT_TEMPERATURE = 0.02  # 0.01 for Qwen2.5-VL
VISION_TEMPERATURE = 0.2

_FIRST_BLOCK, _BLOCK_GROWTH, _LARGEST_BLOCK = 16, 4, 256  # tokens that the lazy greedy re-evaluates at once
_PRODUCT_BLOCK = 288  # rows of the symmetric product computed at once
_UNIT_BLOCK = 1024  # projected tokens normalised at once
_EXHAUSTIVE_BELOW_CPU = 257  # up to here a full sweep costs less than keeping bounds
EXHAUSTIVE_BELOW_GPU = 4096  # a sweep needs no answer from the device; a lazy round waits for one


@dataclass(frozen=True)
class Coverage:
    """Selected vision tokens of one image (`[k]`) or of a batch (`[b, k]`).

    Any first part of `order` is what a smaller `k` would have selected.
    """

    indices: Tensor  # ascending, int64
    order: Tensor  # as picked, int64
    gains: Tensor  # what each pick added to the covered total, float32, in the order of the picks


@torch.no_grad()
def select_tokens(
    text: Tensor | None,
    projected: Tensor,
    features: Tensor | None,
    k: int,
    *,
    alpha: float = ALPHA,
    text_temperature: float = TEXT_TEMPERATURE,
    vision_temperature: float = VISION_TEMPERATURE,
    excluded: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Coverage:
    """Select `k` vision tokens that together cover the text tokens and all vision tokens.

    Args:
        text: text-token embeddings, `[m, d]`, or `[b, m, d]` for a batch; one `[m, d]` may serve a whole batch.
            None, or no rows: only vision tokens are covered (the paper's vision-only ablation).
        projected: vision tokens behind the projector, `[n, d]` or `[b, n, d]`.
        features: the same tokens before the projector, `[n, d_vis]` or `[b, n, d_vis]`. None, or `alpha` 0: only
            text is covered.
        k: tokens to select per image.
        alpha: weight of the vision-vision coverage.
        text_temperature, vision_temperature: softmax temperatures of the two similarities.
        excluded: bool `[n]` or `[b, n]`, True for tokens never to be picked (padding). As in the released code they
            are still targets and still stand in the softmax denominators.
        text_mask: bool `[b, m]`, True for real rows of `text`, where questions of different lengths share a batch.

    Rows are scaled to unit length in the dtype in which they come, then cast to float32, as in the released code;
    cast before the call to score in full precision. Zero rows are harmless. An image is selected alike alone and in
    a batch.

    Raises:
        MMTokError: shapes do not fit, a parameter is out of range, a value is not finite, or `k` exceeds the
            tokens that are not excluded.
    """
    batched = projected.dim() == 3
    text, projected, features = _with_batch(text, 3), _with_batch(projected, 3), _with_batch(features, 3)
    excluded, text_mask = _with_batch(excluded, 2), _with_batch(text_mask, 2)
    _check_shapes(text, projected, features, excluded, text_mask)
    if excluded is None:
        excluded = mirrored(torch.zeros(projected.shape[:2], dtype=torch.bool), projected.device)
    _check_numbers(k, alpha, text_temperature, vision_temperature, excluded)
    excluded = excluded.expand(projected.shape[:2])

    options = {"alpha": alpha, "text_temperature": text_temperature, "vision_temperature": vision_temperature}
    if text is None or text_mask is None or bool(on_host(text_mask).all()):
        order, gains = greedy(_covered(text, projected, features, **options), k, excluded)
    else:
        # Images with equally long questions go together. Padding them all to one length would change the order of
        # the sums, and so, at the last digit, the picks.
        text = text.expand(len(projected), -1, -1)
        real = on_host(text_mask)
        lengths = real.sum(1)
        groups = [(lengths == length).nonzero().squeeze(1) for length in lengths.unique()]

        def matrix_of(members: Tensor) -> Tensor:
            words = real[members].nonzero()[:, 1].view(len(members), -1)
            group, words = to_device(members, projected.device), to_device(words, projected.device)
            rows = text[group].gather(1, words.unsqueeze(2).expand(-1, -1, text.shape[2]))
            vision = None if features is None else features[group]
            return _covered(rows, projected[group], vision, **options)

        images = torch.cat(groups)
        barred = excluded[to_device(images, projected.device)]
        if _on_host(projected) or projected.shape[1] >= EXHAUSTIVE_BELOW_GPU:
            parts = zip(groups, barred.split([len(members) for members in groups]), strict=True)
            found = [greedy(matrix_of(members), k, part) for members, part in parts]
        else:
            found = [_greedy_together([matrix_of(members) for members in groups], k, barred)]
        back = to_device(images.argsort(), projected.device)
        order, gains = (torch.cat(parts)[back] for parts in zip(*found, strict=True))
    if not batched:
        order, gains = order[0], gains[0]
    return Coverage(indices=order.sort().values, order=order, gains=gains)


def _covered(text: Tensor | None, projected: Tensor, features: Tensor | None, **options: float) -> Tensor:
    """`coverage_matrix`, whose values must be finite."""
    matrix = coverage_matrix(text, projected, features, **options)
    if matrix.shape[2] == 0:
        raise MMTokError("there is nothing to cover", "give text tokens, or features with alpha above 0")
    # Every entry of a row has been through a softmax over all tokens: one row shows whatever is wrong with any.
    error = MMTokError("text, projected or features hold NaN or infinity", "score in a wider dtype")
    require(matrix[:, :1].isfinite().all(), error)
    return matrix


def _greedy_together(matrices: Sequence[Tensor], k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """One search for images of different targets: matrices of some images each, excluded and the results of all."""
    runs = [(len(matrix), matrix.shape[2]) for matrix in matrices]
    widest = max(targets for _, targets in runs)
    padded = torch.cat([pad(matrix, (0, widest - matrix.shape[2])) for matrix in matrices])
    return greedy(padded, k, excluded, runs=runs)


def greedy(
    matrix: Tensor,
    k: int,
    excluded: Tensor,
    factor: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    runs: Sequence[tuple[int, int]] = (),
) -> tuple[Tensor, Tensor]:
    """Greedy maximum coverage in the form that is faster for the size and the device: order and gains, `[b, k]` each.

    Arguments and results as in `greedy_lazy`. runs: of images that have fewer targets, padded by zeros, where every
    token is evaluated: how many follow one another, and their targets. A gain is the sum over those alone.
    """
    exhaustive_below = _EXHAUSTIVE_BELOW_CPU if _on_host(matrix) else EXHAUSTIVE_BELOW_GPU
    if matrix.shape[1] >= exhaustive_below:
        return greedy_lazy(matrix, k, excluded, factor, bonus)[:2]
    by_kernel = _kernel(matrix.device) if matrix.is_cuda and matrix.dtype == torch.float32 else None
    if by_kernel:  # which sums tile by tile: zeros at the end do not change a sum
        return by_kernel(matrix, k, excluded, factor, bonus)
    return greedy_exhaustive(matrix, k, excluded, factor, bonus, runs=runs)


@cache
def _kernel(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`greedy_in_kernel` where torch was built for CUDA, Triton is installed and the kernel gives the right picks."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    matrix = torch.arange(2 * 40 * 30, dtype=torch.float32).mul_(7).fmod_(31).view(2, 40, 30).to(device)
    excluded = torch.zeros(2, 40, dtype=torch.bool, device=device)
    try:
        from mmtok_cli.methods.coverage_kernel import greedy_in_kernel

        found, _ = greedy_in_kernel(matrix, 10, excluded)
        problem = "" if torch.equal(found, greedy_exhaustive(matrix, 10, excluded)[0]) else "its picks are wrong"
    except Exception as error:  # Triton's own, those of its compiler and of the driver
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(f"the Triton kernel does not run here, selection takes longer: {problem}", stacklevel=2)
        return None
    return greedy_in_kernel


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def coverage_matrix(
    text: Tensor | None,
    projected: Tensor,
    features: Tensor | None,
    *,
    alpha: float = ALPHA,
    text_temperature: float = TEXT_TEMPERATURE,
    vision_temperature: float = VISION_TEMPERATURE,
) -> Tensor:
    """How well each vision token covers each target: `[b, n, m + n]` float32, one row per token.

    A target's similarities to all n tokens go through a softmax (the paper's calibration), so it runs down a
    column. The m text targets weigh 1 / m each, the n vision targets alpha / n each. Shapes as in `select_tokens`,
    with the batch axis; without vision targets (`features` None or `alpha` 0) the result is `[b, n, m]`.
    """
    batch, n, _ = projected.shape
    m = 0 if text is None else text.shape[1]
    of_text = torch.empty(batch, m, n, dtype=torch.float32, device=projected.device)
    if text is not None and m:
        words = released_unit_rows(text).expand(batch, -1, -1)
        for image in range(batch):  # one product per image: batched kernels round differently
            for start in range(0, n, _UNIT_BLOCK):  # a unit-length copy of all would be a quarter of the matrix
                block = slice(start, start + _UNIT_BLOCK)
                torch.mm(words[image], released_unit_rows(projected[image, block]).T, out=of_text[image, :, block])
        of_text = (of_text / text_temperature).softmax(-1) / m
    if features is None or alpha == 0:
        return of_text.mT.contiguous()

    matrix = torch.empty(batch, n, m + n, dtype=torch.float32, device=projected.device)
    matrix[..., :m] = of_text.mT
    vision = matrix[..., m:]  # from here on everything happens in place: at 16384 tokens this is a gigabyte
    for image in range(batch):
        self_product(released_unit_rows(features[image]), out=vision[image])
    # Self-similarity is 1, so subtracting it keeps the exponentials in range. The matrix is still symmetric here:
    # its row sums, which lie contiguous, are the denominators of the columns.
    vision.sub_(1).div_(vision_temperature).exp_()
    denominators = vision.sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
    vision.mul_((alpha / denominators / n).unsqueeze(1))
    return matrix


def greedy_lazy(
    matrix: Tensor, k: int, excluded: Tensor, factor: Tensor | None = None, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Greedy maximum coverage (paper, algorithm 2), re-evaluating only tokens that may be the best.

    Args:
        matrix: `[b, n, targets]`, not negative.
        k: picks; at most the number of tokens of each image that are not excluded.
        excluded: bool `[b, n]`.
        factor, bonus: `[b, n]`, a prior of each token: its gain is multiplied by the one, which must not be negative,
            and the other is added. Gains still only shrink.

    Returns:
        order `[b, k]`, gains `[b, k]` with the prior, and how many gains were evaluated in all. Order and gains equal
        those of `greedy_exhaustive` to the bit: every gain is summed afresh, and the lowest index wins a tie.
    """
    lazy = LazyGains(matrix, excluded, factor, bonus)
    order: list[Block] = [np.empty((len(matrix), 0), np.int64)]
    gains: list[Gains] = [np.empty((len(matrix), 0), lazy.bound.dtype)]
    for _ in range(k):
        gain, winner = lazy.best()
        lazy.take(winner)
        order.append(winner)
        gains.append(gain)
    found, added = (torch.from_numpy(np.concatenate(x, 1)).to(matrix.device) for x in (order, gains))
    return found, added, lazy.evaluated


class LazyGains:
    """What tokens would add to the present coverage, evaluated only for those that may be the best.

    Arguments as in `greedy_lazy`. cover: `[b, 1, targets]`, how well each target is covered. bound: `[b, n]`, at least
    what each token would add. evaluated: how many gains were computed in all.

    Sums are torch's on every device, so that gains equal those of `greedy_exhaustive`.
    """

    def __init__(
        self, matrix: Tensor, excluded: Tensor, factor: Tensor | None = None, bonus: Tensor | None = None
    ) -> None:
        self.batch, self.tokens, targets = matrix.shape
        self.rows = matrix.view(self.batch * self.tokens, targets)
        self.first_row = np.arange(0, len(self.rows), self.tokens)[:, None]
        self.buffer = matrix.new_empty(self.batch * min(_LARGEST_BLOCK, self.tokens), targets)
        self.sums = matrix.new_empty(len(self.buffer))
        self.cover = matrix.new_zeros(self.batch, 1, targets)
        self.prior = [x if x is None else x.cpu().numpy().reshape(-1) for x in (factor, bonus)]
        self.bound = _with_prior(matrix.sum(-1), factor, bonus).masked_fill_(excluded, -torch.inf).cpu().numpy()
        self.bound_of_row = self.bound.reshape(-1)  # the same memory
        self.evaluated, self.evaluated_at = 0, np.zeros(len(self.rows), np.int64)
        self.on_host = _on_host(matrix)
        if self.on_host:
            self.host_rows, self.host_cover = self.rows.numpy(), self.cover.numpy()
        # Views of the buffers by the number of rows: to make one costs as much as to sum a few rows.
        self.views: dict[int, tuple[Tensor, Tensor, Tensor, Gains | None, Gains | None]] = {}

    def best(self) -> tuple[Gains, Block]:
        """The largest gain of each image and its token, `[b, 1]` each: the lowest index on ties."""
        size = min(_FIRST_BLOCK, self.tokens)
        block = self._largest(size)
        while True:
            rows = (block + self.first_row).reshape(-1)
            # Bounds only go down, so picked and excluded tokens stay at minus infinity.
            self.bound_of_row[rows] = np.minimum(self.bound_of_row[rows], self.gains(rows))
            self.evaluated_at[rows] = self.evaluated
            winner = self.bound.argmax(1)[:, None]
            row = winner + self.first_row
            # The winner must itself be fresh. Comparing its gain with the next bound instead would let a token with
            # a higher index win a tie.
            if min(self.evaluated_at[row].ravel().tolist()) == self.evaluated:
                return self.bound_of_row[row], winner
            size = min(_BLOCK_GROWTH * size, _LARGEST_BLOCK, self.tokens)
            block = self._largest(size)
            block[:, -1:] = winner  # among more ties than a block holds, it might be left out for ever

    def _largest(self, size: int) -> Block:
        """The tokens of the largest bounds of each image, in any order: `[b, size]`."""
        return self.bound.argpartition(self.tokens - size, axis=1)[:, self.tokens - size :]

    def gains(self, rows: Block) -> Gains:
        """What tokens, given by their rows, equally many of each image, would add. Valid until the next call."""
        chosen, by_image, sums, host_chosen, host_sums = self.views.get(len(rows)) or self._view(len(rows))
        if host_chosen is not None:
            # index_select takes twice as long for few rows; modes other than clip copy the output.
            self.host_rows.take(rows, axis=0, out=host_chosen, mode="clip")
        else:
            torch.index_select(self.rows, 0, torch.from_numpy(rows).to(self.rows.device), out=chosen)
        torch.sum(by_image.sub_(self.cover).relu_(), -1, out=sums)
        fresh = sums.cpu().numpy().reshape(-1) if host_sums is None else host_sums
        self.evaluated += len(rows)
        factor, bonus = self.prior
        if factor is not None:
            fresh *= factor[rows]
        if bonus is not None:
            fresh += bonus[rows]
        return fresh

    def _view(self, count: int) -> tuple[Tensor, Tensor, Tensor, Gains | None, Gains | None]:
        """Views of the buffers for `count` rows: rows, rows by image, sums by image; rows and sums for NumPy."""
        chosen, sums = self.buffer[:count], self.sums[:count]
        host = (chosen.numpy(), sums.numpy()) if self.on_host else (None, None)
        self.views[count] = (chosen, chosen.view(self.batch, -1, chosen.shape[1]), sums.view(self.batch, -1), *host)
        return self.views[count]

    def take(self, winner: Block) -> None:
        """Cover what the tokens `[b, 1]` cover, and never offer them again."""
        row = winner + self.first_row
        self.bound_of_row[row] = -np.inf
        if self.on_host:
            np.maximum(self.host_cover, self.host_rows.take(row, axis=0), out=self.host_cover)
        else:
            taken = self.rows[torch.from_numpy(row).to(self.rows.device)]
            torch.maximum(self.cover, taken, out=self.cover)


def greedy_exhaustive(
    matrix: Tensor,
    k: int,
    excluded: Tensor,
    factor: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    runs: Sequence[tuple[int, int]] = (),
) -> tuple[Tensor, Tensor]:
    """Greedy maximum coverage that evaluates every token at every pick; arguments and results as in `greedy`.

    It never waits for the device, and for few tokens it beats the lazy form.
    """
    best = torch.zeros_like(matrix[:, :1])
    buffer = torch.empty_like(matrix)
    barred = torch.zeros_like(matrix[..., 0]).masked_fill_(excluded, -torch.inf)
    order, gains = [], []
    added = [buffer]  # by images of equally many targets, since the order of a sum depends on its length
    if runs:
        counts, targets = zip(*runs, strict=True)
        added = [part[..., :own] for part, own in zip(buffer.split(counts), targets, strict=True)]
    for _ in range(k):
        torch.sub(matrix, best, out=buffer).relu_()
        sums = [part.sum(-1) for part in added]
        gains_now = _with_prior(sums[0] if len(sums) == 1 else torch.cat(sums), factor, bonus)
        gain, winner = gains_now.add_(barred).max(1, keepdim=True)
        order.append(winner)
        gains.append(gain)
        barred.scatter_(1, winner, -torch.inf)
        best = torch.maximum(best, matrix.gather(1, winner.unsqueeze(-1).expand_as(best)))
    return _joined(order, matrix, torch.int64), _joined(gains, matrix, matrix.dtype)


def _with_prior(gains: Tensor, factor: Tensor | None, bonus: Tensor | None) -> Tensor:
    gains = gains if factor is None else gains.mul_(factor)
    return gains if bonus is None else gains.add_(bonus)


def _joined(picks: list[Tensor], matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat(picks, 1) if picks else torch.empty(len(matrix), 0, dtype=dtype, device=matrix.device)


def released_unit_rows(x: Tensor) -> Tensor:
    """Unit-length rows as the released code makes them: in the stored dtype, length floored at 1e-8, then float32."""
    length = x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    # The floor is 0 in float16, where zero rows would become NaN.
    return (x / length.where(length > 0, 1)).float()


def self_product(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ x.T`, into `out` if given. It is symmetric, so the part below the blocks on the diagonal is copied."""
    n = len(x)
    out = x.new_empty(n, n) if out is None else out
    for start in range(0, n, _PRODUCT_BLOCK):
        stop = min(start + _PRODUCT_BLOCK, n)
        torch.mm(x[start:stop], x[start:].T, out=out[start:stop, start:])
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def _with_batch(x: _Given, dim: int) -> _Given:
    return x.unsqueeze(0) if x is not None and x.dim() == dim - 1 else x


def _check_shapes(
    text: Tensor | None, projected: Tensor, features: Tensor | None, excluded: Tensor | None, text_mask: Tensor | None
) -> None:
    """All arguments carry the batch axis here."""
    fits = projected.dim() == 3 and len(projected) > 0
    if fits:
        batch, n, d = projected.shape
        if text is not None:
            fits &= text.dim() == 3 and len(text) in (1, batch) and text.shape[2] == d
            fits &= text_mask is None or (text_mask.dtype == torch.bool and text_mask.shape == (batch, text.shape[1]))
        fits &= features is None or (features.dim() == 3 and features.shape[:2] == (batch, n))
        fits &= excluded is None or (excluded.dtype == torch.bool and excluded.shape in ((1, n), (batch, n)))
    if not fits:
        given = {
            "text": text,
            "projected": projected,
            "features": features,
            "excluded": excluded,
            "text_mask": text_mask,
        }
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items() if x is not None)
        raise MMTokError(
            f"the shapes do not fit together: {shapes}",
            "text [b, m, d], projected [b, n, d], features [b, n, d_vis], bool masks excluded [b, n], text_mask [b, m]",
        )


def _check_numbers(k: int, alpha: float, text_temperature: float, vision_temperature: float, excluded: Tensor) -> None:
    if not (alpha >= 0 and text_temperature > 0 and vision_temperature > 0):
        raise MMTokError(
            f"alpha {alpha}, temperatures {text_temperature} (text), {vision_temperature} (vision): out of range",
            "alpha must not be negative, and the temperatures must be positive",
        )
    eligible = int((~on_host(excluded)).sum(1).min())
    if not 0 <= k <= eligible:
        raise MMTokError(
            f"cannot keep {k} vision tokens: {eligible} of {excluded.shape[1]} are eligible",
            f"choose a number from 0 to {eligible}",
        )
