"""MMTok: multimodal coverage maximisation (arXiv 2508.18264, ICLR 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mmtok_cli.methods.base import RECORDED_OUTPUTS, Method, excluded_of, in_groups
from mmtok_cli.methods.keywords import keywords
from mmtok_cli.tokens import Selection, TextTokens, VisionTokens
from mmtok_cli.values import mirrored

if TYPE_CHECKING:
    from torch import Tensor

    from mmtok_cli.methods.coverage import Coverage


@dataclass(frozen=True)
class MMTok(Method):
    """Keeps the tokens that together cover the words of the question and the whole of the image best.

    The defaults are the paper's for LLaVA (section 4.1); a model's profile may override them. As in the authors'
    release, the words are those of the question without stop words (on Qwen all of them, after "Question:"), padding is
    never kept on LLaVA-1.5, an image that is cut into crops is covered crop by crop, and the number of tokens of a
    percentage is truncated. Not as released: several images in a prompt have a budget each, also on Qwen, where the
    release selects from all of them at once and its forward pass then fails. Images of 64 tokens or fewer, which the
    release never reduces on Qwen, are reduced like all others.
    """

    summary: ClassVar[str] = "covers question + image"
    source: ClassVar[str] = "arXiv 2508.18264"
    venue: ClassVar[str] = "ICLR 2026"
    licence: ClassVar[str] = "Apache-2.0"
    checked: ClassVar[str] = RECORDED_OUTPUTS
    reads_question: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    per_crop: ClassVar[bool] = True
    matrices: ClassVar[float] = 1.25

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def select(self, vision: VisionTokens, text: TextTokens, budget: int) -> Selection:
        return self._covering([vision], [text], [budget])[0]

    def select_batch(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
    ) -> list[Selection]:
        if (type(self).select, type(self).select_group) != (MMTok.select, MMTok.select_group):  # a subclass has its own
            return super().select_batch(vision, text, budgets)
        return self._covering(vision, text, budgets)

    def _covering(
        self, vision: Sequence[VisionTokens], text: Sequence[TextTokens], budgets: Sequence[int]
    ) -> list[Selection]:
        import torch

        words = self._words(text)

        def select(members: list[int]) -> list[Selection]:
            found = self.cover(
                [words[i] for i in members] if words else None,
                torch.stack([vision[i].projected for i in members]),
                self._features([vision[i] for i in members]),
                budgets[members[0]],
                excluded_of([vision[i] for i in members]),
            )
            parts = zip(found.indices, found.order, found.gains, strict=True)
            return [Selection(indices, order, gains) for indices, order, gains in parts]

        # Questions of any length go together on a GPU, where `select_tokens` makes one search of several.
        joint = not words or words[0].device.type != "cpu"
        return in_groups(vision, budgets, lambda i: 0 if joint else len(words[i]), select)

    def cover(
        self,
        words: Sequence[Tensor] | None,
        projected: Tensor,
        features: Tensor | None,
        budget: int,
        excluded: Tensor,
    ) -> Coverage:
        """The search itself, for images of one size. words: [words, dim] of each image. The other arguments are those
        of `select_tokens`, with the batch axis."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from mmtok_cli.methods.coverage import select_tokens

        text, mask, counts = None, None, torch.tensor([len(rows) for rows in words or ()])
        if words and bool((counts == counts[0]).all()):
            text = torch.stack(list(words))
        elif words:
            text = pad_sequence(list(words), batch_first=True)
            mask = mirrored(torch.arange(text.shape[1]) < counts[:, None], projected.device)
        return select_tokens(
            text,
            projected,
            features,
            budget,
            alpha=self.alpha,
            text_temperature=self.text_temperature,
            vision_temperature=self.vision_temperature,
            excluded=excluded,
            text_mask=mask,
        )

    def _words(self, text: Sequence[TextTokens]) -> list[Tensor]:
        """Embeddings of each question's words, [words, dim]; nothing where no words are covered."""
        embedded: dict[tuple[str, ...], Tensor] = {}
        found = []
        for each in text:
            words = tuple(keywords(each.question) if each.words is None else each.words)
            if words not in embedded:
                embedded[words] = each.embed(words)
            found.append(embedded[words])
        return found

    def _features(self, images: Sequence[VisionTokens]) -> Tensor | None:
        import torch

        return torch.stack([image.features for image in images])


@dataclass(frozen=True)
class TextCoverage(MMTok):
    """MMTok without its vision term: the T-V row of the paper's ablation (Table 6)."""

    summary: ClassVar[str] = "covers the question"

    def _features(self, images: Sequence[VisionTokens]) -> Tensor | None:
        return None


@dataclass(frozen=True)
class VisionCoverage(MMTok):
    """MMTok without its text term: the V-V row of the paper's ablation (Table 6)."""

    summary: ClassVar[str] = "covers the image"
    reads_question: ClassVar[bool] = False

    def _words(self, text: Sequence[TextTokens]) -> list[Tensor]:
        return []
