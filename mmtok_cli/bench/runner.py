"""Running cases round by round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mmtok_cli.bench.clock import Clock
from mmtok_cli.bench.memory import host_memory, peak_memory
from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import Stage, VisionLanguageModel
from mmtok_cli.pipeline import RELEASED, Answers, TokenCounts, answer, check_budget
from mmtok_cli.rules import Positions, Rules


@dataclass(frozen=True)
class Case:
    """A method at a budget, under the rules of the comparison; `name` is what the user called the method."""

    name: str
    method: Method
    budget: Budget | None
    rules: Rules = RELEASED

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


@dataclass(frozen=True)
class Run:
    """One repetition of one case on one batch of samples.

    steps: tokens decoded for the longest answer. kl, top1: one value for each sample. Bytes are those of the batch.
    """

    case: int
    samples: tuple[Sample, ...]
    seconds: dict[str, float]
    tokens: list[TokenCounts]
    positions: Positions
    answers: list[str]
    steps: int
    kv_cache: int
    peak: int | None
    host: int
    kl: list[float]
    top1: list[bool]


def run_case(
    model: VisionLanguageModel, case: Case, samples: Sequence[Sample], max_new_tokens: int, index: int = 0
) -> tuple[Run, Tensor]:
    """Answer one batch under the clock. Returns the run and the logits of the first new token, [batch, vocabulary]."""
    with peak_memory(model.device) as peak:
        clock = Clock(model.device)
        said = case.answer(model, samples, max_new_tokens, clock.stage)
        seconds = clock.seconds()
    run = Run(
        case=index,
        samples=tuple(samples),
        seconds=seconds,
        tokens=said.reduced.tokens,
        positions=said.reduced.positions,
        answers=said.texts,
        steps=said.token_ids.shape[1],
        kv_cache=said.kv_cache_bytes,
        peak=peak.bytes,
        host=host_memory(),
        kl=[],
        top1=[],
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
        samples = groups[number % len(groups)]
        done = {i: run_case(model, cases[i], samples, max_new_tokens, i) for i in permutation}
        reference = done[0][1]
        yield [_with_fidelity(*done[i], reference) for i in range(len(cases))]


def _with_fidelity(run: Run, logits: Tensor, reference: Tensor) -> Run:
    expected, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    agrees = reference.argmax(-1) == logits.argmax(-1)
    return replace(run, kl=kl.clamp(min=0).tolist(), top1=agrees.tolist())
