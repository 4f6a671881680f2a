"""Running cases round by round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Stage, VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Answers, answer, check_budget
from mmtok_cli.results.records import Run, parameters_of, sample_name
from mmtok_cli.results.schema import CaseId
from mmtok_cli.rules import Rules
from mmtok_cli.timing.clock import Clock, with_sums
from mmtok_cli.timing.gpu import Gpu
from mmtok_cli.timing.memory import Peak, host_memory, peak_memory
from mmtok_cli.timing.partial import last_layer, missing_layers, of_whole_model


@dataclass(frozen=True)
class Case:
    """A method at a budget and a batch size, under the rules of the comparison.

    name: what the user called the method. again: the baseline once more, to see what noise alone brings about.
    """

    name: str
    method: Method
    budget: Budget | None
    rules: Rules = RELEASED
    batch_size: int = 1
    again: bool = False

    def __str__(self) -> str:
        return self.name if self.budget is None else f"{self.name} @ {self.budget}"

    def check(self, model: VisionLanguageModel, samples: Sequence[Sample]) -> None:
        """Refuse a budget that cannot be met. Raises MMTokError that names the case."""
        try:
            check_budget(model, self.method, samples, self.budget, self.rules)
        except MMTokError as error:
            raise MMTokError(f"{self}: {error.message}", error.hint) from error

    def answer(
        self, model: VisionLanguageModel, samples: Sequence[Sample], max_new_tokens: int, stage: Stage
    ) -> Answers:
        """Answer one batch, with `stage` around each of the pipeline's stages."""
        return answer(
            model, self.method, samples, self.budget, rules=self.rules, max_new_tokens=max_new_tokens, stage=stage
        )

    @property
    def id(self) -> CaseId:
        """The case as plain data."""
        return CaseId(
            method=self.name,
            parameters=parameters_of(self.method),
            budget=None if self.budget is None else str(self.budget),
            batch_size=self.batch_size,
            again=self.again,
        )


def run_case(
    model: VisionLanguageModel,
    case: Case,
    samples: Sequence[Sample],
    max_new_tokens: int,
    index: int = 0,
    *,
    runs: int = 1,
    gpu: Gpu | None = None,
) -> tuple[Run, Tensor]:
    """Answer one batch under the clock, `runs` times over.

    Returns the record, of place `index`, and the logits of the first new token, [batch, vocabulary].
    """
    said, peaks, repetitions = None, [], []
    before = gpu.joules() if gpu else None
    for _ in range(runs):
        said = None  # the memory of the answers before is not to be held while the next are given
        with peak_memory(model.device) as peak:
            clock = Clock(model.device)
            with last_layer(model, clock.now) as spans:
                said = case.answer(model, samples, max_new_tokens, clock.stage)
            stages = of_whole_model(clock.stages(), clock.sums(spans), missing_layers(model))
            repetitions.append(with_sums(stages))
        peaks.append(peak)
    assert said is not None
    after = gpu.joules() if gpu else None
    joules = None if before is None or after is None else (after - before) / runs
    by_stage = {stage: [seconds[stage] for seconds in repetitions] for stage in repetitions[0]}
    run = Run(
        case=index,
        samples=[sample_name(sample) for sample in samples],
        seconds={stage: median(values) for stage, values in by_stage.items()},
        repetitions=by_stage,
        tokens=said.reduced.tokens,
        positions=said.reduced.positions,
        answers=said.texts,
        right=[
            None if sample.answer is None else sample.is_right(text)
            for sample, text in zip(samples, said.texts, strict=True)
        ],
        kinds=[sample.kind for sample in samples],
        steps=said.token_ids.shape[1],
        kv_cache=said.kv_cache_bytes,
        peak=_largest(peaks, "bytes"),
        reserved=_largest(peaks, "reserved"),
        host=host_memory(),
        gpu=gpu.state(joules) if gpu else None,
    )
    return run, said.first_logits


def run_rounds(
    model: VisionLanguageModel,
    cases: Sequence[Case],
    groups: Sequence[Sequence[Sample]],
    order: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> Iterator[list[Run]]:
    """Run all cases on the same batch of samples in each round; yields the runs of a round, in the order of cases.

    The first case is the baseline that the fidelity of the others is measured against. Rounds walk through `groups`
    and start again when there are more of them.
    """
    for number, permutation in enumerate(order):
        batch = number % len(groups)
        done = {i: run_case(model, cases[i], groups[batch], max_new_tokens, i) for i in permutation}
        reference = done[0][1]
        runs = [with_fidelity(*done[i], reference) for i in range(len(cases))]
        yield [run.model_copy(update={"round": number, "batch": batch}) for run in runs]


def with_fidelity(run: Run, logits: Tensor, reference: Tensor) -> Run:
    """The run with its closeness to the baseline's first logits, [batch, vocabulary]."""
    expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    agrees = reference.argmax(-1) == logits.argmax(-1)
    return run.model_copy(update={"kl": kl.clamp(min=0).tolist(), "top1": agrees.tolist()})


def _largest(peaks: Sequence[Peak], name: str) -> int | None:
    return max((value for peak in peaks if (value := getattr(peak, name)) is not None), default=None)
