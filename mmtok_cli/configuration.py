"""From settings to a loaded model and the cases that run on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from mmtok_cli.budget import Budget
from mmtok_cli.cases import Case
from mmtok_cli.drafts import SELF, Draft
from mmtok_cli.errors import MMTokError
from mmtok_cli.image_scale import chooses_size, require_scalable
from mmtok_cli.methods import accepted, make_method, method_class
from mmtok_cli.methods.base import Method
from mmtok_cli.methods.catalogue import REPLAY
from mmtok_cli.methods.kept import Replay
from mmtok_cli.methods.settings import profile_parameters, read_settings
from mmtok_cli.models import guiding_profile, load_model
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.progress import Progress
from mmtok_cli.rules import require_scale
from mmtok_cli.settings import (
    CasesSettings,
    CompareSettings,
    ModelSettings,
    OneCaseSettings,
    PartSettings,
    ReductionSettings,
    ReplaySettings,
)

USUAL_BUDGETS = ("192", "128", "64")  # of a model whose profile names none


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


def configured_model(
    settings: ModelSettings,
    progress: Progress,
    layers: int | None = None,
    vision_tokens: Sequence[int] = (),
    *,
    compiled: bool = False,
) -> VisionLanguageModel:
    """Load the model of the settings. layers, vision_tokens: see `load_model`."""
    with progress.task(f"loading {settings.model}"):
        return load_model(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            weights=settings.weights,
            layers=layers,
            attention=settings.attention,
            encoder_attention=settings.encoder_attention,
            device_map=settings.device_map,
            quantization=settings.quantization,
            compiled=compiled,
            vision_tokens=vision_tokens,
            pixels=settings.pixels,
        )


def one_case(settings: OneCaseSettings) -> tuple[Case, Case]:
    """The case of the settings, and the baseline. Raises MMTokError for what cannot be followed."""
    cases = make_cases([(settings.method, None)], settings.budgets, settings)
    if isinstance(settings, ReplaySettings) and settings.kept is not None:
        case = replay(settings.kept, settings)
        return case if settings.image_scales == [1] else replace(case, image_scale=settings.image_scales[0]), cases[0]
    return cases[-1], cases[0]


def replay(file: Path, settings: ReductionSettings) -> Case:
    """The case of a selection from a file, at the scale that it was made at. Raises MMTokError for a file that cannot
    be read."""
    method = make_method(REPLAY, file=str(file))
    scale = cast(Replay, method).selections.file.image_scale
    return Case(REPLAY, method, None, settings.rules, image_scale=1 if scale is None else require_scale(scale))


def cases_of(settings: CasesSettings) -> list[Case]:
    """At each batch size the baseline, then every method at every budget (once if it takes none).

    Where `full` is among the methods, the baseline comes a second time. Raises MMTokError for what cannot be followed.
    """
    cases = make_cases(settings.named_methods, settings.budgets, settings, settings.repeats)
    if isinstance(settings, CompareSettings):
        cases += dict.fromkeys(replay(file, settings) for file in settings.kept)
    if "full" in settings.methods:
        cases.append(replace(cases[0], again=True))
    return [replace(case, batch_size=size) for size in settings.batch_size for case in cases]


def make_cases(
    methods: Sequence[tuple[str, Budget | None]],
    budgets: Sequence[Budget] | None,
    settings: OneCaseSettings | CasesSettings,
    repeats: Mapping[str, int] = MappingProxyType({}),
) -> list[Case]:
    """The baseline, then every method at its own budget or at every budget, at every scale of the images; without and
    with a draft if one is set. A method that makes images smaller itself has no other scale.

    methods: names, each with a budget of its own or None. budgets: None stands for those of the model's profile.
    repeats: how often methods that draw at random run, each time with the next seed.
    Raises MMTokError for an unknown method, for a budget of one that takes none, and where no method has the scales.
    """
    names = [name for name, _ in methods]
    for name, own in methods:
        kind = method_class(name)
        if own and not kind.takes_budget:  # refused before anything slow happens, as are unknown ones
            raise MMTokError(f"{name} takes no budget, and it has one in {name}@{own}", f"name it {name}")
    rules, parameters, draft = settings.rules, read_settings(settings.parameters, names), draft_of(settings)
    if budgets is None:
        profile = guiding_profile(settings.model)
        budgets = [Budget.parse(text) for text in (profile.budgets if profile else USUAL_BUDGETS)]
    made = {name: configured_method(name, settings.model, parameters.get(name), seed=settings.seed) for name in names}
    scales = settings.image_scales
    if scales != [1] and made and all(map(chooses_size, made.values())):
        require_scalable(next(iter(made.values())))
    cases = [Case("full", configured_method("full", settings.model, seed=settings.seed), None, rules)]
    for name, own in methods:
        method = made[name]
        for budget, scale in product([own] if own else budgets, [1] if chooses_size(method) else scales):
            case = Case(name, method, budget if method.takes_budget else None, rules, image_scale=scale)
            cases += [case, replace(case, draft=draft)] if draft and can_use_draft(method) else repeated(case, repeats)
    if draft and not any(case.draft for case in cases):
        raise MMTokError(
            f"{' and '.join(names)} cannot use a draft",
            "methods that read the question between encoder and language model can, such as mmtok, mmtok:text and "
            "cdpruner",
        )
    return list(dict.fromkeys(cases))


def repeated(case: Case, repeats: Mapping[str, int]) -> list[Case]:
    """The case as often as it is to be drawn, with a seed of its own each time."""
    if case.name not in repeats:
        return [case]
    first = case.method.seed  # type: ignore[attr-defined]  # methods that draw have one
    draws = range(repeats[case.name])
    return [replace(case, method=replace(case.method, seed=first + i), repeat=i + 1) for i in draws]  # type: ignore[call-arg]


def draft_of(settings: ReductionSettings) -> Draft | None:
    """The draft that the settings ask for. Raises MMTokError for one that a part of a model cannot write."""
    if settings.draft is None:
        return None
    if settings.draft == SELF and isinstance(settings, PartSettings) and settings.layers is not None:
        raise MMTokError(
            "a part of a model cannot write a draft", "omit --layers, or name another model or a text with --draft"
        )
    return Draft(settings.draft, settings.draft_tokens)


def can_use_draft(method: Method) -> bool:
    """Whether a method covers words between encoder and language model."""
    return method.reads_question and "between" in method.acts()


def with_writer(cases: Sequence[Case], settings: CasesSettings | OneCaseSettings, progress: Progress) -> list[Case]:
    """The cases with the model that writes the drafts loaded, if it is another."""
    name = next((case.draft.writer for case in cases if case.draft and case.draft.writer), None)
    if name is None:
        return list(cases)
    with progress.task(f"loading {name}"):
        writer = load_model(
            name,
            device=settings.device,
            attention=settings.attention,
            encoder_attention=settings.encoder_attention,
            device_map=settings.device_map,
        )
    return [replace(case, draft=replace(case.draft, model=writer)) if case.draft else case for case in cases]
