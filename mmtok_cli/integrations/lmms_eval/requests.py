"""What lmms-eval asks of a model, as samples, and how it wants to be answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mmtok_cli.data.images import image_name, in_rgb, open_image
from mmtok_cli.data.samples import Sample
from mmtok_cli.errors import MMTokError
from mmtok_cli.models.base import IMAGE_MARKER

MOST_NEW_TOKENS = 1024  # of an answer where a task sets no limit, as in lmms-eval's own models
WITHOUT_EFFECT = {  # on greedy decoding
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "early_stopping",
    "length_penalty",
    "seed",
    "use_cache",
    "image_aspect_ratio",  # of LLaVA's own code; here the model's processor decides
}
GREEDY = "the model mmtok decodes greedily: add --gen_kwargs do_sample=False,temperature=0,num_beams=1"


@dataclass(frozen=True)
class Generation:
    """How an answer is generated: greedily, with at most `max_new_tokens`, up to the first of the texts `until`."""

    max_new_tokens: int
    until: tuple[str, ...] = ()

    @staticmethod
    def of(arguments: Mapping[str, Any] | None) -> Generation:
        """From lmms-eval's generation arguments. Raises MMTokError for sampling, beam search and unknown arguments."""
        given = {name: value for name, value in (arguments or {}).items() if value not in (None, "None")}
        until = given.pop("until", ())
        longest = given.pop("max_new_tokens", MOST_NEW_TOKENS)
        _require_greedy(*(given.pop(name, None) for name in ("do_sample", "temperature", "num_beams")))
        if given.get("repetition_penalty") == 1:
            del given["repetition_penalty"]
        unknown = sorted(given.keys() - WITHOUT_EFFECT)
        if unknown:
            raise MMTokError(
                f"the generation argument {unknown[0]}={given[unknown[0]]!r} is not supported",
                f"the model mmtok knows until, max_new_tokens and greedy decoding; --gen_kwargs {unknown[0]}=None "
                "leaves it out",
            )
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or longest != int(longest) or longest < 1:
            raise MMTokError(f"max_new_tokens={longest!r} is not a number of tokens", "give 1 or more")
        stops = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(stop, str) for stop in stops):
            raise MMTokError(f"until={until!r} is not a text or a list of texts", "as in the task's generation_kwargs")
        return Generation(int(longest), tuple(filter(None, stops)))

    def cut(self, answer: str) -> str:
        """The answer up to the first text that ends it."""
        ends = [place for stop in self.until if (place := answer.find(stop)) >= 0]
        return answer[: min(ends)] if ends else answer


def _require_greedy(do_sample: Any, temperature: Any, beams: Any) -> None:
    """Where the arguments do not say whether to sample, a temperature above 0 does, as in lmms-eval's own models."""
    for name, value in (("temperature", temperature), ("num_beams", beams)):
        if value is not None and not isinstance(value, (int, float)):
            raise MMTokError(f"{name}={value!r} is not a number", GREEDY)
    warm = temperature is not None and temperature > 0
    if (do_sample and (warm or temperature is None)) or (do_sample is None and warm):
        heat = f" (temperature {temperature:g})" if warm else ""
        raise MMTokError(f"answers would be sampled{heat}", GREEDY)
    if beams is not None and beams > 1:
        raise MMTokError(f"answers would be searched for with {beams} beams", GREEDY)


@dataclass(frozen=True)
class Place:
    """Which document of which task a request is about. padding: it only keeps the processes in step."""

    task: str
    doc_id: int
    split: str
    padding: bool = False

    def __str__(self) -> str:
        return f"{self.task}, document {self.doc_id}"

    @staticmethod
    def of(request: Any) -> Place:
        """Of an instance of lmms-eval, whose arguments end with document, task and split."""
        doc_id, task, split = request.args[-3:]
        return Place(task, doc_id, split, bool((request.metadata or {}).get("__padding_only__")))


def document_of(place: Place, documents: Mapping[str, Any]) -> Any:
    """The document of a request. documents: by task and split, as lmms-eval gives them to a model."""
    return documents[place.task][place.split][place.doc_id]


def sample_of_text(place: Place, text: str, visuals: Iterable[Any] | None) -> Sample:
    """The sample of a request that has a text and visuals: images come first, or at the text's `<image>` markers.

    Raises MMTokError for visuals that are not images, and where there are none.
    """
    images = [_image(place, visual) for visual in visuals or ()]
    if not images:
        raise MMTokError(f"{place}: it has no image", "mmtok reduces the vision tokens of images; choose other tasks")
    return Sample(
        tuple(images), text, tuple(map(image_name, images)), id=str(place.doc_id), kind=place.task, place=str(place)
    )


def sample_of_messages(place: Place, messages: Sequence[Mapping[str, Any]]) -> Sample:
    """The sample of a request that has chat messages, of which there may be one, by the user.

    Images before all text come before the question, as in a request with a text; among text they become `<image>`
    markers. Raises MMTokError for other messages, and for content that is neither text nor image.
    """
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise MMTokError(
            f"{place}: its prompt has messages of {', '.join(roles)}, and mmtok's prompts have one question",
            "run this task with --force_simple",
        )
    content = messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    visuals = [part.get("url", part.get("image")) for part in parts if part["type"] == "image"]
    other = [part["type"] for part in parts if part["type"] not in ("text", "image")]
    if other:
        raise _not_an_image(place, other[0])
    first_text = next((number for number, part in enumerate(parts) if part["type"] == "text"), len(parts))
    if any(part["type"] == "image" for part in parts[first_text:]):
        text = "".join(IMAGE_MARKER if part["type"] == "image" else part["text"] for part in parts)
    else:
        text = "".join(part["text"] for part in parts[first_text:])
    return sample_of_text(place, text, visuals)


def sample_of(request: Any, documents: Mapping[str, Any]) -> Sample:
    """The sample of a `generate_until` request of either kind: with a text, or with messages."""
    place = Place.of(request)
    document = document_of(place, documents)
    if callable(request.args[1]):
        return sample_of_messages(place, request.args[1](document))
    text, _, doc_to_visual = request.args[:3]
    return sample_of_text(place, text, _visuals(doc_to_visual, document))


def generation_of(request: Any) -> Generation:
    """Raises MMTokError that names the task for arguments that are not supported."""
    arguments = request.args[2] if callable(request.args[1]) else request.args[1]
    try:
        return Generation.of(arguments)
    except MMTokError as error:
        raise MMTokError(f"{Place.of(request).task}: {error.message}", error.hint) from error


def answer_rounds(request: Any, documents: Mapping[str, Any], ask: Callable[[Sample, int], str]) -> list[str]:
    """Answer the rounds of a `generate_until_multi_round` request until its task ends them.

    ask: answers the sample of a round, from 0. The task makes each round's prompt of the answers so far.
    """
    place = Place.of(request)
    document = document_of(place, documents)
    with_messages = len(request.args) == 6  # its second argument makes messages, also of later rounds
    answers = [ask(sample_of(request, documents), 0)]
    information: Any = None
    while True:
        next_round = request.args[1] if with_messages else request.args[3]
        payload = next_round(
            document, round_idx=len(answers), previous_output=list(answers), previous_round_info=information
        )
        if with_messages:
            messages, ended, _, information = payload
        else:
            visuals, text, ended, _, information = payload
        if ended:
            return answers
        sample = sample_of_messages(place, messages) if with_messages else sample_of_text(place, text, visuals)
        answers.append(ask(sample, len(answers)))


def choice_of(request: Any, documents: Mapping[str, Any]) -> tuple[Sample, str]:
    """The sample of a `loglikelihood` request, and the continuation whose likelihood is asked for.

    Raises MMTokError for a continuation without a document, as tasks that measure mutual information ask for.
    """
    if len(request.args) != 6:
        raise MMTokError(
            "the likelihood of a text without its document is not supported",
            "choose another metric than acc_mutual_info",
        )
    place = Place.of(request)
    document = document_of(place, documents)
    text, target, doc_to_visual = request.args[:3]
    continuation = target if isinstance(target, str) else str(target(document))
    return sample_of_text(place, text, _visuals(doc_to_visual, document)), continuation


def _visuals(doc_to_visual: Any, document: Any) -> list[Any]:
    return list(doc_to_visual(document) or ()) if callable(doc_to_visual) else []


def _image(place: Place, visual: Any) -> Image:
    try:
        if isinstance(visual, Image):
            return in_rgb(visual)
        if isinstance(visual, (str, Path)):
            return open_image(visual)
    except MMTokError as error:
        raise MMTokError(f"{place}: {error.message}", error.hint) from error
    raise _not_an_image(place, type(visual).__name__)


def _not_an_image(place: Place, kind: str) -> MMTokError:
    return MMTokError(f"{place}: it has a visual that is not an image ({kind})", "mmtok reduces images only")
