"""Drafts: a first answer, whose words a method covers beside those of the question.

Version 1 of the MMTok paper let a small model (SmolVLM2-256M) write a draft, whose tokens were appended to those of the
question. The final version dropped it, and no code of it was released. As there, the draft stands behind the question,
and the language model does not read it. Here its words are treated like those of the question: on LLaVA, stop words do
not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmtok_cli.budget import Budget
from mmtok_cli.data.samples import Sample
from mmtok_cli.methods import make_method
from mmtok_cli.methods.base import Method
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.option_values import TEXT_DRAFT
from mmtok_cli.pipeline import answer
from mmtok_cli.rules import ImageScale, Rules

SELF = "self"


@dataclass(frozen=True)
class Draft:
    """Where a draft comes from: "self", the name of a model, or "text:" and the text itself.

    tokens: the most that it may have. model: the one that writes it, where that is another.
    """

    source: str
    tokens: int
    model: VisionLanguageModel | None = field(default=None, compare=False, repr=False)

    @property
    def writer(self) -> str | None:
        """The name of the other model that writes it."""
        return None if self.source == SELF or self.source.startswith(TEXT_DRAFT) else self.source

    def write(
        self,
        model: VisionLanguageModel,
        method: Method,
        samples: Sequence[Sample],
        budget: Budget | None,
        rules: Rules,
        image_scale: ImageScale = 1,
    ) -> list[str]:
        """The draft of each sample.

        The model's own draft is a whole run of its own, image encoder included, with the same method, budget and scale;
        another model sees its whole image.
        """
        if self.source.startswith(TEXT_DRAFT):
            return [self.source.removeprefix(TEXT_DRAFT).strip()] * len(samples)
        if self.source == SELF:
            said = answer(
                model, method, samples, budget, rules=rules, max_new_tokens=self.tokens, image_scale=image_scale
            )
            return said.texts
        assert self.model is not None, "load_writer comes first"
        return answer(self.model, make_method("full"), samples, None, max_new_tokens=self.tokens).texts
