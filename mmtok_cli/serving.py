"""What the commands do through a serving engine: answer, profile under load, compare the quality of answers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmtok_cli.budget import TokenCounts
from mmtok_cli.cases import Case
from mmtok_cli.configuration import cases_of
from mmtok_cli.data.datasets import Dataset, open_dataset
from mmtok_cli.data.samples import Sample, demo_samples, resized
from mmtok_cli.environment import environment_of_engine
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.metrics import METRICS, score_of, with_metric
from mmtok_cli.evaluation.per_sample import sample_row
from mmtok_cli.evaluation.predictions import label_of
from mmtok_cli.evaluation.summary import summarise_predictions
from mmtok_cli.image_plan import plan_images
from mmtok_cli.integrations.vllm.engine import EngineOptions, EngineRequest, VllmEngine
from mmtok_cli.integrations.vllm.request import require_family, require_supported
from mmtok_cli.lengths import of_prompt_length
from mmtok_cli.methods.settings import settings_of
from mmtok_cli.models import outline
from mmtok_cli.models.base import IMAGE_MARKER, VisionLanguageModel
from mmtok_cli.models.devices import choose_device, choose_dtype
from mmtok_cli.models.sources import missing_weights, source_of
from mmtok_cli.models.without_weights import save_without_weights
from mmtok_cli.option_values import image_size
from mmtok_cli.pipeline import check_sample
from mmtok_cli.planning import dataset_of, timed_samples
from mmtok_cli.progress import Progress
from mmtok_cli.results.engine import (
    AnswerQuality,
    EngineComparison,
    EngineProfile,
    LoadRun,
    LoadSchedule,
    ServedRequest,
)
from mmtok_cli.results.records import Closeness, Prediction, SampleLabel
from mmtok_cli.results.schedule import interleaved
from mmtok_cli.results.schema import Environment, SamplePrediction, equivalents_of
from mmtok_cli.settings import (
    ENGINE_ROUNDS,
    ENGINE_WARMUP,
    CasesSettings,
    CompareSettings,
    InferSettings,
    ModelSettings,
    ProfileSettings,
)
from mmtok_cli.timing.load import summarise_load, whole_rounds
from mmtok_cli.video import Video, Visual

MOST_DRAWN = 64  # different scenes that are sent where no data are named; they are held in memory
IN_FLIGHT = 16  # requests of a comparison
SAMPLED = 16  # samples whose lengths are looked at
MOST_NOTES = 10
ABSENT = (
    "fidelity (KL, top-1 agreement), which takes the logits of each token of the unreduced model's answer",
    "times, memory and FLOPs; `mmtok profile --engine vllm` measures time under load",
    "methods inside the language model: vLLM cannot run them",
)


@dataclass(frozen=True)
class Target:
    """What an engine is to run. model: without its weights, as its images and prompts are cut up here."""

    model: VisionLanguageModel
    weights: str
    layers: int | None = None

    def environment(self, engine: VllmEngine) -> Environment:
        run, of = self.layers or self.model.layer_count, self.model.layer_count
        return environment_of_engine(
            device=engine.device,
            device_name=engine.device_name,
            dtype=engine.dtype,
            weights=self.weights,
            layers=(run, of) if run < of else None,
        )


def target_of(settings: ModelSettings, layers: int | None = None) -> Target:
    """The model of the settings. Raises MMTokError for one that is not there, and for a part of a trained one."""
    weights, source = settings.weights, source_of(settings.model)
    known = ("auto", "pretrained", "random") if isinstance(settings, ProfileSettings) else ("pretrained", "random")
    if weights not in known:
        raise MMTokError(f"there is no weights {weights!r}", f"choose one of {', '.join(known)}")
    choose_dtype(settings.dtype, choose_device("cpu"))  # raises for a name that is none
    missing = None if weights == "random" else missing_weights(settings.model, source)
    if weights == "auto":
        weights, missing = "random" if missing else "pretrained", None
    if missing:
        raise MMTokError(missing, "add --weights random to measure time alone, or name its directory")
    if layers is not None and weights != "random":
        raise MMTokError("vLLM loads trained models as a whole, without --layers", "add --weights random, or omit it")
    model = outline(settings.model, device="cpu", attention="sdpa", own_processor=weights == "pretrained")
    return Target(model, weights, layers)


def require_cases(model: VisionLanguageModel, cases: Sequence[Case]) -> None:
    """Refuse a model and methods that no engine can run, before it is started. Raises MMTokError."""
    require_family(model.family)
    for case in cases:
        require_supported(case.name, case.method, model.family)


@contextmanager
def running(
    target: Target,
    settings: InferSettings | ProfileSettings | CompareSettings,
    cases: Sequence[Case],
    samples: Sequence[Sample],
    sequences: int,
    progress: Progress,
) -> Iterator[VllmEngine]:
    """An engine with the model. samples: all that it will be asked. sequences: the most requests at a time.

    Raises MMTokError where it does not start.
    """
    model = target.model
    new_tokens = (
        settings.timed_length["max_new_tokens"] if isinstance(settings, CasesSettings) else settings.max_new_tokens
    )
    with tempfile.TemporaryDirectory(prefix="mmtok-model-") as folder:
        source = source_of(settings.model)
        if target.weights == "random":
            source = folder
            texts = [model.chat(sample.question, len(sample.images)) for sample in samples]
            save_without_weights(model, Path(folder), texts, target.layers)
        options = EngineOptions(
            model=source,
            random=target.weights == "random",
            device=settings.device,
            dtype=settings.dtype,
            sequences=sequences,
            images=max(len(sample.images) for sample in samples),
            kv_cache=_kv_cache_gib(target, settings.dtype, sequences, _longest(model, samples, new_tokens)),
        )
        engine = VllmEngine(options, type(model.model).__name__, model.image_token_id)
        try:
            with progress.task("starting vLLM, which takes about a minute"):
                engine.start()
            yield engine
        finally:
            engine.close()


def _kv_cache_gib(target: Target, dtype: str, sequences: int, longest: int) -> int:
    """GiB that hold the longest sequence of the model, and as many of `longest` tokens as are answered at a time."""
    text, context = target.model.model.config.text_config, target.model.context_length
    heads = text.num_key_value_heads or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers, number_bytes = target.layers or text.num_hidden_layers, 2 if dtype in ("bfloat16", "float16") else 4
    tokens = max(context, sequences * min(context, longest))
    return math.ceil(2 * layers * heads * width * number_bytes * tokens / 2**30)


def _longest(model: VisionLanguageModel, samples: Sequence[Sample], new_tokens: int) -> int:
    """Tokens of the longest sequence among the first samples, about."""
    lengths = [
        len(model.tokenizer(model.chat(sample.question, len(sample.images)))["input_ids"])
        + sum(map(model.total, sample.images))
        for sample in _readable(samples[:SAMPLED])
    ]
    return max(lengths, default=0) + new_tokens


def request_of(
    model: VisionLanguageModel, case: Case, sample: Sample, number: int, max_new_tokens: int, *, exact: bool = False
) -> EngineRequest:
    """The request that a case makes of a sample; its images are read. number: of the sample.

    The engine gets the same tokens and the same picture as `model` would. Raises MMTokError for an unreadable image
    and for a question that does not suit the images.
    """
    sample = sample.open()
    text, bos = model.chat(sample.question, len(sample.images)), model.tokenizer.bos_token
    ids = model.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
    reduction: dict[str, Any] = {"method": case.name}
    if model.family == "llava":
        reduction["image_aspect_ratio"] = "pad"  # as the model was trained; not the way of its processor
    if case.name != "full":
        reduction |= {
            "set": settings_of(case.name, case.method),
            "track": case.rules.track,
            "question": sample.question.replace(IMAGE_MARKER, " ").strip(),
            "image_ids": list(sample.image_ids),
        }
        reduction |= {} if case.budget is None else {"budget": str(case.budget)}
    return EngineRequest(
        sample=number,
        prompt=tuple(ids),
        images=tuple(map(_image, sample.images)),
        reduction=reduction,
        vision=sum(model.total(image) for image in sample.images),
        max_new_tokens=max_new_tokens,
        exact=exact,
    )


# mmtok infer


@dataclass(frozen=True)
class Answered:
    """The answers of cases to one question, and what they were run by."""

    runs: list[LoadRun]
    engine: str
    environment: Environment
    short: bool


def _image(image: Visual) -> Image:
    """Raises MMTokError for a video."""
    if isinstance(image, Video):
        raise MMTokError("videos are not sent to an engine yet", "omit --engine, or give images")
    return image


def answer(settings: InferSettings, cases: Sequence[Case], sample: Sample, progress: Progress) -> Answered:
    """Answer one question with each case, after a first time that is not counted."""
    target = target_of(settings)
    check_sample(target.model, sample, settings.max_new_tokens)
    cases[0].check(target.model, [sample])
    require_cases(target.model, cases)
    requests = [request_of(target.model, case, sample, 0, settings.max_new_tokens) for case in cases]
    with running(target, settings, cases, [sample], 1, progress) as engine, progress.task("answering"):
        for _ in range(2):
            runs = [engine.run([request], 1, case=case) for case, request in enumerate(requests)]
        info = engine.info
        environment = target.environment(engine)
    return Answered(runs, f"{info.name} {info.version}", environment, _is_short(target.model, cases[0], sample))


def _is_short(model: VisionLanguageModel, case: Case, sample: Sample) -> bool:
    """Whether an image has fewer vision tokens than the budget says."""
    return any(plan.short for plan in plan_images(model, case.method, sample.open().images, case.budget, case.rules))


# mmtok profile


def load_samples(settings: ProfileSettings, sample: Sample | None, size: str | None) -> tuple[list[Sample], str]:
    """What is sent, and what it is called: one sample, the dataset of the settings, or questions about drawn scenes.

    size: of the pictures. Raises MMTokError for a dataset that cannot be read.
    """
    most = max(map(settings.requests_at, settings.concurrency))
    if sample is not None:
        samples, data = [sample], " ".join(sample.image_ids)
    elif settings.data is not None:
        rounds = settings.rounds or ENGINE_ROUNDS
        dataset = open_dataset(settings.data, limit=most * rounds, find_metric=False)
        samples, data = [replace(each, later=()) for each in dataset.samples], dataset.name
    else:
        samples, data = demo_samples(min(most, MOST_DRAWN)), "demo"
    return ([resized(each.open(), image_size(size)) for each in samples] if size else samples), data


def profile_load(settings: ProfileSettings, samples: Sequence[Sample], data: str, progress: Progress) -> EngineProfile:
    """Profile the cases of the settings on one engine, at each concurrency, interleaved in rounds.

    An interrupted profile, or one that fails, keeps its complete rounds. Raises KeyboardInterrupt and MMTokError before
    the end of the first.
    """
    cases, target = cases_of(settings), target_of(settings, settings.layers)
    model, length = target.model, settings.timed_length
    require_cases(model, cases)
    samples, left_out = timed_samples(samples, [1], len(samples), partial(_as_sent, model, settings))
    for problem in left_out[:MOST_NOTES]:
        progress.note(problem)
    for case in cases:
        case.check(model, _readable(samples))
    turns = list(product(range(len(cases)), settings.concurrency))
    order = interleaved(len(turns), settings.rounds or ENGINE_ROUNDS, settings.seed)
    with running(target, settings, cases, samples, max(settings.concurrency), progress) as engine:
        load = Load(engine, model, cases, samples, settings)
        warmup = load.warm_up(turns, progress)
        runs, ended_by = load.measure(turns, order, progress)
        info, environment = engine.info, target.environment(engine)
    done = len(runs) // len(turns)
    ids = [case.id for case in cases]
    return EngineProfile(
        model=settings.model,
        engine=info,
        rules=settings.rules,
        environment=environment,
        schedule=LoadSchedule(
            data=data,
            samples=len(samples),
            seed=settings.seed,
            rounds=done,
            planned_rounds=len(order),
            warmup=warmup,
            order=order[:done],
            requests={str(each): settings.requests_at(each) for each in settings.concurrency},
            max_new_tokens=length["max_new_tokens"],
            exact=length["ignore_eos"],
            prompt_tokens=settings.prompt_tokens,
            image_size=samples[0].images[0].size if settings.data is None or settings.image_size else None,
        ),
        interrupted=isinstance(ended_by, KeyboardInterrupt),
        failure=ended_by.message if isinstance(ended_by, MMTokError) else None,
        cases=summarise_load(ids, runs),
        equivalents=equivalents_of(ids),
        runs=runs,
    )


def _as_sent(model: VisionLanguageModel, settings: ProfileSettings, sample: Sample) -> Sample:
    """The sample at the length of prompts. Raises MMTokError for one that the model cannot read."""
    if settings.prompt_tokens is not None:
        sample = of_prompt_length(model, sample, settings.prompt_tokens)
    check_sample(model, sample.open(), **settings.timed_length)
    return sample


def _readable(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Those whose images can be read."""
    for sample in samples:
        try:
            opened = sample.open()
        except MMTokError:
            continue
        yield opened


@dataclass(frozen=True)
class Load:
    """Load runs of cases on one engine. In a round, all cases get the same samples."""

    engine: VllmEngine
    model: VisionLanguageModel
    cases: Sequence[Case]
    samples: Sequence[Sample]
    settings: ProfileSettings

    def warm_up(self, turns: Sequence[tuple[int, int]], progress: Progress) -> int:
        """Run every turn as often as the settings say, which is returned. turns: case and concurrency."""
        times = ENGINE_WARMUP if self.settings.warmup is None else self.settings.warmup
        with progress.task("warming up", times * len(turns)) as update:
            for number in range(times * len(turns)):
                self.run(*turns[number % len(turns)], None)
                update(number + 1)
        return times

    def measure(
        self, turns: Sequence[tuple[int, int]], order: Sequence[Sequence[int]], progress: Progress
    ) -> tuple[list[LoadRun], KeyboardInterrupt | MMTokError | None]:
        """The runs of the complete rounds, and what ended them early. order: of the turns in each round.

        Raises KeyboardInterrupt and MMTokError before the end of the first round.
        """
        runs: list[LoadRun] = []
        try:
            with progress.task("measuring", len(order) * len(turns)) as update:
                for number, places in enumerate(order):
                    for place in places:
                        runs.append(self.run(*turns[place], number))
                        update(len(runs))
        except (KeyboardInterrupt, MMTokError) as error:
            if len(runs) < len(turns):
                raise
            return whole_rounds(runs, len(turns)), error
        return runs, None

    def run(self, case: int, concurrency: int, number: int | None) -> LoadRun:
        """One case at one concurrency in a round; None for the warm-up. Images are read before the clock starts."""
        length, count = self.settings.timed_length, self.settings.requests_at(concurrency)
        first = count * (number or 0)
        requests = [
            request_of(
                self.model,
                self.cases[case],
                self.samples[place],
                place,
                length["max_new_tokens"],
                exact=length["ignore_eos"],
            )
            for place in ((first + each) % len(self.samples) for each in range(count))
        ]
        return self.engine.run(requests, concurrency, case=case, number=number)


# mmtok compare


def compare_quality(settings: CompareSettings, progress: Progress) -> EngineComparison:
    """The answers of all cases to the samples of the settings, judged as without an engine.

    A sample that one case cannot answer is left out of all. Raises MMTokError where none is left.
    """
    cases, target = cases_of(settings), target_of(settings)
    model = target.model
    require_cases(model, cases)
    dataset = dataset_of(settings)
    dataset = with_metric(replace(dataset, samples=[replace(s, later=()) for s in dataset.samples]), settings.metric)
    for case in cases:
        case.check(model, _readable(dataset.samples))
    for note in dataset.notes()[:MOST_NOTES]:
        progress.note(note)
    with running(target, settings, cases, dataset.samples, IN_FLIGHT, progress) as engine:
        quality = Quality(engine, model, cases, dataset, settings.max_new_tokens)
        answers, left_out = quality.answers(progress)
        info, environment = engine.info, target.environment(engine)
    if not answers[0]:
        raise MMTokError(
            f"no sample could be answered: {left_out[0].removeprefix('left out: ')}",
            "check the data, or lower --budget",
        )
    predictions = quality.predictions(answers)
    labels = {number: label_of(number, dataset.samples[number]) for number in answers[0]}
    return EngineComparison(
        model=settings.model,
        engine=info,
        rules=settings.rules,
        environment=environment,
        data=dataset.name,
        samples=len(labels),
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        metric=dataset.metric,
        metric_title=METRICS[dataset.metric].title if dataset.metric else None,
        interrupted=False,
        cases=quality.summary(predictions, labels, settings.seed),
        equivalents=equivalents_of([case.id for case in cases]),
        left_out=[*dataset.notes(), *left_out],
        absent=list(ABSENT),
        predictions=quality.rows(predictions, labels),
    )


@dataclass(frozen=True)
class QualityAnswer:
    """The answer to a sample. short: fewer vision tokens were kept than the budget says."""

    served: ServedRequest
    short: bool


Answers = dict[int, QualityAnswer]  # by the number of the sample


@dataclass(frozen=True)
class Quality:
    """The answers of cases to a dataset."""

    engine: VllmEngine
    model: VisionLanguageModel
    cases: Sequence[Case]
    dataset: Dataset
    max_new_tokens: int

    def answers(self, progress: Progress) -> tuple[list[Answers], list[str]]:
        """The answers of each case to the samples that all can answer; and a line for each other sample."""
        problems: dict[int, str] = {}
        found: list[Answers] = []
        samples = list(range(len(self.dataset.samples)))
        with progress.task("evaluating", len(self.cases) * len(samples)) as update:
            for place, case in enumerate(self.cases):
                answers: Answers = {}
                for first in range(0, len(samples), IN_FLIGHT):
                    part = [number for number in samples[first : first + IN_FLIGHT] if number not in problems]
                    answers |= self._answers(case, part, problems)
                    update(place * len(samples) + first + len(part))
                found.append(answers)
        lines = [f"left out: sample {number + 1}: {problem}" for number, problem in sorted(problems.items())]
        return [{n: a for n, a in answers.items() if n not in problems} for answers in found], lines

    def _answers(self, case: Case, samples: Sequence[int], problems: dict[int, str]) -> Answers:
        """The answers to some samples; what is wrong with the others is added to the problems."""
        requests, short = [], []
        for number in samples:
            try:
                sample = self.dataset.samples[number].open()
                check_sample(self.model, sample, self.max_new_tokens)
                requests.append(request_of(self.model, case, sample, number, self.max_new_tokens))
                short.append(_is_short(self.model, case, sample))
            except MMTokError as error:
                problems[number] = error.message
        answers: Answers = {}
        for request, is_short, answer in zip(requests, short, self.engine.answers(requests, IN_FLIGHT), strict=True):
            if isinstance(answer, MMTokError):
                problems[request.sample] = f"{case}: {answer.message}"
            else:
                answers[request.sample] = QualityAnswer(answer, is_short)
        return answers

    def predictions(self, answers: Sequence[Answers]) -> list[Prediction]:
        """Judged answers, each compared with that of the baseline."""
        return [
            self._prediction(case, number, answer, answers[0][number].served.answer)
            for case, of_case in enumerate(answers)
            for number, answer in sorted(of_case.items())
        ]

    def _prediction(self, case: int, number: int, answer: QualityAnswer, baseline: str) -> Prediction:
        sample, metric, served = self.dataset.samples[number], self.dataset.metric, answer.served
        return Prediction(
            case=case,
            sample=number,
            answer=served.answer,
            score=score_of(sample, served.answer, metric) if metric else None,
            closeness=Closeness(kl=None, top1=None, same=served.answer == baseline),
            tokens=TokenCounts(
                total=served.vision,
                kept=served.kept,
                text=served.prompt - served.kept,
                layer_average=served.kept,
                short=answer.short,
            ),
        )

    def summary(
        self, predictions: Sequence[Prediction], labels: Mapping[int, SampleLabel], seed: int
    ) -> list[AnswerQuality]:
        found = summarise_predictions(predictions, labels, baseline=0, metric=self.dataset.metric, seed=seed)
        results = []
        for number, case in enumerate(self.cases):
            mine = [each for each in predictions if each.case == number]
            fields = found[number].result_fields(is_baseline=number == 0)
            counts = [each.tokens for each in mine if each.tokens]
            results.append(
                AnswerQuality(
                    case=case.id,
                    vision=sum(each.total for each in counts) / len(counts),
                    kept=sum(each.kept for each in counts) / len(counts),
                    same=sum(each.closeness.same for each in mine) / len(mine),
                    **{name: value for name, value in fields.items() if name in AnswerQuality.model_fields},
                )
            )
        return results

    def rows(self, predictions: Sequence[Prediction], labels: Mapping[int, SampleLabel]) -> list[SamplePrediction]:
        """Sample by sample, the baseline first."""
        table = {(each.sample, each.case): each for each in predictions}
        return [
            sample_row(labels[sample], self.cases[case].id, table[sample, case], table[sample, 0])
            for sample in sorted(labels)
            for case in range(len(self.cases))
        ]
