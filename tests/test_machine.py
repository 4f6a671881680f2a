"""What disturbs a measurement from outside, from counters and records that are made up: told on a disturbed machine,
and not a word on a quiet one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cli_helpers import run, run_json
from comparisons import case, comparison, times
from test_profile_page import profile

from mmtok_cli.report.checks import machine_notes, notes
from mmtok_cli.report.profiles import ceiling_notes
from mmtok_cli.results.records import MachineState, TimedRun
from mmtok_cli.results.schema import MachineUse
from mmtok_cli.timing import machine as machine_module
from mmtok_cli.timing.machine import Counters, Machine, expected_flops, read_counters
from mmtok_cli.timing.summary import summarise_machine


def use(**changes: Any) -> MachineUse:
    """A quiet machine of 8 CPUs, 4 cores."""
    fields = {"cpus": 8, "cores": 4, "others": 0.1, "others_by_round": [0.1] * 8, "stolen": 0.0, "frequency": 3000.0}
    return MachineUse(**fields | changes)


def told(found: MachineUse | None, threads: int = 4, device: str = "cpu") -> list[str]:
    environment = comparison([]).environment.model_copy(update={"threads": threads, "device": device})
    return machine_notes(found, environment)


def state(others: float, seconds: float = 1.0, frequency: float | None = None, stolen: float = 0.0) -> MachineState:
    return MachineState(cpus=8, cores=4, seconds=seconds, others=others, stolen=stolen, frequency=frequency)


def timed(found: MachineState | None) -> TimedRun:
    seconds = dict.fromkeys(("prepare", "encode", "select", "prefill", "decode"), 1.0) | {"ttft": 4.0, "total": 5.0}
    return TimedRun(
        case=0,
        samples=["a"],
        seconds=seconds,
        repetitions={stage: [value] for stage, value in seconds.items()},
        tokens=[{"total": 4, "kept": 4, "text": 1, "layer_average": 4}],  # type: ignore[list-item]
        positions="keep",
        answers=["yes"],
        steps=1,
        kv_cache=1,
        peak=None,
        reserved=None,
        host=1,
        machine=found,
    )


def test_a_quiet_machine_is_not_mentioned() -> None:
    assert told(None) == told(use()) == told(use(others=4.0)) == []  # half of the CPUs are free for four threads
    assert told(use(stolen=0.05, frequency=None)) == []
    assert told(use(), threads=2) == []  # as on processors of which half of the cores are slow ones
    quiet = comparison([case("full", 576, prefill=0.02), case("mmtok")]).model_copy(update={"machine": use()})
    quiet = quiet.model_copy(update={"environment": quiet.environment.model_copy(update={"threads": 4})})
    text = "\n".join(notes(quiet))
    assert not any(
        word in text for word in ("other programs", "hypervisor", "frequency", "OMP_NUM_THREADS", "outliers")
    )


@pytest.mark.parametrize(
    ("found", "threads", "device", "words"),
    [
        (
            use(others=6.0),
            4,
            "cpu",
            "processes kept 6 CPUs of 8 busy during the rounds, and mmtok uses 4 threads",
        ),
        (use(cpus=2, cores=2, others=1.3), 2, "cpu", "kept 1.3 CPUs of 2 busy"),
        (use(others=7.9), 4, "cuda:0", "mmtok uses 1 thread: close other programs and run again, or raise --rounds"),
        (use(stolen=0.4), 4, "cpu", "the hypervisor gave 0.4 CPUs of 8 to other virtual machines"),
        (use(), 1, "cpu", "torch uses 1 thread on 4 cores: unless that is intended, set OMP_NUM_THREADS=4"),
    ],
)
def test_each_disturbance_is_told_alone(found: MachineUse, threads: int, device: str, words: str) -> None:
    (line,) = told(found, threads, device)
    assert words in line


def test_a_falling_frequency_is_told_and_a_rising_one_is_not() -> None:
    falling = [[timed(state(0, frequency=3600 - 60 * i))] for i in range(12)]
    summary = summarise_machine(falling)
    assert summary is not None and summary.frequency == pytest.approx(3270)
    (line,) = told(summary)
    assert "fell by 20% during the rounds, to a median of 3.27 GHz" in line and "cool" in line
    steady = [[timed(state(0, frequency=3600 + (-1) ** i * 50))] for i in range(12)]
    for quiet in (falling[::-1], steady, falling[:6]):
        assert told(summarise_machine(quiet)) == []


def test_the_state_of_a_run_covers_the_time_since_the_one_before() -> None:
    readings = [
        Counters(0, 100, 10, 0),
        Counters(2, 105, 13, 0.5),
        Counters(3, 106, 14, 0.5),
        Counters(5, 107, 16, 0.5),
    ]
    machine = Machine(iter(readings).__next__)
    states = [machine.state() for _ in range(3)]
    assert [(each.seconds, each.others, each.stolen) for each in states if each] == [(2, 2, 0.5), (1, 0, 0), (2, 0, 0)]


def test_a_system_without_counters_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise psutil.AccessDenied

    assert Machine(refuse).state() is None
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert machine_module.cpu_frequency() is None and expected_flops(torch.device("cpu"), torch.float32) is None


def test_this_machine_has_counters() -> None:
    before, after = read_counters(), read_counters()
    assert after.wall >= before.wall and after.busy >= before.busy and after.own >= before.own
    assert 1 <= machine_module.usable_cores() <= (psutil.cpu_count() or 1)


def test_rounds_are_summed_before_they_are_divided() -> None:
    """The counters are coarse: a state of no time at all counts for nothing."""
    rounds: Sequence[Sequence[TimedRun]] = [
        [timed(state(0.5, 0.5)), timed(state(0, 0.5))],
        [timed(state(9, 3)), timed(None), timed(state(0, 0))],
    ]
    summary = summarise_machine(rounds)
    assert summary is not None and summary.others == pytest.approx(9.5 / 4)
    assert summary.others_by_round == pytest.approx([0.5, 3])
    assert summarise_machine([[timed(None)]]) is None and summarise_machine([]) is None


def test_outliers_name_their_rounds_and_who_was_busy_then() -> None:
    slow = case("mmtok", outliers=[2, 5])
    seconds = [0.03, 0.03, 2.0, 0.03, 0.03, 1.0, 0.03, 0.03]
    slow = slow.model_copy(
        update={"seconds": slow.seconds | {"ttft": times(0.03).model_copy(update={"values": seconds})}}
    )
    for others, words in (
        ([0.1, 0.1, 1.9, 0.1, 0.1, 1.7, 0.1, 0.1], "; other processes kept 1.8 CPUs busy in them, 0.1 CPUs otherwise."),
        ([0.1] * 8, "(mmtok @ 64). Medians"),
        ([], "(mmtok @ 64). Medians"),
    ):
        result = comparison([case("full", 576), slow]).model_copy(update={"machine": use(others_by_round=others)})
        (line,) = [note for note in notes(result) if note.startswith("outliers")]
        assert line.startswith("outliers: rounds 3, 6 of 8 took up to 2 s to the first token") and words in line
        assert "close other programs and run again, or raise --rounds" in line


@pytest.mark.parametrize(("expected", "warned"), [(None, False), (4.9e12, False), (5.1e12, True)])
def test_a_ceiling_far_below_what_the_processor_should_reach(expected: float | None, warned: bool) -> None:
    found = profile()
    assert found.ceilings is not None
    ceilings = found.ceilings.model_copy(update={"expected_flops_per_second": expected})
    lines = ceiling_notes(found.model_copy(update={"ceilings": ceilings}))
    assert len(lines) == 2 + warned and ("reached 1 T FLOP/s, 20% of the 5.1 T or so" in lines[-1]) == warned


def test_the_estimate_is_made_only_where_it_is_well_founded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "cpu_frequency", lambda: 3000.0)
    monkeypatch.setattr(machine_module, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    cpu = torch.device("cpu")
    assert expected_flops(cpu, torch.float32) == 4 * 3e9 * 32
    assert expected_flops(cpu, torch.bfloat16) is None and expected_flops(torch.device("meta"), torch.float32) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert expected_flops(cpu, torch.float32) is None


def test_the_records_of_a_run_hold_the_state(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of compare, also for `report`, and of profile."""
    monkeypatch.setattr(Machine, "state", lambda self: state(6.0))
    command = ("-m", tiny_directory, "-b", 4, "--rounds", 2, "--warmup", 0, "--max-new-tokens", 2)
    shown = run("compare", *command, "--limit", 2, "--run-dir", tmp_path / "run", "--export", tmp_path / "t.html")
    assert shown.exit_code == 0, shown.output
    record = json.loads((tmp_path / "run" / "rounds" / "00001-001.json").read_text())
    assert record["machine"]["others"] == 6.0 and record["machine"]["cpus"] == 8
    monkeypatch.undo()
    report = run_json("report", tmp_path / "run")
    assert report["machine"]["others"] == 6.0 and report["machine"]["others_by_round"] == [6.0, 6.0]
    assert (report["machine"]["cpus"], report["machine"]["frequency"]) == (8, None)
    found = run_json("profile", *command, "--trace-dir", tmp_path / "traces")
    assert found["machine"]["cpus"] == psutil.cpu_count() and len(found["machine"]["others_by_round"]) == 2
