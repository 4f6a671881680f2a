"""The rules under which methods are run: the two tracks, the position policy, the meaning of a budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from mmtok_cli.errors import MMTokError

Track = Literal["released", "harmonised"]
Positions = Literal["keep", "renumber"]
TurnPolicy = Literal["reuse", "reselect", "union"]  # see conversation.py
BudgetMeaning = Literal["final", "layer-average"]
BudgetArea = Literal["image", "frame"]
AUTO: Literal["auto"] = "auto"
ImageScale = float | Literal["auto"]  # a factor on both sides of an image; see image_scale.py

NATIVE = "native"  # resolution of images as the model's processor has it
FIXED = "fixed:"  # begins a resolution that is the same for all images, in vision tokens
FEWEST_FIXED, MOST_FIXED = 4, 65_536  # vision tokens


def require_scale(scale: object) -> ImageScale:
    """The scale of an image, "auto" or above 0 up to 1, from a number or its text. Raises MMTokError for others."""
    text = str(scale).strip()
    if text == AUTO:
        return AUTO
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.01 <= found <= 1:
        raise MMTokError(
            f"{text!r} is not a scale of images",
            "give a factor on both sides from 0.01 to 1, or auto: 0.5 leaves a quarter of the patches",
        )
    return found


def fixed_tokens(pixels: str) -> int | None:
    """The vision tokens of every image of a resolution, from "fixed:2048"; None for "native".

    Raises MMTokError for anything else.
    """
    text = pixels.strip()
    if text == NATIVE:
        return None
    found = re.fullmatch(rf"{FIXED}\s*([0-9]{{1,6}})", text)
    if found is None or not FEWEST_FIXED <= int(found[1]) <= MOST_FIXED:
        raise MMTokError(
            f"--pixels {pixels!r} is not a resolution",
            f"give native, or fixed: and a number of vision tokens from {FEWEST_FIXED} to {MOST_FIXED}, as in "
            "--pixels fixed:2048",
        )
    return int(found[1])


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
    budget_per: `image` spends a budget on a whole image or video; `frame` spreads that of a video evenly over its
        slices in time, and reduces each by itself.
    """

    track: Track = "released"
    positions: Positions | None = None
    budget_means: BudgetMeaning = "final"
    budget_per: BudgetArea = "image"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("track", self.track, get_args(Track)),
            ("position policy", self.positions, (None, *get_args(Positions))),
            ("meaning of a budget", self.budget_means, get_args(BudgetMeaning)),
            ("part that a budget is spent on,", self.budget_per, get_args(BudgetArea)),
        ):
            if value not in allowed:
                raise MMTokError(f"there is no {name} {value!r}", f"choose {' or '.join(a for a in allowed if a)}")
