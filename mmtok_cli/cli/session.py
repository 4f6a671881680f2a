"""What every command does first: load the model, make the methods."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmtok_cli.errors import MMTokError

if TYPE_CHECKING:
    from mmtok_cli.bench.runner import Case
    from mmtok_cli.budget import Budget
    from mmtok_cli.models.base import VisionLanguageModel


def open_model(name: str, device: str, dtype: str, quiet: bool) -> VisionLanguageModel:
    """Load a model with a sign of life, and without transformers' own chatter."""
    from rich.text import Text

    from mmtok_cli.report.console import notes_console, printable

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write its own diary to standard error
    with notes_console(quiet).status(Text(f"loading {printable(name)}")):
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        from mmtok_cli.models import load_model

        hub_logging.set_verbosity_error()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning)
        return load_model(name, device=device, dtype=dtype)


def make_case(name: str, budget: Budget | None, model: str, seed: int) -> Case:
    """A method with the parameters that the model's profile gives it, at a budget if it takes one."""
    from mmtok_cli.bench.runner import Case
    from mmtok_cli.methods import accepted, make_method
    from mmtok_cli.models import profile_of

    known = profile_of(model)
    parameters = {"seed": seed, **(known.methods.get(name.partition(":")[0], {}) if known else {})}
    method = make_method(name, **accepted(name, parameters))
    return Case(name, method, budget if method.takes_budget else None)


def make_cases(names: Sequence[str], budgets: Sequence[Budget] | None, model: str, seed: int) -> list[Case]:
    """The unreduced baseline, then every method at every budget (once, if it takes none).

    budgets: None stands for those of the model's profile.
    """
    from mmtok_cli.budget import Budget
    from mmtok_cli.models import profile_of

    if budgets is None:
        known = profile_of(model)
        budgets = [Budget.parse(text) for text in (known.budgets if known else ("192", "128", "64"))]
    cases = [make_case("full", None, model, seed)]
    for name in names:
        cases += [make_case(name, budget, model, seed) for budget in budgets]
    return list(dict.fromkeys(cases))


def require_methods(names: Sequence[str]) -> None:
    """Refuse unknown methods before anything slow happens."""
    from mmtok_cli.methods import method_class

    if not names:
        raise MMTokError("no method was named", "name some of those that `mmtok methods` lists")
    for name in names:
        method_class(name)
