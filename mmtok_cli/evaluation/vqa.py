"""VQA accuracy as the official scripts compute it: their normalisation of answers and their average over annotators.

VQAv2: `vqaEval.py` of https://github.com/GT-Vision-Lab/VQA (arXiv 1505.00468, section 5). TextVQA:
`EvalAIAnswerProcessor` and `TextVQAAccuracyEvaluator` of https://github.com/facebookresearch/mmf (`m4c_evaluators.py`),
used by the EvalAI server, LLaVA and lmms-eval. Both share everything but the first step. Their quirks are kept, so that
scores compare with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH = 3  # other annotators who gave an answer that is entirely right

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the scripts pass re.UNICODE, which is 32, where the number of replacements belongs
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Written with any one apostrophe left out -> as it should be. The scripts hold one entry the wrong way round.
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in CONTRACTED.split()
    for place, mark in enumerate(form)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


def vqav2_normalise(answer: str) -> str:
    """An answer or a reference answer as VQAv2's script compares it."""
    return _without_articles(_without_punctuation(_one_line(answer)))


def textvqa_normalise(answer: str) -> str:
    """An answer or a reference answer as TextVQA's script compares it."""
    words = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqav2_normalise(words.strip())


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean of min(n / 3, 1) over the annotators, where n of the others gave this answer: 0.9 for three of ten.

    answer, references: normalised. With fewer than four annotators no answer reaches 1.
    """
    given = sum(reference == answer for reference in references)
    left_out = given * min((given - 1) / ENOUGH, 1) + (len(references) - given) * min(given / ENOUGH, 1)
    return left_out / len(references)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Punctuation marks are removed beside a space, and everywhere if a comma groups digits; else they become spaces.

    Periods are removed unless a digit follows.
    """
    grouped = COMMA_IN_NUMBER.search(text)
    found = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or grouped else " ")
    return PERIOD.sub("", found, count=MOST_PERIODS)


def _without_articles(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes where contractions lack them."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
