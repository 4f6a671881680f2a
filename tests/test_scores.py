"""Scores of answers, against scikit-learn and by hand; retention and flips, by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from mmtok_cli.data.samples import Sample
from mmtok_cli.evaluation import summary
from mmtok_cli.evaluation.metrics import says_yes, score_of, yes_no
from mmtok_cli.evaluation.summary import Flips, count_flips, f1_retention, mean_retention


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("no", False),
        ("No, there is none.", False),
        ("There is not a dog", False),
        ("Yes. It is not small.", True),  # the first sentence alone counts
        ("It is there, no doubt.", False),  # the official rule is what it is
        ("NO", True),
        ("Nothing", True),
        ("no!", True),
        ("no\nyes", True),  # words are parted by spaces alone
        ("", True),
        (".no", True),
    ],
)
def test_yes_and_no_as_pope_reads_them(answer: str, yes: bool) -> None:
    assert says_yes(answer) == yes


def test_yes_no_scores_equal_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    cases = [
        (generator.random(n) < p, generator.random(n) < q)
        for n, p, q in itertools.product((1, 2, 50), *[(0, 0.3, 1)] * 2)
    ]
    for answers, known in cases:
        found = yes_no(answers.tolist(), known.tolist())
        precision, recall, f1, _ = precision_recall_fscore_support(known, answers, average="binary", zero_division=0)
        assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))
        assert found.accuracy == pytest.approx(accuracy_score(known, answers))
        assert found.yes_ratio == pytest.approx(answers.mean())


def test_what_an_answer_is_worth() -> None:
    sample = Sample((), "Is there a dog?", (), answer="No")
    assert score_of(sample, " no.", "exact") == 1 and score_of(sample, "There is not", "exact") == 0
    assert score_of(sample, "There is not", "yes-no") == 1 and score_of(sample, "Perhaps", "yes-no") == 0
    assert score_of(sample, "No, there is none", "mme") == 1 and score_of(sample, "There is not", "mme") == 0
    assert score_of(Sample((), "?", ()), "no", "exact") is None
    assert score_of(Sample((), "?", ()), "no", "textvqa") is None


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def test_retention_is_the_ratio_of_scores_and_the_same_every_time() -> None:
    baseline, found = [1.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.5, 1.0]
    first, second = (mean_retention(baseline, found, names(4), seed=3) for _ in range(2))
    assert first == second and first is not None and first.value == pytest.approx(1.0)
    assert mean_retention(baseline, [1.0, 0.5, 0.5, 0.0], names(4), seed=3).value == pytest.approx(0.8)  # type: ignore[union-attr]


def test_retention_where_there_is_nothing_to_tell() -> None:
    assert mean_retention([0, 0], [1, 0], names(2), seed=0) is None
    for baseline, found, value in (([1, 1, 0], [1, 1, 0], 1.0), ([1, 1, 1], [0, 0, 0], 0.0), ([1], [1], 1.0)):
        retention = mean_retention(baseline, found, names(len(baseline)), seed=0)
        assert retention and (retention.value, retention.low, retention.high) == (value, None, None)
    rarely = mean_retention([1, 0, 0], [1, 1, 0], names(3), seed=0)  # a third of all resamples has no right answer
    assert rarely and rarely.value == 2 and rarely.high is None
    assert f1_retention([True, False], [False, False], [True, False], names(2), seed=0) is None


def draw(generator: np.random.Generator, images: int, questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of a baseline (80 %) and of a method that loses a tenth of them, image by image."""
    baseline = np.repeat(generator.random(images) < 0.8, questions)
    return baseline, baseline & np.repeat(generator.random(images) < 0.9, questions)


@pytest.mark.parametrize("questions", [1, 6])
def test_intervals_hold_the_truth_as_often_as_they_say(questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the questions about an image err together; there, samples drawn singly would promise too much."""
    monkeypatch.setattr(summary, "RESAMPLES", 300)
    generator = np.random.default_rng(0)
    hits = {"clusters": 0, "singly": 0}
    runs = 100
    for _ in range(runs):
        baseline, found = draw(generator, images=100, questions=questions)
        images = np.repeat(np.arange(100), questions).astype(str).tolist()
        for how, clusters in (("clusters", images), ("singly", names(len(baseline)))):
            retention = mean_retention(baseline.tolist(), found.tolist(), clusters, seed=1)
            assert retention and retention.low is not None and retention.high is not None
            hits[how] += retention.low <= 0.9 <= retention.high
    assert hits["clusters"] >= binom.ppf(0.001, runs, 0.92)
    assert (hits["singly"] == hits["clusters"]) if questions == 1 else (hits["singly"] < 0.75 * runs)


def test_f1_retention_is_the_ratio_of_f1() -> None:
    generator = np.random.default_rng(1)
    known, baseline, found = (generator.random(300) < p for p in (0.5, 0.4, 0.6))
    retention = f1_retention(known.tolist(), baseline.tolist(), found.tolist(), names(300), seed=0)
    expected = yes_no(found.tolist(), known.tolist()).f1 / yes_no(baseline.tolist(), known.tolist()).f1
    assert retention and retention.value == pytest.approx(expected)
    assert retention.low is not None and retention.high is not None and retention.low < expected < retention.high


def test_flips() -> None:
    baseline = [True] * 10 + [False] * 5
    found = [True] * 4 + [False] * 6 + [True] * 1 + [False] * 4
    flips = count_flips(baseline, found)
    assert (flips.right_right, flips.right_wrong, flips.wrong_right, flips.wrong_wrong) == (4, 6, 1, 4)
    assert flips.p_value == pytest.approx(2 * binom.cdf(1, 7, 0.5))  # two-sided, 6 lost and 1 gained
    assert count_flips([True, False], [True, False]) == Flips(
        right_right=1, right_wrong=0, wrong_right=0, wrong_wrong=1, p_value=1.0
    )
    assert count_flips([True, False], [False, True]).p_value == 1
