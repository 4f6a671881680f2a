"""Clock, schedule, statistics, FLOPs, memory, summary."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mmtok_cli.bench.clock import Clock
from mmtok_cli.bench.flops import count_flops
from mmtok_cli.bench.results import Comparison, Environment, Schedule
from mmtok_cli.bench.runner import Case, run_case, run_rounds
from mmtok_cli.bench.schedule import interleaved
from mmtok_cli.bench.statistics import paired_speedup, summarise
from mmtok_cli.bench.summary import summarise_cases
from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.environment import environment_of
from mmtok_cli.methods import make_method
from mmtok_cli.models.llava import Llava
from mmtok_cli.rules import Rules


def test_clock_against_known_sleeps() -> None:
    clock = Clock(torch.device("cpu"))
    for name, duration in (("encode", 0.05), ("select", 0.02), ("encode", 0.03)):
        with clock.stage(name):
            time.sleep(duration)
    seconds = clock.seconds()
    assert 0.08 <= seconds["encode"] < 0.2 and 0.02 <= seconds["select"] < 0.1
    assert seconds["total"] == pytest.approx(seconds["encode"] + seconds["select"])


@pytest.mark.gpu
def test_clock_times_the_gpu_and_not_the_launch() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    _ = a @ a
    clock = Clock(device)
    with clock.stage("prefill"):
        for _ in range(10):
            _ = a @ a
    assert clock.seconds()["prefill"] > 10 * 2 * 8192**3 / 2e15


def test_every_round_holds_every_case_in_an_order_of_its_own() -> None:
    order = interleaved(6, 50, seed=1)
    assert all(sorted(round_) == list(range(6)) for round_ in order)
    assert order == interleaved(6, 50, seed=1) != interleaved(6, 50, seed=2)
    assert len({tuple(round_) for round_ in order}) > 40
    assert {round_[0] for round_ in order} == set(range(6))


def test_percentiles_keep_the_raw_values() -> None:
    times = summarise([3.0, 1.0, 2.0])
    assert times.median == 2 and times.values == [3, 1, 2] and times.p10 < 2 < times.p90


def test_speedup_of_noise_is_inconclusive_and_of_a_gain_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0, 0.3, (2, 40))
    level = np.repeat(rng.lognormal(0, 1, 20), 2)  # what slows both sides of a pair
    same = paired_speedup(level * noise[0], level * noise[1])
    assert same.low is not None and same.high is not None
    assert same.low <= 1 <= same.high and not same.conclusive
    faster = paired_speedup(level * noise[0], level * noise[1] / 1.8)
    assert faster.conclusive and faster.low is not None and faster.low > 1.3
    slower = paired_speedup(level * noise[0], level * noise[1] * 1.8)
    assert slower.conclusive and slower.high is not None and slower.high < 1


def test_few_or_equal_rounds() -> None:
    few = paired_speedup([2] * 5, [1] * 5)
    assert few.median == 2 and few.low is None and not few.conclusive
    assert paired_speedup([2] * 6, [1] * 6).conclusive
    assert not paired_speedup([1] * 6, [1] * 6).conclusive


@pytest.mark.parametrize("rounds", [6, 7, 12, 30])
def test_interval_covers_the_true_speedup(rounds: int) -> None:
    """A true ratio of 1.3 under heavy-tailed noise lies in the interval as often as promised, give or take."""
    rng = np.random.default_rng(rounds)
    covered = 0
    for _ in range(200):
        noise = np.exp(0.2 * rng.standard_t(3, (2, rounds)))
        speedup = paired_speedup(1.3 * noise[0], noise[1])
        assert speedup.low is not None and speedup.high is not None
        covered += speedup.low <= 1.3 <= speedup.high
    assert covered >= 184


@pytest.fixture()
def cases() -> list[Case]:
    return [
        Case("full", make_method("full"), None),
        Case("mmtok", make_method("mmtok"), Budget(count=4)),
        Case("none", make_method("none"), None),
    ]


def test_flops_equal_the_formula(tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]) -> None:
    """Matrix products and attention of the tiny decoder, counted by hand (attention in full, as torch does)."""
    reduced, _ = run_case(tiny_sdpa, cases[1], samples[:1], 1)
    s = reduced.tokens[0].kept + reduced.tokens[0].text
    d, kv, mlp, layers, vocabulary = 48, 24, 64, tiny_sdpa.layer_count, len(tiny_sdpa.tokenizer)
    per_layer = 2 * s * (2 * d * d + 2 * d * kv + 3 * d * mlp) + 2 * 2 * s * s * d
    expected = layers * per_layer + 2 * d * vocabulary
    flops = count_flops(tiny_sdpa, cases[1], samples[:1], 1)
    assert flops["prefill"] == pytest.approx(expected, rel=0.01)
    assert flops["total"] == sum(value for stage, value in flops.items() if stage != "total")


def test_rounds_and_their_summary(tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]) -> None:
    answered = [
        Sample(s.images, s.question, s.image_ids, answer=run_case(tiny_sdpa, cases[0], [s], 2)[0].answers[0], kind=kind)
        for s, kind in zip(samples, "aab", strict=True)
    ]
    groups = [[sample] for sample in answered]
    order = interleaved(3, 4, seed=0)
    rounds = list(run_rounds(tiny_sdpa, cases, groups, order, max_new_tokens=2))
    assert [[run.case for run in runs] for runs in rounds] == [[0, 1, 2]] * 4
    assert rounds[3][0].samples == rounds[0][0].samples  # more rounds than samples: from the start again
    flops = [count_flops(tiny_sdpa, case, groups[0], 2) for case in cases]
    full, mmtok, none = results = summarise_cases(cases, rounds, flops)
    assert full.score == 1 and full.score_counts and full.score_counts.asked == 3
    assert full.score_counts.by_kind == {"a": (2, 2), "b": (1, 1)}
    assert full.speedup == {} and full.retention is None and full.fidelity is None
    assert mmtok.tokens.kept == mmtok.tokens.layer_average == 4 and none.tokens.kept == 0
    assert full.tokens.new == 2 and full.seconds["ttft"].median < full.seconds["total"].median
    assert mmtok.fidelity and mmtok.fidelity.kl > 0 and 0 <= mmtok.fidelity.top1 <= 1
    assert mmtok.retention == mmtok.score
    assert full.memory.kv_cache > mmtok.memory.kv_cache > none.memory.kv_cache
    assert full.memory.peak is None and full.memory.host > 0
    assert {result.positions for result in results} == {"renumber"}
    shares = [runs[1].seconds["select"] / (runs[1].seconds["encode"] + runs[1].seconds["prefill"]) for runs in rounds]
    assert mmtok.overhead == pytest.approx(np.median(shares))

    comparison = Comparison(
        model="tiny",
        rules=Rules(),
        environment=environment_of(tiny_sdpa),
        schedule=Schedule(
            data="demo", max_new_tokens=2, seed=0, samples=3, batch_size=1, rounds=4, warmup=0, order=order
        ),
        interrupted=False,
        results=results,
    )
    assert Comparison.model_validate_json(comparison.model_dump_json(by_alias=True)) == comparison


def test_results_say_the_positions_that_were_in_force(tiny_sdpa: Llava, samples: list[Sample]) -> None:
    def positions(name: str, rules: Rules) -> str:
        case = Case(name, make_method(name), Budget(count=4), rules)
        runs = [run_case(tiny_sdpa, case, samples[:1], 1)[0]]
        return summarise_cases([case], [runs], [{}])[0].positions

    assert positions("fastv", Rules()) == "keep" and positions("mmtok", Rules()) == "renumber"
    assert positions("fastv", Rules(track="harmonised")) == tiny_sdpa.positions[0]
    assert positions("fastv", Rules(positions="renumber")) == "renumber"
    assert positions("mmtok", Rules(track="harmonised", positions="keep")) == "keep"


def test_fidelity_of_the_baseline_to_itself_is_exact(
    tiny_sdpa: Llava, samples: list[Sample], cases: list[Case]
) -> None:
    runs = next(run_rounds(tiny_sdpa, [cases[0], cases[0]], [samples], [[1, 0]], max_new_tokens=1))
    assert runs[1].kl == [0, 0, 0] and runs[1].top1 == [True] * 3


def test_environment_names_what_was_measured_on(tiny_sdpa: Llava) -> None:
    environment: Environment = environment_of(tiny_sdpa)
    assert environment.torch == torch.__version__ and environment.attention == "sdpa"
    assert environment.dtype == "float32" and environment.device == "cpu" and environment.threads > 0
