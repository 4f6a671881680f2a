"""The unreduced baseline."""

from dataclasses import dataclass
from typing import ClassVar

from mmtok_cli.methods.base import Method


@dataclass(frozen=True)
class Full(Method):
    """Keeps every vision token: the baseline of all speedups and retentions."""

    summary: ClassVar[str] = "every vision token"
    takes_budget: ClassVar[bool] = False
