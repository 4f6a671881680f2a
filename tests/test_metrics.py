"""Each metric against its official rule on several hundred generated answers, and against published examples."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import official_scores as official
import pytest
from cli_helpers import refused, run
from comparisons import usual

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.metrics import (
    METRICS,
    chosen_letter,
    normalise,
    paired_accuracy,
    paired_shares,
    says_yes,
    score_of,
    with_metric,
    yes_no,
)
from mmtok_cli.evaluation.summary import Retention, mean_retention
from mmtok_cli.results.merge import merge
from mmtok_cli.settings import CompareSettings

WORDS = (
    "a an the A The none zero one two three ten Two yes no Yes No. red Red RED dog dogs man's it's 's its dont don't "
    "cant couldnt've couldn'tve hes she's let's Im ive somebody'd somebodyd ow's'at y'allll oclock 3 03 3.0 1,000 1,5 "
    '5% -5 $5 5.5 .5 5. U.S. u.s.a p.m. 10:30 a/b a-b x+y c++ (red) [red] {red} <red> red! red? wow!! "red" `red` '
    "t-shirt é ß STRASSE 北京 红色。 “red” _x_ a@b.c #1 & ... … ; : , . - ' \t \n\n"
).split(" ")


def texts(generator: random.Random, count: int, longest: int = 4) -> list[str]:
    """Answers as models and annotators write them, with every kind of mark, word and space that the rules treat."""
    found = []
    for _ in range(count):
        words = generator.choices(WORDS, k=generator.randint(0, longest))
        found.append(generator.choice(("", "", " ")) + generator.choice((" ", " ", "", ", ", "  ")).join(words))
    return found


def several(generator: random.Random, prediction: str) -> list[str]:
    """Ten answers, some of which are variants of the prediction."""
    variants = [prediction, prediction.lower(), f"the {prediction}", f"{prediction}.", prediction.replace(" ", ", ")]
    pool = generator.sample(variants, 2) + texts(generator, 2, longest=2)
    return generator.choices(pool[: generator.choice((1, 4, 4, 4))], k=10)


def sample_of(*references: str, **others: Any) -> Sample:
    if len(references) == 1:
        return Sample((), "?", (), answer=references[0], **others)
    return Sample((), "?", (), answers=references, **others)


@pytest.mark.parametrize(("name", "rule"), [("textvqa", official.textvqa), ("vqav2", official.vqav2)])
def test_vqa_accuracy_is_that_of_the_official_scripts(
    name: MetricName, rule: Callable[[str, list[str]], float]
) -> None:
    """2,000 answers, each against ten annotators.

    The one departure: where all ten agree, VQAv2's script leaves normalisation to whoever submits the answers.
    """
    generator = random.Random(0)
    partly, unanimous = 0, 0
    for prediction in texts(generator, 2000):
        answers = several(generator, prediction)
        expected = rule(prediction, answers)
        found = score_of(sample_of(*answers), prediction, name)
        if name == "vqav2" and len({answer.strip() for answer in answers}) == 1 and found != expected:
            unanimous += 1
            assert (found, expected) == (1, 0)
            continue
        assert found == pytest.approx(expected), (prediction, answers)
        partly += 0 < expected < 1
    assert partly > 200 and (unanimous > 20) == (name == "vqav2")


def test_vqa_accuracy_of_published_examples() -> None:
    """The steps and their examples on visualqa.org/evaluation.html, and its average over ten choose nine annotators."""
    answers = ["cat"] * 3 + ["a dog"] * 2 + ["2"] + ["bird"] * 4
    written = {"dont": "don't", "100,978": "100978", "Girl’s!": "girl’s", "2:50 pm": "2:50 p.m.", "The 3.5": "3.5"}
    for name in ("vqav2", "textvqa"):
        found = [score_of(sample_of(*answers), said, name) for said in ("Cat.", "the dog", "two", "birds", "BIRD")]
        assert found == pytest.approx([0.9, 0.6, 0.3, 0, 1])
        assert all(score_of(sample_of(*[known] * 9, "x"), said, name) == 1 for said, known in written.items())


def test_anls_is_that_of_docvqas_script() -> None:
    generator = random.Random(1)
    above = 0
    for prediction in texts(generator, 600):
        near = prediction[1:] + generator.choice("abc ")
        references = [near, *texts(generator, generator.randint(0, 2))]
        expected = official.anls(prediction, references)
        assert score_of(sample_of(*references), prediction, "anls") == pytest.approx(expected)
        above += 0 < expected < 1
    assert above > 150
    assert score_of(sample_of("Hello World"), "Hello Wrld", "anls") == pytest.approx(10 / 11)
    assert score_of(sample_of("Coca Cola", "Pepsi"), "coca  cola", "anls") == 1
    assert score_of(sample_of("io", "Ia"), "Is", "anls") == 0.5
    assert score_of(sample_of("abc"), "xyc", "anls") == 0


def test_relaxed_accuracy_is_that_of_chartqa() -> None:
    generator = random.Random(2)
    right = 0
    numbers = ["0", "0.0", "5", "5.2", "4.75", "4.7", "-5", "5%", "0.05", "52.5%", "1e3", "1,000", "1000", "nan", "inf"]
    for _ in range(2000):
        prediction, target = generator.choices([*numbers, "Red", "red", "Yes", "no", "2010", "2011", ""], k=2)
        expected = official.relaxed(prediction, target)
        assert score_of(sample_of(target), prediction, "relaxed") == expected, (prediction, target)
        right += expected
    assert right > 100
    # The example in pix2struct's metrics_test.py: 62.5 % of these.
    said = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    known = ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"]
    scores = [score_of(sample_of(target), text, "relaxed") for text, target in zip(said, known, strict=True)]
    assert scores == [1, 1, 1, 1, 0, 1, 0, 0]
    assert score_of(sample_of("10", "20"), " 19.5\n", "relaxed") == 1


CHOICES = ("red", "blue", "a red car", "none")
ANSWERS = (
    "B|B.|(B)|B)|b|B. blue|(B) blue|B: blue|The answer is B|The answer is B.|Answer: B|**B**|Option B|blue|It is blue.|"
    "A or B|A red car|none of them|Z|E|A|A car is seen here, I think|B is the right answer because it looks blue|"
    "The car in the image, which is parked in front of a house, is blue|I cannot tell|[C]|C|D!|BLUE||A B|blue red"
).split("|")


def test_choices_are_read_as_vlmevalkit_reads_them() -> None:
    options = dict(zip("ABCD", CHOICES, strict=True))
    generator = random.Random(3)
    joined = [" ".join(generator.choices(ANSWERS, k=2)) for _ in range(600)]
    found = {}
    for said in [*ANSWERS, *joined]:
        found[said] = chosen_letter(said, options)
        assert found[said] == official.can_infer(said, dict(options)), said
    for said in ("B", "(B)", "B. blue", "The answer is B", "Answer: B", "**B**", "It is blue."):
        assert found[said] == "B"
    assert found["A or B"] is found["b"] is found["Z"] is None


def test_choices_come_from_the_sample_or_its_question_or_are_letters_alone() -> None:
    own = sample_of("B", choices=CHOICES)
    assert [score_of(own, said, "choice") for said in ("B. blue", "blue", "A", "")] == [1, 1, 0, 0]
    listed = Sample((), "Which?\nA. red\nB. blue\nAnswer.", (), answer="blue")
    assert [score_of(listed, said, "choice") for said in ("B", "It is blue", "(A)")] == [1, 1, 0]
    bare = sample_of("(f)")
    assert [score_of(bare, said, "choice") for said in ("F", "The answer is F.", "red", "E")] == [1, 1, 0, 0]
    assert METRICS["choice"].fault(sample_of("green", choices=CHOICES))
    assert not METRICS["choice"].fault(own) and not METRICS["choice"].fault(sample_of("A RED car.", choices=CHOICES))


def test_mme_is_scored_in_pairs() -> None:
    """Several kinds of different sizes, as the official script sums them."""
    generator = random.Random(4)
    pool = [
        "Yes",
        "yes",
        "No",
        "no",
        "No, it is not.",
        "yes!",
        "Yes, there is",
        "not sure",
        "maybe",
        "",
        "unknown",
        "A no",
    ]
    kinds = {"OCR": 20, "count": 150, "color": 1, "scene": 200}
    scores, labels, images, points = [], [], [], 0.0
    for kind, pairs in kinds.items():
        rows = []
        for number in range(2 * pairs):
            answer, prediction = generator.choice(("Yes", "No")), generator.choice(pool)
            rows.append((f"{number // 2}.png", "?", answer, prediction))
            scores.append(score_of(sample_of(answer), prediction, "mme") or 0.0)
            labels.append(kind)
            images.append(f"{number // 2}.png")
        points += official.mme(rows)
    found = paired_accuracy(scores, labels, images)
    assert found.points == pytest.approx(points) and found.kinds == 4
    assert found.points == pytest.approx(100 * 4 * (found.accuracy + found.accuracy_plus))
    assert sum(paired_shares(scores, labels, images)) * 100 == pytest.approx(2 * points)
    coins = [float(generator.random() < 0.5) for _ in range(8000)]  # the paper's values for guesses: 50 % and 25 %
    guessed = paired_accuracy(coins, ["a"] * 8000, [str(i // 2) for i in range(8000)])
    assert (guessed.accuracy, guessed.accuracy_plus) == pytest.approx((0.5, 0.25), abs=0.03)
    odd = paired_accuracy([1.0, 1.0, 1.0], ["a"] * 3, ["x", "x", "y"])
    assert (odd.points, odd.accuracy, odd.accuracy_plus) == (200, 1, 1)
    assert paired_accuracy([1.0], ["a"], ["x"]).points == 0


def test_retention_of_mme_is_the_ratio_of_its_points() -> None:
    kinds, images = ["a"] * 4 + ["b"] * 2, ["1", "1", "2", "2", "3", "3"]
    base, mine = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    shares = [paired_shares(column, kinds, images) for column in (base, mine)]
    retention = mean_retention(*shares, images, seed=0)
    points = [paired_accuracy(column, kinds, images).points for column in (base, mine)]
    assert isinstance(retention, Retention) and retention.value == pytest.approx(points[1] / points[0])


def test_pope_is_scored_as_by_its_script() -> None:
    generator = random.Random(5)
    pool = [
        "Yes",
        "No",
        "no.",
        "Yes, no doubt",
        "There is not.",
        "yes. no",
        "NO",
        "",
        "no,",
        "not,yes",
        "Nothing",
        "no\n",
    ]
    for _ in range(300):
        labels = ["yes", "no", *generator.choices(("yes", "no"), k=10)]
        predictions = ["Yes", "No", *generator.choices(pool, k=10)]
        found = yes_no([says_yes(text) for text in predictions], [label == "yes" for label in labels])
        expected = official.pope(predictions, labels)
        assert (found.accuracy, found.precision, found.recall, found.f1, found.yes_ratio) == pytest.approx(expected)


DIFFERENT = [
    ("-5", "5"),
    ("+", "-"),
    ("C", "C++"),
    ("C", "C#"),
    ("50", "50%"),
    ("50", "$50"),
    ("50", "50°"),
    ("5", ".5"),
    ("5", '5"'),
    ("5", "5'"),
    ("5", "5′"),
    ("5", "±5"),
    ("5", "5!="),
    ("", "+"),
    ("", "."),
    ("", "?"),
    ("?", "!"),
    ("<5", "5"),
    ("~5", "5"),
    ("2*", "2"),
    ("a&", "a"),
    ("@a", "a"),
    ("10", "1.0"),
    ("0123", "123"),
    ("3.10", "3.1"),
]
EQUAL = [
    ("Red.", "red"),
    ("  A  Red\tstar! ", "a red star"),
    ("红色。", "红色"),
    ("「红色」", "红色"),
    ("（红色）", "红色"),
    ("红色！", "红色"),
    ("“red”", "red"),
    ("‘red’", "red"),
    ("«rouge»", "rouge"),
    ("„rot“", "rot"),
    ("¿rojo?", "rojo"),
    ("أحمر؟", "أحمر"),
    ("लाल।", "लाल"),
    ("red…", "red"),
    ("(red)", "red"),
    ("[red]", "red"),
    ("'red'.", "red"),
    ('"5"', "5"),
    ("(-5)", "-5"),
    ("50 %.", "50 %"),
    ("3.0", "3"),
    ("-3.00", "-3"),
    ("STRASSE", "straße"),
    ("cafe\u0301", "café"),
    ("C++.", "c++"),
    ("6'2\"", "6'2\""),
    ("+", "+"),
    ("...", "..."),
]


def test_exact_match_ignores_case_and_marks_at_the_ends_alone() -> None:
    for one, other in DIFFERENT:
        assert normalise(one) != normalise(other), (one, other)
    for one, other in EQUAL:
        assert normalise(one) == normalise(other), (one, other)
        assert score_of(sample_of(other), one, "exact") == 1
    assert score_of(sample_of("cat", "dog"), "a dog", "exact") == 0
    assert score_of(sample_of("cat", "dog"), "Dog.", "exact") == 1


# Which metric, and what it cannot judge.


def dataset(metric: MetricName | None, *answers: str | None) -> Dataset:
    samples = [Sample((), "?", (), answer=a, id=str(i), place=f"a.jsonl, line {i}") for i, a in enumerate(answers, 1)]
    return Dataset("a.jsonl", samples, metric)


def test_every_metric_has_a_name_a_title_and_an_option() -> None:
    assert list(METRICS) == list(get_args(MetricName))
    described = CompareSettings.model_fields["metric"].description or ""
    assert [name for name in re.findall(r"[a-z0-9-]+", described.partition("Default")[0]) if name in METRICS] == list(
        METRICS
    )
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)
    assert all(metric.score.__doc__ for metric in METRICS.values())


@pytest.mark.parametrize("answers", [("no",), ("no", "no"), ("yes", "unknown"), ("Yes.", "NO"), ("yes", "no", None)])
def test_the_metric_does_not_depend_on_the_labels(answers: Sequence[str | None]) -> None:
    found = with_metric(dataset("yes-no", *answers), None)
    assert found.metric == "yes-no"
    assert [s.answer for s in found.samples] == [a for a in answers if a != "unknown"]
    unfit = "a.jsonl, line 2: the answer 'unknown' is neither yes nor no"
    assert found.problems == ((unfit,) if "unknown" in answers else ())
    assert with_metric(dataset("exact", *answers), None).metric == "exact"


def test_a_metric_by_hand() -> None:
    assert with_metric(dataset("exact", "yes", "no"), "yes-no").metric == "yes-no"
    mixed = dataset("exact", "yes", "red")
    unplaced = replace(mixed, samples=[replace(s, place="") for s in mixed.samples], problems=())
    assert with_metric(unplaced, "yes-no").problems == ("sample 2: the answer 'red' is neither yes nor no",)
    assert with_metric(dataset("exact", "true", "False"), "mme").metric == "mme"
    with pytest.raises(MMTokError, match="there is no metric 'f1'") as error:
        with_metric(dataset("exact", "yes"), "f1")
    assert all(name in error.value.hint for name in METRICS)
    with pytest.raises(MMTokError, match=r"a\.jsonl, line 1: VQA accuracy needs 3 reference answers, and it has 1"):
        with_metric(dataset("exact", "yes"), "vqav2")
    with pytest.raises(MMTokError, match=r"needs reference answers, and a\.jsonl has none"):
        with_metric(dataset(None, None), "exact")
    assert with_metric(dataset(None, None), None).metric is None
    refused(run("compare", "--metric", "f1"), "there is no metric 'f1'", "exact, yes-no")


def test_runs_with_different_metrics_are_not_shown_as_one() -> None:
    runs = [
        usual().model_copy(
            update={"schedule": usual().schedule.model_copy(update={"metric": name, "metric_title": name})}
        )
        for name in ("exact", "mme")
    ]
    merged = merge(runs)
    assert merged.schedule.metric is merged.schedule.metric_title is None
    assert "metric differs: exact (A), mme (B)" in merged.remarks
    assert merge(runs[:1] * 2).schedule.metric == "exact"
