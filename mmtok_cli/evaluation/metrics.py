"""The metrics: how the answers to a dataset are judged, each by the rule of the benchmark that it comes from.

`METRICS` is the registry. A metric gives each answer a score from 0 to 1; the summary of a case is their mean, except
that POPE's answers are summarised as F1 and MME's as paired accuracy.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from string import ascii_uppercase

import regex

from mmtok_cli.data.datasets import Dataset
from mmtok_cli.data.layouts import MetricName
from mmtok_cli.data.rows import shown_text
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.evaluation.vqa import textvqa_normalise, vqa_accuracy, vqav2_normalise
from mmtok_cli.results.schema import PairedAccuracy, YesNo

ANNOTATORS = 3  # reference answers that VQA accuracy needs
USUAL_OPTIONS = "ABCDE"  # where a sample does not list its choices
ANLS_THRESHOLD = 0.5
RELATIVE_ERROR = 0.05

# Sentence marks, quotes and brackets of any script. Operators, signs, currencies, units and primes are none of these.
MARK = regex.compile(r"[\p{Terminal_Punctuation}\p{Quotation_Mark}\p{Ps}\p{Pe}…¿¡]")
WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0+")
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Metric:
    """A way to judge answers.

    title: what the score is, in a few words. score: of an answer to a sample with at least one reference answer, from
    0 to 1. fault: why the reference answers of a sample are not fit for this metric; empty if they are.
    """

    title: str
    score: Callable[[str, Sample], float]
    fault: Callable[[Sample], str] = lambda sample: ""


def score_of(sample: Sample, answer: str, metric: MetricName) -> float | None:
    """The score of an answer, 0 to 1; None where there is no reference answer."""
    return METRICS[metric].score(answer, sample) if sample.references else None


def with_metric(dataset: Dataset, name: str | None) -> Dataset:
    """The dataset with the metric `name`, by default its own, and without the samples that it cannot judge.

    Raises MMTokError where there is no such metric, and where it cannot judge any sample.
    """
    if name is not None and name not in METRICS:
        raise MMTokError(f"there is no metric {name!r}", f"choose one of {', '.join(METRICS)}")
    metric = name or dataset.metric
    if metric is None:
        return dataset
    answered = {
        number: sample
        for number, sample in enumerate(dataset.samples, 1)
        if any(turn.references for turn in sample.turns)
    }
    if name and not answered:
        raise MMTokError(f"--metric {name} needs reference answers, and {dataset.name} has none", "omit --metric")
    faults = {
        number: fault
        for number, sample in answered.items()
        for turn in sample.turns
        if turn.references and (fault := METRICS[metric].fault(turn))
    }
    problems = [f"{answered[number].place or f'sample {number}'}: {fault}" for number, fault in faults.items()]
    if answered and len(faults) == len(answered):
        raise MMTokError(f"{problems[0]} (metric: {metric})", f"choose another with --metric: {', '.join(METRICS)}")
    return replace(
        dataset,
        metric=metric,
        samples=[sample for number, sample in enumerate(dataset.samples, 1) if number not in faults],
        problems=(*dataset.problems, *problems),
    )


# Exact match.


def exact_match(answer: str, sample: Sample) -> float:
    """Whether the answer is a reference answer, ignoring letter case and the marks that `normalise` removes."""
    return float(normalise(answer) in {normalise(reference) for reference in sample.references})


def normalise(text: str) -> str:
    """Case-folded, single spaces, no sentence marks, quotes or brackets of any script at either end.

    Signs, operators and units stay (-5, C++, 50%, .5, 6'2"), as does a text that consists of marks. 3.0 becomes 3.
    """
    whole = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    marks = "".join({" ", *MARK.findall(whole)})
    rest = whole.lstrip(marks)
    before = whole[: len(whole) - len(rest)]
    if rest[:1].isdecimal() and before.endswith((".", ",")):  # a decimal point
        rest = before[-1] + rest
    bare = rest.rstrip(marks)
    after = rest[len(bare) : len(bare) + 1]
    if bare[-1:].isdecimal() and after in {"'", '"', "’", "”"} and not before:  # feet or inches
        bare += after
    number = WHOLE_NUMBER.fullmatch(bare)
    return number[1] if number else bare or whole


# Yes or no.


def yes_or_no(reference: str) -> bool | None:
    """Whether a reference answer is yes (or true); None if it is neither yes nor no."""
    return {"yes": True, "true": True, "no": False, "false": False}.get(normalise(reference))


def is_yes(reference: str) -> bool:
    """Whether a reference answer is yes."""
    return yes_or_no(reference) is True


def says_yes(answer: str) -> bool:
    """How POPE's official evaluation reads an answer: no if its first sentence has the word No, no or not, else yes.

    Its quirks are kept, so that scores compare with published ones: commas are removed, words are separated by single
    spaces only, and NO, No! or Nothing mean yes (`evaluate.py` of POPE, arXiv 2305.10355, and LLaVA's `eval_pope.py`).
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_accuracy(answer: str, sample: Sample) -> float:
    """Whether the answer, as POPE reads it, is the reference answer. POPE's score is F1 over all samples."""
    return float(says_yes(answer) == is_yes(sample.references[0]))


def yes_no(answers: Sequence[bool], references: Sequence[bool]) -> YesNo:
    """Scores of one or more answers that are yes (True) or no (False)."""
    both = sum(a and r for a, r in zip(answers, references, strict=True))
    right = sum(a == r for a, r in zip(answers, references, strict=True))
    return YesNo(
        accuracy=right / len(references),
        precision=_share(both, sum(answers)),
        recall=_share(both, sum(references)),
        f1=_share(2 * both, sum(answers) + sum(references)),
        yes_ratio=sum(answers) / len(references),
    )


def mme_accuracy(answer: str, sample: Sample) -> float:
    """Whether the answer begins with the reference answer, yes or no, as MME's script reads it.

    The script (`eval_tool/calculation.py` of MME, arXiv 2306.13394) lowers the answer and takes the one of "yes" and
    "no" that its first four characters contain, "yes" first; others are wrong. Spaces around it are removed before.
    """
    start = answer.strip().lower()[:4]
    said = True if "yes" in start else False if "no" in start else None
    return float(said is yes_or_no(sample.references[0]))


def paired_accuracy(scores: Sequence[float], kinds: Sequence[str], images: Sequence[str]) -> PairedAccuracy:
    """MME's scores of one or more answers, each 0 or 1, of which two each are about an image.

    Images that lack one of their two questions, such as the last of an odd number of samples, are not counted.
    """
    single, both = defaultdict(list), defaultdict(list)
    for (kind, *_), places in _pairs(kinds, images).items():
        single[kind].append(sum(scores[place] for place in places) / 2)
        both[kind].append(float(all(scores[place] == 1 for place in places)))
    accuracy, plus = (sum(map(fmean, column.values())) for column in (single, both))
    return PairedAccuracy(
        accuracy=_share(accuracy, len(single)),
        accuracy_plus=_share(plus, len(single)),
        points=100 * (accuracy + plus),
        kinds=len(single),
    )


def paired_shares(scores: Sequence[float], kinds: Sequence[str], images: Sequence[str]) -> list[float]:
    """What each answer adds to the points of `paired_accuracy`, up to a constant factor, as values to resample."""
    shares = [0.0] * len(scores)
    pairs = _pairs(kinds, images)
    size = Counter(kind for kind, *_ in pairs)
    for (kind, *_), places in pairs.items():
        right = [scores[place] for place in places]
        for place in places:
            shares[place] = (sum(right) / 2 + float(all(value == 1 for value in right))) / size[kind]
    return shares


def _pairs(kinds: Sequence[str], images: Sequence[str]) -> dict[tuple[str, str, int], list[int]]:
    """The places of the two answers of each pair, in their order: an image may have several pairs of a kind."""
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, of in enumerate(zip(kinds, images, strict=True)):
        places[of].append(place)
    return {
        (kind, image, start): found[start : start + 2]
        for (kind, image), found in places.items()
        for start in range(0, len(found) - 1, 2)
    }


def _yes_no_fault(sample: Sample) -> str:
    reference = sample.references[0]
    return "" if yes_or_no(reference) is not None else f"the answer {shown_text(reference)} is neither yes nor no"


# Several reference answers.


def vqav2_accuracy(answer: str, sample: Sample) -> float:
    """VQA accuracy by VQAv2's script, see vqa.py.

    One departure: where all annotators agree, the script compares without normalisation, since it expects predictions
    that were normalised before they were submitted. Here they are normalised always.
    """
    return vqa_accuracy(vqav2_normalise(answer), [vqav2_normalise(reference) for reference in sample.references])


def textvqa_accuracy(answer: str, sample: Sample) -> float:
    """VQA accuracy by TextVQA's script, which the EvalAI server runs, see vqa.py."""
    return vqa_accuracy(textvqa_normalise(answer), [textvqa_normalise(reference) for reference in sample.references])


def anls(answer: str, sample: Sample) -> float:
    """Average normalised Levenshtein similarity to the nearest reference answer; 0 below one half.

    The script of DocVQA and InfographicVQA (arXiv 1907.00490; rrc.cvc.uab.es): edit distance of the lower-case texts
    with single spaces, divided by the length of the longer of the original texts.
    """
    distances = [_distance(answer, reference) for reference in sample.references]
    similarity = 1 - min(distances)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, sample: Sample) -> float:
    """ChartQA's relaxed accuracy: numbers may be off by 5 %, other answers must match but for letter case.

    The rule of arXiv 2203.10244, section 5.1, as computed by `relaxed_correctness` in pix2struct, Qwen-VL, lmms-eval
    and VLMEvalKit: 5% is 0.05, and where the reference answer is 0 the texts must match. The best of several reference
    answers counts.
    """
    return float(any(_is_close(answer.strip(), reference) for reference in sample.references))


def _annotators_fault(sample: Sample) -> str:
    given = len(sample.references)
    return "" if given >= ANNOTATORS else f"VQA accuracy needs {ANNOTATORS} reference answers, and it has {given}"


def _distance(answer: str, reference: str) -> float:
    longest = max(len(answer.upper()), len(reference.upper()))
    if not longest:
        return 0.0
    first, second = (" ".join(text.lower().split()) for text in (answer, reference))
    if abs(len(first) - len(second)) > ANLS_THRESHOLD * longest:  # below the threshold, whatever they say
        return 1.0
    return _edit_distance(first, second) / longest


def _edit_distance(first: str, second: str) -> int:
    """The number of characters to insert, delete or replace."""
    above = list(range(len(second) + 1))
    for row, a in enumerate(first, start=1):
        current = [row]
        for column, b in enumerate(second, start=1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (a != b)))
        above = current
    return above[-1]


def _is_close(answer: str, reference: str) -> bool:
    found, known = _number(answer), _number(reference)
    if found is None or not known:
        return answer.lower() == reference.lower()
    return abs(found - known) / abs(known) <= RELATIVE_ERROR


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# Multiple choice.


def choice_accuracy(answer: str, sample: Sample) -> float:
    """Whether the answer names the letter of the right choice, or contains the text of this choice alone.

    The rule of MMBench and other multiple-choice benchmarks where no language model judges (`can_infer` of VLMEvalKit,
    https://github.com/open-compass/VLMEvalKit): punctuation becomes spaces; if exactly one of the letters is a word of
    the answer, and among its last five, it counts; otherwise the choice whose text the answer contains, if there is
    exactly one and the answer is at most twice as long as all choices together. Letters are capital. VLMEvalKit's list
    of refusals by hosted models is left out.
    """
    return float(chosen_letter(answer, options_of(sample)) == _right_letter(sample))


def chosen_letter(answer: str, options: dict[str, str]) -> str | None:
    """The letter that an answer such as "B. red", "(B)" or "The answer is B" chooses; None if that is not clear."""
    words = answer.translate(dict.fromkeys(map(ord, ".()[],:;!*#{}"), " ")).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:  # what VLMEvalKit writes where a model refused
        return None
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def options_of(sample: Sample) -> dict[str, str]:
    """The choices of a sample by letter: its own, else those that its question lists, else only letters."""
    if sample.choices:
        return dict(zip(ascii_uppercase, sample.choices, strict=False))
    listed = {letter: text.rstrip() for letter, text in OPTION.findall(sample.question)}
    if len(listed) > 1:
        return listed
    right = normalise(sample.references[0]).upper()
    return dict.fromkeys(sorted({*USUAL_OPTIONS, *({right} & set(ascii_uppercase))}), "")


def _right_letter(sample: Sample) -> str | None:
    """The letter of the right choice, which the reference answer names or spells out."""
    options, reference = options_of(sample), normalise(sample.references[0])
    if reference.upper() in options:
        return reference.upper()
    return next((letter for letter, text in options.items() if text and normalise(text) == reference), None)


def _choice_fault(sample: Sample) -> str:
    if _right_letter(sample):
        return ""
    return f"the answer {shown_text(sample.references[0])} is neither the letter nor the text of a choice"


# Tasks of lmms-eval.


def task_score(answer: str, sample: Sample) -> float:
    """What the sample's own task makes of the answer. Raises MMTokError for a score that is not from 0 to 1."""
    assert sample.judge is not None, "`fault` comes first"
    score = sample.judge(answer)
    if not 0 <= score <= 1:
        raise MMTokError(f"its task scores an answer {score:g}, which is not from 0 to 1", "leave this task out")
    return score


def _task_fault(sample: Sample) -> str:
    return "" if sample.judge else "it has no task that judges answers; --tasks evaluates tasks of lmms-eval"


METRICS: dict[MetricName, Metric] = {
    "exact": Metric("exact match", exact_match),
    "yes-no": Metric("F1 of yes, by POPE's script", pope_accuracy, _yes_no_fault),
    "mme": Metric("mean of accuracy and paired accuracy, by MME's script", mme_accuracy, _yes_no_fault),
    "vqav2": Metric("VQA accuracy, by VQAv2's script", vqav2_accuracy, _annotators_fault),
    "textvqa": Metric("VQA accuracy, by TextVQA's script (EvalAI)", textvqa_accuracy, _annotators_fault),
    "anls": Metric("ANLS, as for DocVQA", anls),
    "choice": Metric("accuracy of the chosen letter, by VLMEvalKit's rule", choice_accuracy, _choice_fault),
    "relaxed": Metric("relaxed accuracy (5 %), as for ChartQA", relaxed_accuracy),
    "task": Metric("mean score of each answer, by its own task", task_score, _task_fault),
}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
