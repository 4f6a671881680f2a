"""The model of lmms-eval: one method at one budget, with a record of what each sample cost.

lmms-eval asks for classes with this interface; `ChatModel` gets chat messages, `SimpleModel` texts and images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.instance import TokenCounts as AnswerTokens
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import get_datetime_str, sanitize_model_name
from rich.console import Console
from rich.progress import Progress as ProgressBar

from mmtok_cli.configuration import configured_model, one_case, with_writer
from mmtok_cli.data.samples import Sample, batches
from mmtok_cli.decoding import answer_mask
from mmtok_cli.environment import environment_of
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.predictions import logits_after
from mmtok_cli.integrations.lmms_eval.arguments import merged, parse_arguments, settings_of
from mmtok_cli.integrations.lmms_eval.requests import (
    Generation,
    Place,
    answer_rounds,
    choice_of,
    generation_of,
    sample_of,
)
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.pipeline import answer_reduced
from mmtok_cli.progress import Progress
from mmtok_cli.results.costs import SUFFIX, CostFile, CostHeader, SampleCost, require_new_file
from mmtok_cli.timing.clock import Clock


@dataclass(frozen=True)
class Answered:
    """The answer to one request, with its cost. text: without what comes after a stop string."""

    text: str
    cost: SampleCost

    @property
    def result(self) -> GenerationResult:
        """The answer as lmms-eval takes it, with the numbers of tokens that the language model read and wrote."""
        tokens = self.cost.tokens
        return GenerationResult(self.text, AnswerTokens(tokens.kept + tokens.text, self.cost.new_tokens))


class SimpleModel(lmms):
    """What `--model mmtok --force_simple` runs. Its arguments are those of `LmmsSettings`."""

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        """Raises MMTokError for arguments that are not valid, and for a model that cannot be loaded."""
        super().__init__()
        self.settings = settings_of({name: value for name, value in arguments.items() if name != "model_args"})
        self._model_args: str = arguments.get("model_args", "")
        case, _ = one_case(self.settings)
        if self.settings.cost_path:
            require_new_file(self.settings.cost_path)
        self.accelerator = Accelerator()  # before the model is loaded, which goes to the device of this process
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self.settings.device_map is not None and self._world_size > 1:
            raise MMTokError("device-map gives all GPUs to one process, and there are several", "omit device_map")
        progress = Progress()
        self._vlm = configured_model(self.settings, progress, self.settings.layers)
        (self._case,) = with_writer([replace(case, batch_size=self.settings.batch_size)], self.settings, progress)
        self._costs: CostFile | None = None

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """The model for lmms-eval's command line. A fault of the user's input is one clear line on standard error, and
        the status of the process 2."""
        with one_clear_line():
            arguments = merged(parse_arguments(arg_string), additional_config or {})
            return cls(**arguments, model_args=arg_string)

    @property
    def device(self) -> torch.device:
        return self._vlm.device

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer each request, in batches of requests with the same generation arguments."""
        with one_clear_line():
            generations = [generation_of(request) for request in requests]  # before anything slow happens
            self._check_budget(sample_of(request, self.task_dict) for request in requests)
            answers: list[Answered] = []
            with self._advancing(len(requests)) as bar:
                for generation, group in groupby(zip(generations, requests, strict=True), lambda pair: pair[0]):
                    for batch in batches([request for _, request in group], self.batch_size):
                        answers += self._answer_requests(batch, generation)
                        bar.advance(bar.task_ids[0], len(batch))
            self._log(answers)
            return [answer.result for answer in answers]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers to each round of each request. Vision tokens are selected for the question of each round."""
        with one_clear_line():
            generations = [generation_of(request) for request in requests]
            found: list[list[str]] = []
            answers: list[Answered] = []
            with self._advancing(len(requests)) as bar:
                for generation, request in zip(generations, requests, strict=True):

                    def ask(sample: Sample, number: int, of: Any = request, how: Generation = generation) -> str:
                        (answered,) = self._answer([Place.of(of)], [sample], how, of.request_type, number)
                        self._record(of, [answered])
                        answers.append(answered)
                        return answered.text

                    found.append(answer_rounds(request, self.task_dict, ask))
                    bar.advance(bar.task_ids[0])
            self._log(answers)
            return found

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The loss of each continuation, and whether it is what the model would generate.

        The loss is the mean negative log-likelihood of the continuation's tokens, of which lmms-eval's tasks take the
        least, as its own models return it. Each pair is wrapped: lmms-eval 0.7.3 makes a text of a bare one.
        """
        with one_clear_line():
            self._check_budget(choice_of(request, self.task_dict)[0] for request in requests)
            found = []
            with self._advancing(len(requests)) as bar:
                for request in requests:
                    found.append(GenerationResult(self._loss(request)))
                    bar.advance(bar.task_ids[0])
            return found

    def clean(self) -> None:
        """Keep the model, which lmms-eval may ask again."""

    def _check_budget(self, samples: Iterable[Sample]) -> None:
        """Refuse a budget that none of the samples can meet, as `mmtok compare` does. One of several processes has only
        a part of them and does not know."""
        if self._world_size == 1:
            self._case.check(self._vlm, samples)

    def _answer_requests(self, requests: Sequence[Instance], generation: Generation) -> list[Answered]:
        places = [Place.of(request) for request in requests]
        samples = [sample_of(request, self.task_dict) for request in requests]
        answers = self._answer(places, samples, generation, requests[0].request_type)
        for request, answered in zip(requests, answers, strict=True):
            self._record(request, [answered])
        return answers

    def _answer(
        self,
        places: Sequence[Place],
        samples: Sequence[Sample],
        generation: Generation,
        request: str,
        number: int = 0,
    ) -> list[Answered]:
        """Answer one batch. An answer ends where the context does. number: of the round."""
        model, clock = self._vlm, Clock(*self._vlm.devices)
        with naming(places):
            reduced = self._case.reduce(model, samples, clock.stage)
            room = model.context_length - reduced.inputs["input_ids"].shape[1]
            longest = max(1, min(generation.max_new_tokens, room))
            answers = answer_reduced(model, reduced, longest, clock.stage)
        count = len(samples)
        seconds = {stage: value / count for stage, value in clock.seconds().items()}
        new = answer_mask(answers.token_ids, model.eos_token_ids).sum(1).tolist()
        return [
            Answered(
                generation.cut(text).strip(),
                SampleCost(
                    task=place.task,
                    doc_id=place.doc_id,
                    request=request,
                    round=number,
                    tokens=tokens,
                    new_tokens=steps,
                    seconds=seconds,
                    kv_cache=answers.kv_cache_bytes / count,
                    batch_size=count,
                ),
            )
            for place, text, tokens, steps in zip(places, answers.texts, reduced.tokens, new, strict=True)
        ]

    def _loss(self, request: Instance) -> tuple[float, bool]:
        model, clock, place = self._vlm, Clock(*self._vlm.devices), Place.of(request)
        sample, continuation = choice_of(request, self.task_dict)
        with naming([place]):
            ids = continuation_ids(model, sample, continuation)
            reduced = self._case.reduce(model, [sample], clock.stage)
            with clock.stage("prefill"):
                logits = logits_after(model, reduced, ids[None])[0].float()  # [tokens, vocabulary]
        likelihoods = logits.log_softmax(-1).gather(1, ids[:, None])
        cost = SampleCost(
            task=place.task,
            doc_id=place.doc_id,
            request=request.request_type,
            tokens=reduced.tokens[0],
            new_tokens=len(ids),
            seconds=clock.seconds(),
            kv_cache=0.0,
            batch_size=1,
        )
        self._record(request, [Answered(continuation, cost)])
        return -float(likelihoods.mean()), bool((logits.argmax(-1) == ids).all())

    def _record(self, request: Instance, answers: Iterable[Answered]) -> None:
        """Write down the costs, unless the request only keeps the processes in step."""
        if Place.of(request).padding:
            return
        if self._costs is None:
            options = options_of(request)
            started = get_datetime_str(*([options.timezone] if options else []))
            path = self._cost_path(options, started)
            self._costs = CostFile(path, self._header(started)) if path else None
        if self._costs:
            self._costs.add([answer.cost for answer in answers])

    def _cost_path(self, options: Any, started: str) -> Path | None:
        """Where this process writes its costs: beside lmms-eval's results, if they are saved."""
        part = f"-{self._rank}" if self._rank else ""
        if path := self.settings.cost_path:
            return path.with_stem(path.stem + part)
        if not getattr(options, "output_path", None):
            return None
        return Path(options.output_path, folder_of(self._model_args), f"{started}{part}{SUFFIX}")

    def _header(self, started: str) -> CostHeader:
        return CostHeader(
            model=self._vlm.name,
            case=self._case.id,
            rules=self._case.rules,
            environment=environment_of(self._vlm),
            lmms_eval=version("lmms-eval"),
            model_args=self._model_args,
            started=started,
            process=self._rank,
            processes=self._world_size,
        )

    @contextmanager
    def _advancing(self, total: int) -> Iterator[ProgressBar]:
        """A bar on standard error, in the first process."""
        console = Console(stderr=True)
        with ProgressBar(console=console, transient=True, disable=self._rank > 0 or not console.is_terminal) as bar:
            bar.add_task(str(self._case), total=total)
            yield bar

    def _log(self, answers: Sequence[Answered]) -> None:
        """Tell lmms-eval the costs, whose means it adds to its results as `throughput`."""
        if not answers:
            return
        costs = [answer.cost for answer in answers]
        seconds, new = sum(cost.seconds["total"] for cost in costs), sum(cost.new_tokens for cost in costs)
        mean = {
            "kept_tokens": sum(cost.tokens.kept for cost in costs) / len(costs),
            "total_tokens": sum(cost.tokens.total for cost in costs) / len(costs),
            "ttft_seconds": sum(cost.seconds["ttft"] for cost in costs) / len(costs),
            "kv_cache_bytes": sum(cost.kv_cache for cost in costs) / len(costs),
        }
        log_metrics(seconds, new, new / seconds if seconds else 0.0, {**mean, "num_requests": len(costs)})


class ChatModel(SimpleModel):
    """What `--model mmtok` runs: images and text may be interleaved. lmms-eval has no log-likelihoods of messages."""

    is_simple = False


@contextmanager
def one_clear_line() -> Iterator[None]:
    """End the process with status 2 and one line on standard error where the user's input is at fault.

    lmms-eval would print a traceback and end with status 0.
    """
    try:
        yield
    except MMTokError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        sys.stdout.flush()
        sys.stderr.write(f"error: {error.message}{hint}\n")
        raise SystemExit(2) from error


@contextmanager
def naming(places: Sequence[Place]) -> Iterator[None]:
    """Name the documents in errors about them."""
    try:
        yield
    except MMTokError as error:
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        raise MMTokError(f"{places[0]}{more}: {error.message}", error.hint) from error


def continuation_ids(model: VisionLanguageModel, sample: Sample, continuation: str) -> torch.Tensor:
    """The tokens that a continuation adds to the end of a prompt, [tokens]. Raises MMTokError where there are none."""
    end = model.chat(sample.question, len(sample.images)).rpartition(model.processor.image_token)[2]
    before, whole = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (end, end + continuation))
    ids = whole[len(before) :]
    if not ids:
        raise MMTokError(f"the continuation {continuation!r} has no tokens", "check the choices of the task")
    return torch.tensor(ids, device=model.device)


def folder_of(model_args: str) -> str:
    """The folder within the output path that lmms-eval names after the model of `--model_args`."""
    return sanitize_model_name(model_args.partition("model=")[2].partition(",")[0])


def options_of(request: Instance) -> Any:
    """lmms-eval's command line, which it gives to tasks: one of them makes the request's prompts. None without one."""
    task = next((each.__self__ for each in request.args if hasattr(each, "__self__")), None)
    return getattr(task, "args", None)
