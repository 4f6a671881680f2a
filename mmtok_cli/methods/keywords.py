"""The words of a question that MMTok covers, exactly as the released LLaVA code picks them.

The paper (arXiv 2508.18264) mentions this step only in figure 2; the list and the rules are those of the release.
"""

import re

STOP_WORDS = frozenset(
    (
        "a an the is are was were be been being have has had do does did it they he she we you i "
        "what where when why how who which and or but so if then question answer "
        "to for with by from at into onto upon"
    ).split()
)
INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_WORD = re.compile(r"\b\w+\b")
_IMAGE_MARKERS = re.compile(r"\A<image>(?: +<image>)* *\n")


def keywords(question: str) -> list[str]:
    """The words to cover, in the order of the question; what the tokenizer gets as a pre-split text.

    A leading line of `<image>` markers is dropped first. A question of stop words alone stays whole, punctuation
    included: "What is it?" gives "What", "is", "it?". So does one without any word, such as a single emoji. The list
    is empty if the question is empty, blank, or nothing but instructions.
    """
    return filter_text(strip_image_markers(question)).split()


def strip_image_markers(question: str) -> str:
    """The question without `<image>` markers on a line of their own at its start; markers elsewhere stay."""
    return _IMAGE_MARKERS.sub("", question)


def filter_text(text: str) -> str:
    """`text` without benchmark instructions, punctuation and stop words; if no word is left, only the first go.

    Case does not matter, so the option letter "A" goes too.
    """
    for instruction in INSTRUCTIONS:
        text = text.replace(instruction, "")
    return " ".join(word for word in _WORD.findall(text) if word.lower() not in STOP_WORDS) or text
