"""Budgets: how many vision tokens an image keeps, as a count or as a share of what it has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from mmtok_cli.errors import MMTokError


class UnmetBudgetError(MMTokError):
    """A budget that an image cannot meet. nearest: the number of vision tokens that it can keep instead."""

    def __init__(self, message: str, hint: str, nearest: int) -> None:
        super().__init__(message, hint)
        self.nearest = nearest


@dataclass(frozen=True)
class Budget:
    """Vision tokens kept per image: `count`, or `percent` of the image's tokens (exactly one of the two)."""

    count: int | None = None
    percent: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """Read "64" or "10%". Raises MMTokError for anything that is not a positive budget."""
        text = text.strip()
        hint = "give the number of vision tokens to keep, as in 64, or a share of them, as in 10%"
        if re.fullmatch(r"[0-9]{1,9}", text) and int(text) > 0:
            return Budget(count=int(text))
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?\s*%", text) and 0 < float(text.rstrip("% ")) <= 100:
            return Budget(percent=float(text.rstrip("% ")))
        if re.fullmatch(r"0+(\.0+)?\s*%?", text):
            raise MMTokError("a budget of 0 keeps no vision token", "use --method none for that")
        raise MMTokError(f"{text!r} is not a budget", hint)

    def resolve(self, total: int, count: Callable[[float, int], int] | None = None) -> int:
        """Tokens to keep of `total`.

        count: how many tokens a share, 0.1 for 10 %, of `total` is; None rounds down (see `Method.count`).

        Raises UnmetBudgetError when `total` is less than the budget, or the share comes to less than one token.
        """
        if self.count is not None:
            if self.count > total:
                raise UnmetBudgetError(
                    f"the budget of {self.count} is more than the {total} vision tokens of the image",
                    f"choose 1 to {total}, or a share such as 10%",
                    nearest=total,
                )
            return self.count
        percent = self.percent or 0.0
        kept = math.floor(total * percent / 100) if count is None else count(percent / 100, total)
        if kept < 1:
            raise UnmetBudgetError(
                f"{self} of {total} vision tokens is less than one",
                f"choose at least {math.ceil(10000 / total) / 100:g}%, or a number of tokens",
                nearest=1,
            )
        return kept

    @property
    def engine_settings(self) -> dict[str, float]:
        """A share as settings of serving engines that say how much is removed: vLLM's `video_pruning_rate`, a share,
        and OpenVINO's `pruning_ratio`, a percentage. A count has no equivalent; then there are none."""
        if self.percent is None:
            return {}
        removed = round(100 - self.percent, 10)
        return {"vllm.video_pruning_rate": round(removed / 100, 12), "openvino.pruning_ratio": removed}

    def __str__(self) -> str:
        return str(self.count) if self.count is not None else f"{self.percent:.12g}%"


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a sample: vision tokens of its images before reduction, after the last reduction and on average over
    the decoder layers; and text tokens.

    short: the budget is not met: fewer are kept, since an image has no more tokens, or no more that may be kept; or
    more, since a video cannot be made smaller.
    encoded: vision tokens of each image as it was encoded; empty where all were encoded at their own size.
    """

    total: int
    kept: int
    text: int
    layer_average: float
    short: bool = False
    encoded: tuple[int, ...] = ()


def parse_budgets(text: str) -> list[Budget]:
    """Read a comma-separated list of budgets; repeats are dropped."""
    budgets = [Budget.parse(part) for part in text.split(",")]
    return list(dict.fromkeys(budgets))


def rectangle(budget: int, grid: tuple[int, int], aspect: float) -> tuple[int, int]:
    """The (rows, columns) with exactly `budget` cells, within `grid`, that distort the image least.

    aspect: the image's height over its width; beyond 2:1 it counts as 2:1. A side may be stretched against the other
    by a factor of two at most, so 64, 128 and 192 of 24x24 tokens exist (8x8, 8x16, 12x16 for a square image) and
    prime numbers mostly do not. Ties go to the squarer shape.

    Raises UnmetBudgetError naming the nearest budgets that can be met; its `nearest` is the next lower one.
    """
    best = _best_rectangle(budget, grid, aspect)
    if best is None:
        rows, columns = grid
        feasible = [n for n in range(1, rows * columns + 1) if _best_rectangle(n, grid, aspect)]
        below = max((n for n in feasible if n < budget), default=None)
        above = min((n for n in feasible if n > budget), default=None)
        nearest = [n for n in (below, above) if n is not None]
        raise UnmetBudgetError(
            f"no rectangle of {budget} tokens fits into {rows}x{columns} without distorting the image more than 2:1",
            f"the nearest budgets that resizing can meet exactly are {' or '.join(map(str, nearest))}",
            nearest=nearest[0],
        )
    return best


def _best_rectangle(budget: int, grid: tuple[int, int], aspect: float) -> tuple[int, int] | None:
    rows, columns = grid
    wanted = min(max(aspect, 0.5), 2.0)
    shapes = [(h, budget // h) for h in range(1, rows + 1) if budget % h == 0 and budget // h <= columns]
    distortions = {(h, w): abs(math.log(h / w / wanted)) for h, w in shapes}
    allowed = [shape for shape, distortion in distortions.items() if distortion <= math.log(2) + 1e-9]
    return min(allowed, key=lambda s: (round(distortions[s], 9), abs(math.log(s[0] / s[1]))), default=None)
