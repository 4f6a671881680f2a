"""What an answer is worth: exact matches, POPE's yes and no, the soft accuracy of VQA."""

from __future__ import annotations

from collections.abc import Sequence

from mmtok_cli.data.datasets import Metric
from mmtok_cli.data.samples import Sample, normalise
from mmtok_cli.results.schema import YesNo

AGREEING = 3  # people who make an answer wholly right


def says_yes(answer: str) -> bool:
    """How POPE's official evaluation reads an answer: no if its first sentence has the word No, no or not, else yes.

    Its quirks are kept, so that scores compare with published ones: commas vanish, words are parted by single spaces
    alone, and NO, No! or Nothing mean yes (`evaluate.py` of POPE, arXiv 2305.10355, and LLaVA's `eval_pope.py`).
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score_of(sample: Sample, answer: str, metric: Metric) -> float | None:
    """What the answer is worth, 0 to 1; None where no right answer is known."""
    if metric == "vqa" and sample.answers:
        return soft_accuracy(answer, sample.answers)
    if sample.answer is None:
        return None
    if metric == "yes-no":
        return float(says_yes(answer) == is_yes(sample.answer))
    return float(sample.is_right(answer))


def is_yes(known: str) -> bool:
    """Whether the known answer is yes."""
    return normalise(known) == "yes"


def soft_accuracy(answer: str, said: Sequence[str]) -> float:
    """min(n / 3, 1), where n people said the same, letter case and punctuation at the ends aside.

    The formula of VQA (arXiv 1505.00468, section 5). The official script also takes out articles and writes numbers as
    digits, and averages over all but one of the people, so that three of ten who agree are worth 0.9 there.
    """
    agreeing = sum(normalise(answer) == normalise(other) for other in said)
    return min(agreeing / AGREEING, 1.0)


def yes_no(answers: Sequence[bool], known: Sequence[bool]) -> YesNo:
    """Scores of answers that say yes (True) or no, of which one or more are needed."""
    both = sum(a and k for a, k in zip(answers, known, strict=True))
    right = sum(a == k for a, k in zip(answers, known, strict=True))
    return YesNo(
        accuracy=right / len(known),
        precision=_share(both, sum(answers)),
        recall=_share(both, sum(known)),
        f1=_share(2 * both, sum(answers) + sum(known)),
        yes_ratio=sum(answers) / len(known),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
