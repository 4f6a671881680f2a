"""The rules under which methods are run: the two tracks, the position policy, the meaning of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mmtok_cli.errors import MMTokError

Track = Literal["released", "harmonised"]
Positions = Literal["keep", "renumber"]
BudgetMeaning = Literal["final", "layer-average"]


@dataclass(frozen=True)
class Rules:
    """How every method of a comparison is run.

    track: `released` runs each method as its authors released it: padding competes for the budget where it does in
        their code, features reach the method in the model's data type, shares of an image's tokens are rounded and
        positions kept or renumbered as they do it. `harmonised` gives all methods the same: features in float32,
        padding never kept (as long as anything else is left), shares rounded down, and the position policy of the
        model's family.
    positions: `keep` leaves kept tokens at the positions they had in the whole prompt, `renumber` closes the gaps; None
        follows the track.
    budget_means: `final` counts the vision tokens that leave the last reduction, `layer-average` their mean over the
        decoder layers. The two differ for methods inside the language model alone.
    """

    track: Track = "released"
    positions: Positions | None = None
    budget_means: BudgetMeaning = "final"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("track", self.track, get_args(Track)),
            ("position policy", self.positions, (None, *get_args(Positions))),
            ("meaning of a budget", self.budget_means, get_args(BudgetMeaning)),
        ):
            if value not in allowed:
                raise MMTokError(f"there is no {name} {value!r}", f"choose {' or '.join(a for a in allowed if a)}")
