"""Published protocols of comparison: which budgets are measured, and which methods beside those of the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError, suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Protocol:
    """A published protocol.

    source: the paper. budgets: shares of an image's vision tokens. methods: what is compared unless methods are named.
    controls: methods that are always compared. repeats: how often methods that draw at random run, each time with
    another seed.
    """

    source: str
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    controls: tuple[str, ...] = ()
    repeats: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def completed(self, methods: tuple[str, ...]) -> tuple[str, ...]:
        """The methods with the controls that are not among them."""
        return (*methods, *(name for name in self.controls if name not in methods))


# 1/9 is 11.12%, 1/3 is 33.34%, 2/9 is 22.23%: the published 64, 192 and 128 of 576 tokens result after rounding down.
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "vtc": Protocol(
            "VTC-Bench, arXiv 2510.07143",
            budgets=("25%", "11.12%", "6.25%", "4%", "1%"),  # sides divided by 2, 3, 4, 5 and 10
            methods=("mmtok", "visionzip", "fastv", "dart"),
            controls=("resize",),
        ),
        "unipruneb": Protocol(
            "UniPruneBench, arXiv 2511.02650",
            budgets=("33.34%", "22.23%", "11.12%"),
            methods=("mmtok", "divprune", "vispruner", "fastv", "dart", "pyramiddrop"),
            controls=("random", "random:inside"),
            repeats=MappingProxyType({"random": 3, "random:inside": 3}),
        ),
    }
)


def protocol_of(name: str) -> Protocol:
    """Raises MMTokError for a protocol that is not known."""
    if name not in PROTOCOLS:
        raise MMTokError(
            f"--protocol {name!r} is not a protocol", suggestion(name, list(PROTOCOLS), "mmtok compare --help")
        )
    return PROTOCOLS[name]
