"""The rules under which methods are run: the two tracks, the position policy, the meaning of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mmtok_cli.errors import MMTokError

Track = Literal["released", "harmonised"]
Positions = Literal["keep", "renumber"]
TurnPolicy = Literal["reuse", "reselect", "union"]  # see conversation.py
BudgetMeaning = Literal["final", "layer-average"]


@dataclass(frozen=True)
class Rules:
    """How every method of a comparison is run.

    track: `released` runs each method as its authors released it: padding can be selected where their code allows it,
        features have the model's data type, percentages are rounded and positions kept or renumbered as in their code.
        `harmonised` applies the same rules to all methods: features in float32, no padding (as long as other tokens are
        left), percentages rounded down, and the position policy of the model's family.
    positions: `keep` leaves kept tokens at their positions in the whole prompt, `renumber` numbers them consecutively;
        None follows the track.
    budget_means: `final` counts the vision tokens after the last reduction, `layer-average` their mean over the decoder
        layers. The two differ only for methods inside the language model.
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
