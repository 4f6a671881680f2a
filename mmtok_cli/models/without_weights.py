"""The files of a model without its weights, from which a serving engine builds its architecture at true size."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmtok_cli.models import hf
from mmtok_cli.models.base import VisionLanguageModel
from mmtok_cli.models.sources import shortened
from mmtok_cli.models.stand_in import StandInTokenizer


def save_without_weights(
    model: VisionLanguageModel, directory: Path, texts: Iterable[str], layers: int | None = None
) -> None:
    """Write the configuration and the processor of a model of `outline`.

    texts: all prompts that the engine will read. A stand-in for the vocabulary only knows the words of these there.
    layers: the first so many decoder layers alone. Raises MMTokError for more layers than there are.
    """
    config = copy.deepcopy(model.model.config)
    if layers is not None:
        config = shortened(config, layers, model.name)
    config.architectures = [type(model.model).__name__]
    config.save_pretrained(directory)
    processor = copy.copy(model.processor)
    if isinstance(processor.tokenizer, StandInTokenizer):
        processor.tokenizer = _stored(processor.tokenizer, texts)
    processor.save_pretrained(directory)


def _stored(stand_in: StandInTokenizer, texts: Iterable[str]) -> Any:
    """A tokenizer that can be stored, which gives these texts the tokens that the stand-in gives them."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    special = stand_in.get_vocab()
    pieces = {piece for text in texts for piece in stand_in.tokenize(text)} - special.keys()
    vocabulary = special | {piece: stand_in.convert_tokens_to_ids(piece) for piece in pieces}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=stand_in.unk_token or stand_in.pad_token))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(stand_in.pattern), behavior="removed", invert=True)
    if stand_in.bos_token is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{stand_in.bos_token} $A",
            pair=f"{stand_in.bos_token} $A $B",
            special_tokens=[(stand_in.bos_token, stand_in.bos_token_id)],
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {name: getattr(stand_in, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return hf.public("PreTrainedTokenizerFast")(
        tokenizer_object=tokenizer,
        padding_side="left",
        extra_special_tokens={"image_token": stand_in.image_token},
        **{name: token for name, token in roles.items() if token is not None},
    )
