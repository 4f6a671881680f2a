"""The stages of a run, and the context in which each takes place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

STAGES = ("prepare", "encode", "select", "prefill", "decode")
DRAFT = "draft"  # before all others, where a method reads a first answer as well
DECODE_VIDEO = "decode video"  # before all others, where frames are read from a video
PREVIEW = "preview"  # before preparation, where what an image shows decides its size
ALL_STAGES = (DECODE_VIDEO, DRAFT, PREVIEW, *STAGES)  # in their order; the first three occur in some cases only
CHECK = "check"  # this program's checks and records of what a method did: in other stages, and counted in none

Stage = Callable[[str], AbstractContextManager[Any]]


def unwatched(name: str) -> AbstractContextManager[Any]:
    """The stage context that measures nothing."""
    return nullcontext()
