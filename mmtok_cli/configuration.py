"""Methods as they are configured for a model: the parameters of its profile, then those that the user set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtok_cli.methods import accepted, make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.parameters import profile_parameters
from mmtok_cli.models import guiding_profile


def configured_method(
    name: str, model: str, parameters: Mapping[str, Any] | None = None, *, seed: int = 0, family: str | None = None
) -> Method:
    """The method `name` with the seed, then the parameters of the profile of `model`, then `parameters`.

    model: name, hub id or directory. family: that of the model, where it is known; otherwise it is looked up. The
    profile of a model without one of its own is that of a known model of the family.

    Raises MMTokError for unknown names and for values that the method does not accept.
    """
    profile = guiding_profile(model, family)
    values = accepted(name, {"seed": seed})
    if profile:
        values |= profile_parameters(name, profile.methods, profile.name)
    return make_method(name, **values | dict(parameters or {}))
