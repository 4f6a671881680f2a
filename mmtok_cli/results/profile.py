"""The shape of a profile: the device's peak rates, the rates that were achieved, and growth with the vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from mmtok_cli.results.schema import CaseResult, Comparison, Environment, MachineUse, OfCase, Record, Schedule
from mmtok_cli.rules import Rules

DOMINATES = 4.0  # how many times its fixed cost a stage must take for its growth to be fitted
FEWEST_POINTS = 3  # of a fit
LAUNCH_BOUND = 0.7  # share of a stage's time below which its kernels do not explain it


class Ceilings(Record):
    """FLOP/s of the product of two square matrices in the model's data type, and bytes/s of a copy.

    Medians over five repetitions, fewer on a slow device; their seconds are kept. rows: of the matrices. copied: bytes
    that were copied; each is read and written and counts twice. tf32: whether float32 products are rounded to TF32, as
    those of the model are. expected_flops_per_second: a rough estimate from cores, frequency and instruction set; None
    where too little is known.
    """

    flops_per_second: float
    bytes_per_second: float
    dtype: str
    tf32: bool
    rows: int
    copied: int
    matmul_seconds: list[float]
    copy_seconds: list[float]
    expected_flops_per_second: float | None = None


class Achieved(OfCase):
    """The rates of one case: counted FLOPs / median seconds by stage, and, for decoding, bytes of the language model's
    weights / seconds per token. The latter is None where a single token was generated, which comes from prefill, and
    for batches of a mixture of experts, which read more of them than one sequence does."""

    flops_per_second: dict[str, float]
    decode_bytes_per_second: float | None


class Operator(Record):
    """One operator within one stage of the profiler trace of a case."""

    case: str
    stage: str
    name: str
    calls: int
    cpu_seconds: float
    device_seconds: float


class KernelTime(Record):
    """Kernels and copies that a stage of a traced case launched on a GPU: their number, the sum of their seconds."""

    case: str
    stage: str
    seconds: float
    launches: int


class LaunchBound(Record):
    """A stage of which the kernels take less than `LAUNCH_BOUND`: it waits for the host to launch them.

    share: seconds of the kernels / median seconds of the stage in the rounds.
    """

    case: str
    stage: str
    share: float
    launches: int


class StageSpan(Record):
    """When a stage ran, in seconds since the first stage began."""

    stage: str
    start: float
    end: float


class MemoryTimeline(Record):
    """Bytes allocated while a case was traced, above those before its first allocation.

    seconds: moments since the first stage began, in the traced run, which the profiler slows down. bytes: allocated
    from that moment to the next. Of many moments some hundred are kept, the highest and the lowest level of each
    interval among them. stages: in the order in which they began; some are within others.
    """

    case: str
    seconds: list[float]
    bytes: list[int]
    stages: list[StageSpan]


class ScalingPoint(OfCase):
    """One case at one number of vision tokens: the seconds of all runs and their medians.

    frames: those of the sample's videos, if it has any. refused: why nothing was measured. peak: bytes of the largest
    run, from the selection on; None where the device does not report them.
    select_interval, prefill_interval: 95 % intervals of the medians; None for fewer than six runs.
    """

    tokens: int
    frames: int | None = None
    kept: int | None = None
    select_seconds: float | None = None
    prefill_seconds: float | None = None
    select_values: list[float] = Field(default_factory=list)
    prefill_values: list[float] = Field(default_factory=list)
    peak: int | None = None
    refused: str | None = None
    select_interval: tuple[float, float] | None = None
    prefill_interval: tuple[float, float] | None = None


class Growth(OfCase):
    """Seconds of a stage grow as tokens ** exponent; low and high bound a 95 % interval.

    fixed_seconds: the fastest run of the stage at the smallest grid. tokens: the points that the line is fitted to.
    With fewer than three there is no exponent.
    """

    stage: str
    exponent: float | None
    low: float | None
    high: float | None
    fixed_seconds: float | None
    tokens: list[int]


class ProfileResult(Record):
    """What `mmtok profile --json` prints.

    stage_peaks: bytes by case and stage, from the traces. memory: bytes over time, from the same traces. ceilings: None
    where they were not measured, because the profile was interrupted before or an error occurred. weights_read: bytes
    that are read for each decoded token. scaling, growth, fixed: of --scaling, otherwise empty; fixed are the points at
    the smallest grid, one for each case. equivalents: budgets that are shares, as settings of serving engines. kernels:
    from the traces, on a GPU. launch_bound: the stages that launches hold up.
    """

    schema_: Literal["mmtok.profile/2"] = Field(default="mmtok.profile/2", alias="schema")
    model: str
    parameters: int
    rules: Rules
    environment: Environment
    schedule: Schedule
    interrupted: bool
    cases: list[CaseResult]
    stage_peaks: dict[str, dict[str, int]]
    memory: list[MemoryTimeline] = Field(default=[])
    operators: list[Operator]
    trace: str
    ceilings: Ceilings | None
    weights_read: int
    achieved: list[Achieved]
    machine: MachineUse | None = None
    scaling: list[ScalingPoint] = Field(default=[])
    growth: list[Growth] = Field(default=[])
    fixed: list[ScalingPoint] = Field(default=[])
    equivalents: dict[str, dict[str, float]] = Field(default={})
    kernels: list[KernelTime] = Field(default=[])
    launch_bound: list[LaunchBound] = Field(default=[])

    @property
    def comparison(self) -> Comparison:
        """The cases alone, in the form that tables are made of."""
        return Comparison(
            model=self.model,
            rules=self.rules,
            environment=self.environment,
            schedule=self.schedule,
            interrupted=self.interrupted,
            results=self.cases,
        )


def launch_bound(kernels: Sequence[KernelTime], cases: Sequence[CaseResult]) -> list[LaunchBound]:
    """The stages whose kernels take less than `LAUNCH_BOUND` of their time.

    Kernels take as long in a trace as without one; the host's part takes longer, so that the time of a stage is that of
    the rounds. Where only some layers are run, it is what was measured of them.
    """
    seconds = {case.case.label: case.seconds for case in cases}
    found = []
    for one in kernels:
        times = seconds.get(one.case, {})
        stage = times.get(f"measured_{one.stage}") or times.get(one.stage)
        if stage and one.seconds < LAUNCH_BOUND * stage.median:
            share = one.seconds / stage.median
            found.append(LaunchBound(case=one.case, stage=one.stage, share=share, launches=one.launches))
    return found
