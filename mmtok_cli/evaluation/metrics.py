"""Metrics of answers: exact matches, yes and no as POPE scores them, VQA's soft accuracy; and fidelity of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmtok_cli.data.datasets import Metric
from mmtok_cli.data.samples import Sample, normalise
from mmtok_cli.results.records import Closeness
from mmtok_cli.results.schema import YesNo

if TYPE_CHECKING:
    from torch import Tensor

FULL_AGREEMENT = 3  # people who must have given an answer for it to be entirely right


def score_of(sample: Sample, answer: str, metric: Metric) -> float | None:
    """The score of an answer, 0 to 1; None where there is no reference answer."""
    if metric == "vqa" and sample.answers:
        return soft_accuracy(answer, sample.answers)
    if sample.answer is None:
        return None
    if metric == "yes-no":
        return float(says_yes(answer) == is_yes(sample.answer))
    return float(sample.is_right(answer))


def says_yes(answer: str) -> bool:
    """How POPE's official evaluation reads an answer: no if its first sentence has the word No, no or not, else yes.

    Its quirks are kept, so that scores compare with published ones: commas are removed, words are separated by single
    spaces only, and NO, No! or Nothing mean yes (`evaluate.py` of POPE, arXiv 2305.10355, and LLaVA's `eval_pope.py`).
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def is_yes(reference: str) -> bool:
    """Whether the reference answer is yes."""
    return normalise(reference) == "yes"


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(n / 3, 1), where n people gave this answer, ignoring letter case and punctuation at the ends.

    The formula of VQA (arXiv 1505.00468, section 5). The official script also takes out articles and writes numbers as
    digits, and averages over all but one of the people, so that three of ten who agree are worth 0.9 there.
    """
    agreeing = sum(normalise(answer) == normalise(reference) for reference in references)
    return min(agreeing / FULL_AGREEMENT, 1.0)


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


def closeness_of(reference: Tensor, logits: Tensor, mask: Tensor) -> list[Closeness]:
    """Fidelity of each sample of a batch: its logits compared with those of the unreduced model.

    reference, logits: [batch, steps, vocabulary]. mask: [batch, steps], True for the tokens that count.
    """
    from torch.nn.functional import kl_div

    expected, log_probabilities = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = kl_div(log_probabilities, expected, reduction="none", log_target=True).sum(-1).clamp(min=0)
    agrees = reference.argmax(-1) == logits.argmax(-1)
    count = mask.sum(1)
    means = (kl * mask).sum(1) / count
    shares = (agrees & mask).sum(1) / count
    same = (agrees | ~mask).all(1)
    return [
        Closeness(kl=kl, top1=top1, same=all_agree)
        for kl, top1, all_agree in zip(means.tolist(), shares.tolist(), same.tolist(), strict=True)
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
