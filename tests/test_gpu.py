"""What the driver of a GPU tells, asked of a module that pretends to be NVML."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtok_cli.results.records import GpuState
from mmtok_cli.timing.gpu import Gpu, open_gpu, open_gpus
from mmtok_cli.timing.memory import peak_memory
from mmtok_cli.timing.summary import summarise_states


class FakeNVML:
    """One card, which answers what `answers` holds and refuses all else."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked_for: list[Any] = []

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked_for.append(uuid)
        return "card"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return self._answer("clocks")[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return self._answer("full_clocks")[kind]

    def __getattr__(self, name: str) -> Any:
        return lambda *handle: self._answer(name)

    def _answer(self, name: str) -> Any:
        if name not in self.answers:
            raise self.NVMLError(name)
        return self.answers[name]


def card(**more: Any) -> FakeNVML:
    return FakeNVML(
        init=None,
        clocks={1: 1200, 2: 2619},
        full_clocks={1: 1980},
        nvmlDeviceGetCurrentClocksEventReasons=0x01 | 0x02 | 0x04 | 0x20,  # idle, fixed clocks, power cap, heat
        nvmlDeviceGetComputeRunningProcesses=[SimpleNamespace(pid=1), SimpleNamespace(pid=2), SimpleNamespace(pid=3)],
        nvmlDeviceGetEnforcedPowerLimit=350_000,
        nvmlDeviceGetTotalEnergyConsumption=1_234_567,
        nvmlSystemGetDriverVersion="580.1",
        **more,
    )


@pytest.fixture()
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
    return torch.device("cuda:1")


def test_state_of_a_card(cuda: torch.device) -> None:
    nvml = card()
    gpu = open_gpu(cuda, nvml)
    assert gpu is not None and nvml.asked_for == ["GPU-ab-cd"]
    assert gpu.joules() == pytest.approx(1234.567) and gpu.driver() == "580.1"
    assert gpu.state(5.0) == GpuState(
        clock=1200,
        memory_clock=2619,
        full_clock=1980,
        power_limit=350,
        throttled=["power cap", "thermal slowdown"],
        other_processes=2,  # without this one
        joules=5.0,
    )


class Counting(FakeNVML):
    """A card that counts for how long its clock was reduced, by nvmlPerfPolicyType_t."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(**answers)
        self.times: dict[int, int] = {}

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> SimpleNamespace:  # noqa: N802
        if policy not in self.times:
            raise self.NVMLError("not supported")
        return SimpleNamespace(referenceTime=1, violationTime=self.times[policy])


def test_throttling_is_what_happened_during_a_run() -> None:
    """Not what the card says of itself when the run is over."""
    nvml = Counting(nvmlDeviceGetCurrentClocksEventReasons=0x20 | 0x80)  # heat and power brake, now
    gpu = Gpu(nvml, "card")
    nvml.times = {0: 500, 1: 70, 5: 0}
    before = gpu.violations()
    assert before == {"power cap": 500, "thermal slowdown": 70, "reliability limit": 0}
    assert gpu.state(before=before).throttled == ["power brake"]  # of which there is no counter
    nvml.times[0] = 900
    assert gpu.state(before=before).throttled == ["power brake", "power cap"]
    # A card without counters says what holds at this moment.
    nvml.times = {}
    assert gpu.violations() == {}
    assert gpu.state(before=gpu.violations()).throttled == ["thermal slowdown", "power brake"]


def test_a_timed_run_reads_the_counters_before_and_after(tiny_sdpa: Any, samples: list[Any]) -> None:
    from mmtok_cli.cases import Case
    from mmtok_cli.methods import make_method
    from mmtok_cli.timing.runner import run_case

    nvml = Counting()
    nvml.times = {0: 5}
    case, read = Case("full", make_method("full"), None), nvml.nvmlDeviceGetViolationStatus

    def throttling(handle: str, policy: int) -> SimpleNamespace:
        status = read(handle, policy)
        nvml.times[0] = 8
        return status

    nvml.nvmlDeviceGetViolationStatus = throttling  # type: ignore[method-assign]
    run = run_case(tiny_sdpa, case, samples[:1], 1, gpu=Gpu(nvml, "card"))
    assert run.gpu is not None and run.gpu.throttled == ["power cap"]
    assert run_case(tiny_sdpa, case, samples[:1], 1, gpu=Gpu(nvml, "card")).gpu.throttled == []  # type: ignore[union-attr]


def test_what_a_card_does_not_tell_is_none(cuda: torch.device) -> None:
    gpu = open_gpu(cuda, FakeNVML(init=None))
    assert gpu is not None and gpu.joules() is None and gpu.driver() is None
    state = gpu.state()
    assert state.throttled == [] and {value for key, value in state if key != "throttled"} == {None}
    use = summarise_states([state], 1)
    assert use is not None and use.joules is None and use.other_processes is None and use.throttled == {}


def test_without_a_gpu_or_its_library_there_is_nothing_to_tell(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_gpu(torch.device("cpu"), card()) is None
    assert open_gpu(cuda, FakeNVML()) is None  # nvmlInit fails
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert open_gpu(cuda) is None
    assert summarise_states([], 1) is None


def test_several_cards_are_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoCards(FakeNVML):
        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
            return uuid

        def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
            return {"GPU-0": 1900, "GPU-1": 1200}[handle]

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
            return {"GPU-0": 1000, "GPU-1": 2500}[handle]

        def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
            return {"GPU-0": 0x04, "GPU-1": 0x04 | 0x20}[handle]

        def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> Any:  # noqa: N802
            if policy != 1:
                raise self.NVMLError
            return SimpleNamespace(violationTime={"GPU-0": 5, "GPU-1": 9}[handle])

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(device.index)))
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    gpu = open_gpus(devices, TwoCards(init=None, nvmlSystemGetDriverVersion="580.1"))
    assert gpu is not None and gpu.joules() == pytest.approx(3.5) and gpu.driver() == "580.1"
    state = gpu.state(3.5)
    assert (state.clock, state.joules, state.power_limit) == (1200, 3.5, None)
    assert state.throttled == ["power cap", "thermal slowdown"]
    # Only the second card was slowed down by heat since then, as the time says that it counts.
    before = {"0 thermal slowdown": 5, "1 thermal slowdown": 5}
    assert gpu.violations() == {"0 thermal slowdown": 5, "1 thermal slowdown": 9}
    assert gpu.state(3.5, before).throttled == ["power cap", "thermal slowdown"]
    assert gpu.state(3.5, gpu.violations()).throttled == ["power cap"]
    assert open_gpus([*devices, torch.device("cpu")], TwoCards(init=None)) is None


def test_peak_memory_is_summed_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    before, most, reserved = {0: 100, 1: 200}, {0: 150, 1: 900}, {0: 1000, 1: 2000}
    reset = []
    for name, values in (
        ("memory_allocated", before),
        ("max_memory_allocated", most),
        ("max_memory_reserved", reserved),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, values=values: values[device.index])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reset.append(device.index))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with peak_memory(torch.device("cuda:0"), torch.device("cuda:1")) as peak:
        pass
    assert (peak.bytes, peak.reserved, reset) == (750, 3000, [0, 1])


def test_states_of_all_rounds_together() -> None:
    def state(clock: float, throttled: list[str], joules: float | None, others: int) -> GpuState:
        return GpuState(
            clock=clock,
            memory_clock=None,
            full_clock=1980,
            power_limit=350,
            throttled=throttled,
            other_processes=others,
            joules=joules,
        )

    states = [state(1900, [], 8.0, 0), state(1200, ["power cap"], 0.0, 1), state(1980, ["power cap"], 4.0, 0)]
    use = summarise_states(states, samples=2)
    assert use is not None
    assert (use.clock, use.memory_clock, use.full_clock, use.power_limit) == (1900, None, 1980, 350)
    assert use.throttled == {"power cap": 2} and use.other_processes == 1
    assert use.joules == pytest.approx(2.0)  # 12 J in three rounds of two samples


def test_a_gpu_that_is_asked_goes_into_the_record(tiny_sdpa: Any, samples: list[Any]) -> None:
    from mmtok_cli.cases import Case
    from mmtok_cli.methods import make_method
    from mmtok_cli.timing.runner import run_case

    class Counting(FakeNVML):
        spent = 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
            self.spent += 6000
            return self.spent

    case = Case("full", make_method("full"), None)
    run = run_case(tiny_sdpa, case, samples[:1], 1, runs=3, gpu=Gpu(Counting(), "card"))
    assert run.gpu is not None and run.gpu.joules == pytest.approx(2.0)  # of one repetition
    assert all(len(values) == 3 for values in run.repetitions.values())
    assert run.seconds["prefill"] == sorted(run.repetitions["prefill"])[1]
    assert run_case(tiny_sdpa, case, samples[:1], 1).gpu is None
