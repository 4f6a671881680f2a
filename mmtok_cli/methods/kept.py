"""A selection that was made elsewhere, replayed from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.errors import MMTokError
from mmtok_cli.kept import KeptSelections, read_kept
from mmtok_cli.methods.base import Method
from mmtok_cli.tokens import CLASS_TOKEN, Selection, TextTokens, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Replay(Method):
    """Keeps what a file says, between encoder and language model.

    The file (see `mmtok_cli.kept`) names the kept tokens of each image, and of each question where they depend on it.
    How many are kept is up to the file, so there is no budget. Tokens of padding may be among them on the released
    track. What a method dropped inside the language model is dropped before it here.

    file: .json or .safetensors. digest: of its content, which is filled in; a file with another one is refused.
    """

    summary: ClassVar[str] = "a selection from a file"
    takes_budget: ClassVar[bool] = False
    keeps_padding: ClassVar[bool] = True

    file: str
    digest: str = ""

    def __post_init__(self) -> None:
        found = self.selections.digest
        if self.digest and self.digest != found:
            raise MMTokError(f"{self.file} has changed since the run was started", "restore it, or start a new run")
        object.__setattr__(self, "digest", found)

    @cached_property
    def selections(self) -> KeptSelections:
        """What the file holds."""
        return read_kept(Path(self.file))

    def require(self, image_ids: Sequence[str], questions: Sequence[str]) -> None:
        """Raises MMTokError if there is no selection of one of a sample's images for one of its questions."""
        for image_id in image_ids:
            for question in questions:
                self.selections.number_of(image_id, question)

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        import torch

        kept = self.selections
        number = kept.number_of(vision.image_id, text.question)
        one, device = kept.file.selections[number], vision.projected.device
        if (one.total or vision.total) != vision.total:
            raise MMTokError(
                f"the selection of {vision.image_id} in {self.file} is of {one.total} vision tokens, and the image has "
                f"{vision.total}",
                "use the model, the image size and the options with which the selection was made",
            )
        indices = torch.tensor(one.indices, dtype=torch.int64, device=device)
        if number not in kept.rows:
            _require_places(indices.tolist(), vision, self.file)
            _require_eligible(indices, vision, self.file)
            return Selection(indices.sort().values)
        tokens, merged = kept.rows[number]
        if tokens.shape[1] != vision.projected.shape[1]:
            raise MMTokError(
                f"the rows of {vision.image_id} in {self.file} have {tokens.shape[1]} values, and those of this model "
                f"{vision.projected.shape[1]}",
                "use the model with which the selection was made",
            )
        own = indices if merged is None else indices[~merged.to(device)]
        _require_eligible(own[own < vision.total], vision, self.file)
        return Selection(
            indices,
            tokens=tokens.to(device, vision.projected.dtype),
            merged=None if merged is None else merged.to(device),
        )


def _require_eligible(indices: Tensor, vision: VisionTokens, file: str) -> None:
    """Raises MMTokError for padding where it must not be kept."""
    places = indices[indices >= 0]
    padding = places[~vision.eligible[places]]
    if len(padding):
        raise MMTokError(
            f"the selection of {vision.image_id} in {file} keeps padding (index {int(padding[0])})",
            "padding is never kept on the harmonised track: use --track released, or another selection",
        )


def _require_places(indices: list[int], vision: VisionTokens, file: str) -> None:
    """Raises MMTokError for indices that are no places of the image, and for one that occurs twice."""
    what = f"the selection of {vision.image_id} in {file}"
    if wrong := [i for i in indices if not 0 <= i < vision.total]:
        hint = "a class token needs its row, which only .safetensors holds" if wrong[0] == CLASS_TOKEN else ""
        raise MMTokError(
            f"{what} has the index {wrong[0]}, and the image has {vision.total} vision tokens",
            hint or f"indices are 0 to {vision.total - 1}",
        )
    if len(set(indices)) < len(indices):
        twice = next(i for i in indices if indices.count(i) > 1)
        raise MMTokError(f"{what} has the index {twice} twice", "name each token once")
