"""The functions of the public Python interface; import them from `mmtok_cli`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmtok_cli import pipeline
from mmtok_cli.budget import Budget
from mmtok_cli.configuration import configured_method
from mmtok_cli.conversation import Conversation, TurnAnswer
from mmtok_cli.data.samples import Sample, open_visual, require_question, visual_name
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods import accepted
from mmtok_cli.methods import make_method as default_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Answers
from mmtok_cli.results.retention import Retention
from mmtok_cli.results.schema import Comparison
from mmtok_cli.rules import ImageScale, Rules, TurnPolicy, require_scale
from mmtok_cli.timing.clock import Clock
from mmtok_cli.video import USUAL_SAMPLING, Sampling, Video, Visual


@dataclass(frozen=True)
class TimedAnswers(Answers):
    """Answers to a batch of samples.

    texts: one for each sample.
    token_ids: [batch, steps], the new tokens, padded after the end of each answer.
    first_logits: [batch, vocabulary], those of the first new token.
    kv_cache_bytes: keys and values of all layers after the last token; missing_kv_cache_bytes: the part of them that
        belongs to layers that were not run.
    selections: what was kept of each image, in the order of the images: `selections[i].indices` [kept].
    reduced: the prompt that entered the language model; `reduced.tokens[i]` has `total`, `kept`, `text` and
        `layer_average` of sample i, `encoded`, the tokens of each smaller image, and `short` where fewer are kept than
        the budget says.
    seconds: by stage: prepare, encode, select, prefill and decode, and preview for images that choose their size;
        `ttft` (time to the first token: all but decode) and `total`. One measurement without a warm-up, of the whole
        batch. The first call of a process is slower.
    """

    seconds: Mapping[str, float] = field(kw_only=True)


@dataclass(frozen=True)
class TimedTurn(TurnAnswer):
    """The answer to one question of a conversation.

    text: the answer. token_ids: [new tokens].
    tokens: `total`, `kept`, `text` and `layer_average` of the conversation up to this answer.
    kv_cache_bytes: after this answer. encoder_bytes: encoder outputs kept in memory for later turns.
    selections: what entered the language model of each image.
    seconds: by stage; `ttft` (all but decode) and `total`. A stage that a turn does without is missing.
    """

    seconds: Mapping[str, float]


def make_method(
    name: str, model: VisionLanguageModel | str | None = None, *, seed: int = 0, **parameters: Any
) -> Method:
    """A reduction method, configured as the command line does it.

    name: one of `mmtok methods`. model: a loaded model, or its name, hub id or directory; the parameters that its
    profile sets (FastV's layer, MMTok's temperatures) replace the method's defaults. None leaves the defaults.
    seed: for methods that draw at random. parameters: override both, as `--set` does; see `mmtok methods NAME`.

    Raises MMTokError for an unknown name or parameter and for a value that the method does not accept.
    """
    if model is None:
        return default_method(name, **accepted(name, {"seed": seed}) | parameters)
    if isinstance(model, str):
        return configured_method(name, model, parameters, seed=seed)
    return configured_method(name, model.name, parameters, seed=seed, family=model.family)


def load_sample(
    images: Path | str | Visual | Sequence[Path | str | Visual], question: str, *, sampling: Sampling = USUAL_SAMPLING
) -> Sample:
    """A question about one image or several, or about videos: paths, PIL images, or videos of `video_of_arrays`.

    `<image>` markers in the question say where the images go; without them they come first. sampling: of the frames of
    video files and of folders of frames. Raises MMTokError for what cannot be read and for an empty question.
    """
    require_question(question)
    given = [images] if isinstance(images, (str, Path, Image, Video)) else list(images)
    opened: list[Visual] = []
    names = []
    for number, image in enumerate(given):
        if isinstance(image, (Image, Video)):
            opened.append(image)
            names.append(f"image-{number}")
        else:
            path = Path(image)
            opened.append(open_visual(path, sampling))
            names.append(visual_name(path.name, sampling, path))
    return Sample(tuple(opened), question, tuple(names)).open()


def answer(
    model: VisionLanguageModel,
    method: Method | str,
    samples: Sample | Sequence[Sample],
    budget: Budget | int | str | None = None,
    *,
    rules: Rules = RELEASED,
    max_new_tokens: int = 32,
    image_scale: ImageScale = 1,
) -> TimedAnswers:
    """Answer a batch of questions greedily, with the vision tokens that the method keeps.

    method: of `make_method`, or a name, which stands for `make_method(name, model)`. samples: one, or a batch.
    budget: vision tokens kept per image: 64, "64", "10%" or a Budget; None for methods that take none.
    max_new_tokens: the longest answer, in tokens.
    image_scale: a factor on both sides of the images, of whose tokens the method then selects, or "auto", with which
        each image decides by how much detail it shows (PACE). A budget is one of the tokens at their own size.

    An image that cannot meet the budget, such as one with fewer tokens that are not padding, is reduced as far as
    possible; see `reduced.tokens`. Raises MMTokError for a budget that none of the samples can meet and for a prompt
    that is longer than the context.
    """
    batch = [samples] if isinstance(samples, Sample) else list(samples)
    chosen, kept, scale = _checked(model, method, batch, budget, rules, image_scale)
    clock = Clock(*model.devices)
    answers = pipeline.answer(
        model,
        chosen,
        batch,
        kept,
        rules=rules,
        max_new_tokens=max_new_tokens,
        stage=clock.stage,
        image_scale=scale,
    )
    return TimedAnswers(
        **{field.name: getattr(answers, field.name) for field in fields(answers)}, seconds=clock.seconds()
    )


def converse(
    model: VisionLanguageModel,
    method: Method | str,
    sample: Sample,
    questions: Sequence[str],
    budget: Budget | int | str | None = None,
    *,
    policy: TurnPolicy = "reuse",
    encode_again: bool = False,
    rules: Rules = RELEASED,
    max_new_tokens: int = 32,
    image_scale: ImageScale = 1,
) -> list[TimedTurn]:
    """Answer the question of a sample and then further ones about the same images, each after the answers before it.

    questions: those after the sample's own. policy: what becomes of the vision tokens then: "reuse" keeps those
    selected for the first question in the KV cache; "reselect" selects again and reads the whole conversation again;
    "union" adds the newly selected ones to those kept before. encode_again: encode the images again for each selection,
    in place of keeping the encoder's outputs. Other arguments and errors as for `answer`.

    Also raises MMTokError for a chat template to whose prompt no turn can be appended, and for "union" with a method
    that acts inside the language model.
    """
    chosen, kept, scale = _checked(model, method, [sample], budget, rules, image_scale)
    turns = []
    with Conversation(
        model,
        chosen,
        sample,
        kept,
        policy,
        rules=rules,
        max_new_tokens=max_new_tokens,
        encode_again=encode_again,
        image_scale=scale,
    ) as conversation:
        for question in (sample.question, *questions):
            require_question(question)
            clock = Clock(*model.devices)
            answered = conversation.ask(question, clock.stage)
            values = {field.name: getattr(answered, field.name) for field in fields(answered)}
            turns.append(TimedTurn(**values, seconds=clock.seconds()))
    return turns


def _checked(
    model: VisionLanguageModel,
    method: Method | str,
    samples: Sequence[Sample],
    budget: Budget | int | str | None,
    rules: Rules,
    image_scale: ImageScale,
) -> tuple[Method, Budget | None, ImageScale]:
    """The method, the budget if it takes one, and the scale.

    Raises MMTokError for a budget that none of the samples can meet, and for what is no scale.
    """
    chosen = make_method(method, model) if isinstance(method, str) else method
    if chosen.takes_budget and budget is None:
        raise MMTokError(f"{type(chosen).__name__} needs a budget", 'give the vision tokens to keep: 64, or "10%"')
    if budget is not None and not isinstance(budget, Budget):
        budget = Budget.parse(str(budget))
    kept = budget if chosen.takes_budget else None
    scale = require_scale(image_scale)
    pipeline.check_budget(model, chosen, samples, kept, rules, image_scale=scale)
    return chosen, kept, scale


def compare(model: str = "demo", *, run_dir: Path | str | None = None, **settings: Any) -> Comparison:
    """Measure methods side by side, as `mmtok compare` does, and return the results.

    model: name, hub id or directory; it is loaded here. run_dir: where the run is saved as it is measured, by default a
    new directory in `runs`; `mmtok compare --resume` continues it after an interruption.
    settings: the options of the command with underscores, as in `methods=["mmtok", "visionzip"]`,
    `budget=[64, "10%"]`, `limit=100`, `batch_size=[1, 8]`, `image_scale=[1, 0.5]`;
    `parameters=["fastv.layer=3"]` stands for --set. All are fields of `mmtok_cli.settings.CompareSettings`.

    In the result, `results[i]` is one case: `case` says which, `score` and `retention` what it is worth,
    `seconds[stage].median` and `speedup[stage]` what it costs (in seconds; memory is in bytes). The first case is the
    unreduced baseline.

    Raises MMTokError for settings that are not valid and for results that cannot be saved.
    """
    from mmtok_cli.comparison import ComparisonRun
    from mmtok_cli.evaluation.processes import Processes
    from mmtok_cli.settings import CompareSettings, require_consistent

    chosen = CompareSettings.of(model=model, **settings)
    if chosen.retain:
        raise MMTokError("compare measures given budgets", "mmtok_cli.find_budgets finds those that keep the score")
    require_consistent(chosen, settings)
    comparison, stopped = ComparisonRun(chosen, None if run_dir is None else Path(run_dir)).measure(Processes())
    if isinstance(stopped, MMTokError):
        raise stopped
    return comparison


def find_budgets(
    model: str = "demo", retain: str | float = "98%", *, run_dir: Path | str | None = None, **settings: Any
) -> Retention:
    """Find the smallest budget of each method that keeps a share of the score, as `mmtok compare --retain` does.

    retain: "98%" or 0.98. model, run_dir and settings: as for `compare`.

    In the result, `decisions[i]` is one method: `budget` is the answer, None if none was shown to keep the share, and
    `tried[j]` a budget with its `retention`, `low` and `high`. `timing` compares the budgets found with the unreduced
    model.

    Raises MMTokError as `compare` does.
    """
    from mmtok_cli.evaluation.processes import Processes
    from mmtok_cli.retention import RetentionRun
    from mmtok_cli.settings import CompareSettings, require_consistent

    chosen = CompareSettings.of(model=model, retain=str(retain), **settings)
    require_consistent(chosen, settings)
    found, stopped = RetentionRun(chosen, None if run_dir is None else Path(run_dir)).measure(Processes())
    if stopped:
        raise stopped
    return found
