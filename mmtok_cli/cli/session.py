"""What every command does first: load the model, make the methods."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mmtok_cli.errors import MMTokError
from mmtok_cli.rules import BudgetMeaning, Positions, Rules, Track

if TYPE_CHECKING:
    from mmtok_cli.budget import Budget
    from mmtok_cli.cases import Case
    from mmtok_cli.models.base import VisionLanguageModel


@dataclass(frozen=True)
class Setup:
    """What all cases of a command have in common. settings: by method, what `--set` says of its parameters."""

    model: str
    seed: int
    rules: Rules
    settings: Mapping[str, Mapping[str, Any]]


def make_setup(
    names: Sequence[str],
    model: str,
    seed: int,
    *,
    track: str,
    positions: str | None,
    budget_means: str,
    settings: Sequence[str] | None,
) -> Setup:
    """Read the options that say how the methods called `names` are run, before anything slow happens.

    Raises MMTokError for one that cannot be followed.
    """
    from mmtok_cli.methods.parameters import read_settings

    require_methods(names)
    hush()
    rules = Rules(cast(Track, track), cast(Positions | None, positions), cast(BudgetMeaning, budget_means))
    return Setup(model, seed, rules, read_settings(settings or [], names))


def hush() -> None:
    """Silence the log messages, progress bars and deprecation warnings of other libraries."""
    from mmtok_cli.models import hf

    hf.silence()
    warnings.filterwarnings("ignore", category=FutureWarning)


def open_model(
    name: str,
    device: str,
    dtype: str,
    weights: str,
    quiet: bool,
    *,
    layers: int | None = None,
    attention: str = "sdpa",
    device_map: str | None = None,
) -> VisionLanguageModel:
    """Load a model with a sign of life, and without transformers' own chatter."""
    from rich.text import Text

    from mmtok_cli.report.console import notes_console, printable

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write its own diary to standard error
    hush()
    with notes_console(quiet).status(Text(f"loading {printable(name)}")):
        from mmtok_cli.models import load_model

        return load_model(
            name,
            device=device,
            dtype=dtype,
            weights=weights,
            layers=layers,
            attention=attention,
            device_map=device_map,
        )


def make_case(name: str, budget: Budget | None, setup: Setup) -> Case:
    """A method with the seed, then what the model's profile says, then what the user set; at a budget if it takes one.

    Raises MMTokError for a profile that says what the method cannot follow.
    """
    from mmtok_cli.cases import Case
    from mmtok_cli.configuration import configured_method

    method = configured_method(name, setup.model, setup.settings.get(name), seed=setup.seed)
    return Case(name, method, budget if method.takes_budget else None, setup.rules)


def make_cases(names: Sequence[str], budgets: Sequence[Budget] | None, setup: Setup) -> list[Case]:
    """The unreduced baseline, then every method at every budget (once, if it takes none).

    budgets: None stands for those of the model's profile.
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.models import guiding_profile

    if budgets is None:
        known = guiding_profile(setup.model)
        budgets = [Budget.parse(text) for text in (known.budgets if known else ("192", "128", "64"))]
    cases = [make_case("full", None, setup)]
    for name in names:
        cases += [make_case(name, budget, setup) for budget in budgets]
    return list(dict.fromkeys(cases))


def require_methods(names: Sequence[str]) -> None:
    """Refuse unknown methods before anything slow happens."""
    from mmtok_cli.methods import method_class

    if not names:
        raise MMTokError("no method was named", "name some of those that `mmtok methods` lists")
    for name in names:
        method_class(name)
