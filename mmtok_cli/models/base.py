"""The interface that every model family implements.

A family is one file with a subclass of `VisionLanguageModel`, and one line in `FAMILIES` (models/families.py). It must
define `total`, `smaller`, `whole_grid`, `pixels`, `encode`, `first_block` and `panels`. Override the rest where the
family differs:

    signals             what the encoder offers to methods; `encode` computes those that a method requests
    positions           if positions cannot be renumbered
    load_processor      if AutoProcessor does not suit
    stand_in_processor  for `--weights random` without any download
    image_text, placeholders, reserved  how images are written in a prompt
    keep, unencoded, released_words, position_ids, encoded_images, first_cut
    sees_videos, slices, has_text_within, placeholders_behind  for videos
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad

from mmtok_cli.budget import Budget, UnmetBudgetError
from mmtok_cli.errors import MMTokError
from mmtok_cli.models import hf
from mmtok_cli.models.foreign_errors import COMPARE, errors_as
from mmtok_cli.models.inside import Inside
from mmtok_cli.models.sequences import CutImage
from mmtok_cli.rules import FIXED, NATIVE, Positions, Track
from mmtok_cli.stages import Stage, unwatched
from mmtok_cli.tokens import PADDING, Crops, Selection, TextTokens, VisionTokens
from mmtok_cli.values import mirrored, on_host, require, to_device
from mmtok_cli.video import Video, Visual

Grid = tuple[int, int]  # rows, columns
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
LONGEST_TOKEN = 64  # characters; longer ones, such as runs of spaces, are rare
IMAGE_MARKER = "<image>"  # marks the place of an image in a question
STAND_IN = "answer"  # for the answers of a conversation whose text is rendered before they are known


@dataclass(frozen=True)
class Prompt:
    """A batch of questions about images, as the processor made it.

    input_ids, attention_mask: [batch, length], left-padded, with one placeholder for each vision token; on the host,
        where the shorter prompt is made of them.
    pixel_values: one tensor per image, since images may be encoded at different sizes.
    images: the opened pictures and videos. owners[i]: the row that image i belongs to. grids: at which each image is
        encoded; None is the model's own choice.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: tuple[Tensor, ...]
    images: tuple[Visual, ...]
    image_ids: tuple[str, ...]
    grids: tuple[Grid | None, ...]
    owners: tuple[int, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """Vision tokens that form a rectangle over the image, to be drawn.

    tokens: [rows * columns], the vision token of each cell. boxes: the area of the image that each cell covers; cells
    of padding lie outside the image. frame: the number of the frame that a panel of a video lies over.
    """

    title: str
    grid: Grid
    tokens: tuple[int, ...]
    boxes: tuple[Box, ...]
    frame: int = 0


class VisionLanguageModel(ABC):
    """A transformers model and its processor, with access to the steps between which vision tokens can be reduced.

    The model is not changed: encoding and the forward pass are transformers' own, and a reduced prompt is an ordinary
    prompt with fewer placeholders.
    """

    family: ClassVar[str]
    positions: ClassVar[tuple[Positions, ...]] = ("renumber", "keep")  # supported; the first is the harmonised policy
    signals: ClassVar[tuple[str, ...]] = ()  # names of what `encode` can compute for methods
    weights: str = "pretrained"  # or "random"
    depth: int | None = None  # decoder layers of the whole model, if only the first ones were loaded
    quantization: str | None = None  # how the weights are quantized, if they are
    compiled: bool = False  # whether the language model is compiled
    fixed_tokens: int | None = None  # about how many vision tokens every image is scaled to, if not its own number
    any_resolution: ClassVar[bool] = False  # whether images are seen at their own resolution
    sees_videos: ClassVar[bool] = False
    first_cut_reason: ClassVar[str] = ""  # why no vision tokens may be dropped before `first_cut`, in a word or two

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not self.eos_token_ids or self.tokenizer.pad_token_id is None:
            raise MMTokError(
                f"{name} names no token that ends an answer, so that every answer would be of the greatest length",
                "set eos_token in tokenizer_config.json, as in the original",
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the weights are, the encoder's device first: several with --device-map."""
        return tuple(dict.fromkeys((self.device, *(parameter.device for parameter in self.model.parameters()))))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def attention(self) -> str:
        """The attention kernel in use: sdpa, eager, flash_attention_2."""
        return hf.attention_kernel(self.model)

    @property
    def encoder_attention(self) -> str:
        """The attention kernel of the vision encoder."""
        return hf.encoder_attention_kernel(self.model)

    @property
    def context_length(self) -> int:
        """The longest sequence that the language model supports, in tokens."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def layer_count(self) -> int:
        """Decoder layers of the whole language model."""
        return self.depth or self.loaded_layers

    @property
    def loaded_layers(self) -> int:
        """Decoder layers that were loaded: fewer than `layer_count` with --layers."""
        return self.model.config.text_config.num_hidden_layers

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def image_text(self) -> str:
        """The text that replaces an image marker of a question."""
        return self.processor.image_token

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that stand in a prompt for vision tokens, of images and of videos."""
        return (self.image_token_id,)

    def placeholders(self, count: int) -> str:
        """The text of an image of `count` vision tokens, in place of the chat template's image token."""
        return self.processor.image_token * count

    def expanded(self, text: str, images: Sequence[Visual], counts: Sequence[int]) -> str:
        """A prompt as text, in which each image's token has become placeholders for its vision tokens (`counts`).

        The chat template gives a video the place of an image.
        """
        before, *after = text.split(self.processor.image_token)
        return before + "".join(self.placeholders(n) + part for n, part in zip(counts, after, strict=True))

    def as_image(self, image: Visual) -> Image:
        """The image, in families that see images only. Raises MMTokError for a video."""
        if isinstance(image, Video):
            raise MMTokError(
                f"{self.name} sees images only, and this is a video",
                "use a model of Qwen2.5-VL, Qwen3-VL, Qwen3.5 or LLaVA-OneVision; `mmtok models` lists them",
            )
        return image

    def require_visible(self, images: Sequence[Visual]) -> None:
        """Raises MMTokError for a video, in families that see images only."""
        if not self.sees_videos:
            for image in images:
                self.as_image(image)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the generation settings, and the tokenizer's."""
        ids = hf.end_tokens(self.model)
        named = list(ids) if isinstance(ids, list | tuple) else [ids]
        return tuple(dict.fromkeys(i for i in (*named, self.tokenizer.eos_token_id) if i is not None))

    @property
    def reserved(self) -> tuple[str, ...]:
        """Tokens that a question must not contain because they mark images."""
        return (self.processor.image_token,)

    @property
    def first_cut(self) -> int:
        """The first decoder layer before which vision tokens may be dropped; earlier layers need all of them."""
        return 0

    @property
    def linear_layers(self) -> frozenset[int]:
        """The loaded decoder layers that have linear attention, which keeps a state of fixed size and no rows."""
        kinds = hf.layer_types(self.model.config.text_config)
        return frozenset(number for number, kind in enumerate(kinds) if kind == hf.LINEAR)

    @property
    def layer_group(self) -> int:
        """Decoder layers after which the kinds of their attention repeat; 1 where all are of one kind."""
        return hf.layer_group(self.model.config.text_config)

    @classmethod
    def stand_in_processor(cls, config: Any, chat_template: str) -> Any:
        """A processor for models whose own files are not at hand; see models/stand_in.py.

        Only `--weights random` without any download needs it. Raises MMTokError for families that have none.
        """
        raise MMTokError(
            f"the {cls.family} family has no stand-in processor, so --weights random needs the model's own processor "
            "files, which are not in the local cache",
            "download the processor and tokenizer files of the model",
        )

    @classmethod
    def load_processor(cls, source: str, *, local_files_only: bool = False) -> Any:
        """The processor of a directory or hub id. Raises OSError or ValueError where there is none."""
        return hf.load_processor(source, local_files_only=local_files_only)

    @property
    def resolution(self) -> str | None:
        """The resolution of images, as in --pixels; None for families of fixed resolution."""
        if not self.any_resolution:
            return None
        return NATIVE if self.fixed_tokens is None else f"{FIXED}{self.fixed_tokens}"

    @classmethod
    def require_resolution(cls, name: str, fixed: int | None) -> None:
        """Raises MMTokError for a number of vision tokens that images of the model cannot be scaled to."""
        if fixed is not None and not cls.any_resolution:
            raise MMTokError(
                f"{name} sees images at a fixed resolution, so --pixels can only be native",
                "omit --pixels, or make images smaller with --image-scale",
            )

    @abstractmethod
    def total(self, image: Visual) -> int:
        """Vision tokens of the unreduced image."""

    def slices(self, image: Visual) -> int:
        """Slices in time of a video, each of equally many vision tokens; 0 of an image."""
        return 0

    def shortened(self, image: Visual, slices: int) -> Visual:
        """A video of which only so many slices in time are left, evenly spaced."""
        assert isinstance(image, Video)  # an image has no slices
        count = self.slices(image)
        pace = frames_of_slice(image, count)
        chosen = [(2 * i + 1) * count // (2 * slices) for i in range(slices)]
        return image.part([frame for i in chosen for frame in range(i * pace, min((i + 1) * pace, len(image)))])

    def has_text_within(self, image: Visual) -> bool:
        """Whether text stands between the vision tokens of an image in a prompt, as the times of a video's slices."""
        return False

    def placeholders_behind(self, vision: VisionTokens) -> int:
        """Placeholders behind those of an image's vision tokens that stand for none of them, and always stay."""
        return 0

    def keep(self, image: Visual, budget: Budget, track: Track) -> int:
        """Vision tokens to keep of the image. Raises UnmetBudgetError for a budget that it cannot meet."""
        return budget.resolve(self.total(image))

    def unencoded(self, image: Visual) -> VisionTokens:
        """What is known of the vision tokens of the unreduced image before it is encoded, on the CPU.

        Which tokens are eligible, and how crops are packed; tokens and features have no values, [tokens, 0].
        """
        total = self.total(image)
        return without_values(torch.ones(total, dtype=torch.bool), (1, total))

    @abstractmethod
    def smaller(self, image: Visual, tokens: int) -> Grid:
        """The grid at which a smaller version of the image is encoded to `tokens` vision tokens, or slightly fewer if
        the family cannot meet the number. Raises UnmetBudgetError where there is no such grid."""

    @abstractmethod
    def whole_grid(self, image: Visual) -> Grid:
        """The grid of vision tokens that an image of its own size takes up in one piece, without padding.

        Smaller versions of it have a share of its rows and columns (see image_scale.py).
        """

    @abstractmethod
    def first_block(self, image: Visual) -> Tensor:
        """What the first block of the encoder makes of an image of its own size: [patches, dim], without padding.

        Of an image that is cut into crops, the view of the whole. Use it within `torch.inference_mode()`.
        """

    @abstractmethod
    def pixels(self, image: Visual, grid: Grid | None) -> Tensor:
        """The encoder's input for one image, at the grid or at the model's own size, on the CPU."""

    def prepare(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Visual]],
        image_ids: Sequence[Sequence[str]],
        grids: Sequence[Grid | None],
    ) -> Prompt:
        """Turn questions and their images into a prompt whose images are encoded at `grids` (one for each image).

        Images come before the question, or at its markers: "Is <image> darker than <image>?".
        Raises MMTokError unless a question has no markers or one for each image.
        """
        flat = [image for group in images for image in group]
        encoded = self.tokenize(questions, images, grids)
        pixels = [self.pixels(image, grid) for image, grid in zip(flat, grids, strict=True)]
        return Prompt(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            pixel_values=tuple(to_device(p.to(self.dtype), self.device) for p in pixels),
            images=tuple(flat),
            image_ids=tuple(name for group in image_ids for name in group),
            grids=tuple(grids),
            owners=tuple(row for row, group in enumerate(images) for _ in group),
            questions=tuple(questions),
        )

    def tokenize(
        self, questions: Sequence[str], images: Sequence[Sequence[Visual]], grids: Sequence[Grid | None]
    ) -> Any:
        """The tokens of the prompts, padded on the left: `input_ids` and `attention_mask` [batch, length].

        Arguments and errors as for `prepare`.
        """
        flat = [image for group in images for image in group]
        self.require_visible(flat)
        sizes = zip(flat, grids, strict=True)
        counts = iter(self.total(image) if grid is None else grid[0] * grid[1] for image, grid in sizes)
        texts = [
            self.expanded(self.chat(question, len(group)), group, [next(counts) for _ in group])
            for question, group in zip(questions, images, strict=True)
        ]
        bos = self.tokenizer.bos_token
        return self.tokenizer(
            texts,
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        )

    def chat(self, question: str, images: int) -> str:
        """The prompt as text, with one image token for each image.

        Raises MMTokError for a question that does not suit the images, and for a chat template that fails.
        """
        return self._rendered([self._user_message(question, images)], images)

    def conversation(self, questions: Sequence[str], images: int, answer: str = STAND_IN) -> str:
        """The prompt as text of several questions, the first of which is about the images, with an answer between.

        Raises MMTokError as `chat` does.
        """
        first, *later = questions
        messages = [self._user_message(first, images)]
        for question in later:
            messages += [_message("assistant", answer), self._user_message(question, 0)]
        return self._rendered(messages, images)

    def next_turn(self, earlier: Sequence[str], question: str, images: int) -> Tensor:
        """The tokens between an answer of a conversation and the next one, [tokens], on the host.

        They are those of the text by which two renderings of the chat template differ: what ends the answer, the next
        question, and what begins the next answer. earlier: the questions before, of which the first is about `images`
        images. Raises MMTokError for an unsuitable question, and for a template that renders earlier turns differently
        once others follow them.
        """
        if IMAGE_MARKER in question:
            raise MMTokError(
                f"a later question of a conversation has an {IMAGE_MARKER} marker", "put images into the first question"
            )
        before, whole = self.conversation(earlier, images), self.conversation([*earlier, question], images)
        rest = whole.removeprefix(before).lstrip()
        if not whole.startswith(before) or not rest.startswith(STAND_IN):
            raise MMTokError(
                f"the chat template of {self.name} changes earlier turns of a conversation when others follow, so that "
                "no turn can be appended to them",
                "use a template that renders each message by itself",
            )
        ids, answered = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (rest, STAND_IN))
        if ids[: len(answered)] != answered:
            raise MMTokError(
                f"the chat template of {self.name} joins an answer and what follows it to one token",
                "use a template that separates messages",
            )
        return torch.tensor(ids[len(answered) :], dtype=torch.long)

    def _user_message(self, question: str, images: int) -> dict[str, Any]:
        """A message of the chat template. Raises MMTokError for a question that does not suit the images."""
        if len(question) > self.context_length * LONGEST_TOKEN:  # a tokenizer would take minutes and gigabytes
            raise MMTokError(
                f"the question of {len(question):,} characters does not fit into the {self.context_length} tokens "
                f"that {self.name} can read",
                "shorten the question",
            )
        markers = question.count(IMAGE_MARKER)
        if markers not in (0, images):
            raise MMTokError(
                f"the question has {markers} {IMAGE_MARKER} markers for {images} image{'s' * (images != 1)}",
                "put one where each image belongs, or none at all",
            )
        for token in self.reserved:
            if token != IMAGE_MARKER and token in question:
                raise MMTokError(
                    f"the question contains {token}, which stands for an image", "remove it from the question"
                )
        return _message("user", question.replace(IMAGE_MARKER, self.image_text), 0 if markers else images)

    def _rendered(self, messages: list[dict[str, Any]], images: int) -> str:
        """The prompt of a conversation. Raises MMTokError for a chat template that fails, or drops an image."""
        with errors_as(f"the chat template of {self.name} fails", COMPARE):
            text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        marks = text.count(self.processor.image_token)
        if marks != images:
            raise MMTokError(
                f"the chat template of {self.name} puts {marks} image tokens into a prompt about {images} "
                f"image{'s' * (images != 1)}",
                COMPARE,
            )
        return text

    @abstractmethod
    def encode(self, prompt: Prompt, signals: Sequence[str] = (), *, stage: Stage = unwatched) -> list[VisionTokens]:
        """Run the vision encoder and the projector: the vision tokens of each image.

        Work that only the signals need is spent in `stage("select")`. Call `require_signals` first.
        """

    def require_signals(self, signals: Sequence[str]) -> None:
        """Raises MMTokError for a signal that the family does not offer."""
        missing = [name for name in signals if name not in self.signals]
        if missing:
            raise MMTokError(
                f"the {self.family} family does not offer {', '.join(missing)}",
                f"it offers {', '.join(self.signals) or 'none'}; methods such as mmtok, divprune and fastv read none",
            )

    @abstractmethod
    def panels(self, image: Visual, grid: Grid | None) -> list[Panel]:
        """The places of the vision tokens in the image; `grid` as in `prepare`."""

    def text_tokens(self, prompt: Prompt, track: Track) -> list[TextTokens]:
        """The question that goes with each image."""
        questions = [question.replace(IMAGE_MARKER, " ").strip() for question in prompt.questions]
        words = [self.released_words(q) if track == "released" else None for q in questions]
        return [TextTokens(questions[owner], self.embed_words, words[owner]) for owner in prompt.owners]

    def released_words(self, question: str) -> tuple[str, ...] | None:
        """What MMTok's release covers of a question; None for its key words."""
        return None

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """Input embeddings of words, [text tokens, dim], without the token that begins every sequence."""
        return hf.input_embedding(self.model)(to_device(self.word_ids(words), self.device))

    def word_ids(self, words: Sequence[str]) -> Tensor:
        """The ids of words, [text tokens], without the token that begins every sequence."""
        ids = self.tokenizer(list(words), is_split_into_words=True)["input_ids"]
        return torch.tensor(ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids)

    def assemble(
        self,
        prompt: Prompt,
        vision: Sequence[VisionTokens],
        selections: Sequence[Selection],
        positions: Positions = "renumber",
    ) -> dict[str, Any]:
        """Arguments of the model's forward for a prompt that holds the selected vision tokens alone.

        A pure function: placeholders of dropped tokens are removed and rows are aligned to the right again. Positions
        are renumbered, or those that the kept tokens have in the unreduced prompt.
        Raises MMTokError where positions should be kept and a token has none.
        """
        live = prompt.attention_mask.bool()
        places = self.image_places(prompt.input_ids, vision, [v.total for v in vision])
        for (row, columns), image, selection in zip(places, prompt.images, selections, strict=True):
            # The first placeholders are reused for whichever tokens are kept, in whichever order. Where there is text
            # between them every token keeps its own.
            live[row, columns] = False
            reused = on_host(selection.indices) if self.has_text_within(image) else slice(selection.kept)
            live[row, columns[reused]] = True

        length = int(live.sum(1).max())
        columns = live.int().argsort(dim=1, stable=True)[:, -length:]
        mask = live.gather(1, columns)
        ids = prompt.input_ids.gather(1, columns).masked_fill(~mask, self.tokenizer.pad_token_id)
        if positions == "keep":
            _require_positions(vision, selections)

        def sources() -> Tensor:
            padded = columns.masked_fill(~mask, live.shape[1])
            begin = self.image_starts(ids, vision, [selection.kept for selection in selections])
            moved = [i for i, image in enumerate(prompt.images) if not self.has_text_within(image)]
            starts = [int(places[i][1][0]) if selections[i].kept else 0 for i in moved]
            return _sources(padded, starts, [begin[i] for i in moved], [selections[i] for i in moved], self.device)

        rows = [
            v.projected[s.indices] if s.tokens is None else s.tokens.to(v.projected.dtype)
            for v, s in zip(vision, selections, strict=True)
        ]
        return {
            "input_ids": mirrored(ids, self.device),
            "attention_mask": mirrored(mask.long(), self.device),
            "position_ids": self.position_ids(prompt, mask, positions, sources),
            **self.encoded_images(rows, vision, selections),
        }

    def position_ids(self, prompt: Prompt, mask: Tensor, positions: Positions, sources: Callable[[], Tensor]) -> Tensor:
        """Positions of a shorter prompt, [batch, length] on the model's device, zero for padding.

        mask: [batch, length], on the host, False for padding. sources: gives [batch, length], the column of the
        unreduced prompt that each token comes from, and the number of its columns for padding.
        """
        if positions == "renumber":
            return to_device(counted(mask), self.device)
        return to_device(pad(prompt.attention_mask.cumsum(1) - 1, (0, 1)), self.device).gather(1, sources())

    def encoded_images(
        self, rows: list[Tensor], vision: Sequence[VisionTokens], selections: Sequence[Selection]
    ) -> dict[str, Any]:
        """Arguments of the model's forward that replace the pixels. rows: [kept, dim] for each image."""
        return hf.encoded_images(rows, [bool(v.slices) for v in vision])

    def inside(
        self, attention_mask: Tensor, images: Sequence[CutImage], positions: Positions, stage: Stage = unwatched
    ) -> Inside:
        """A context within which prefill and decoding cut images down between decoder layers.

        attention_mask: [batch, length], of the prompt that will be read. Raises MMTokError for an attention kernel
        that cannot run on shortened sequences.
        """
        self.require_hooks()
        return Inside(hf.language_model(self.model), attention_mask, images, positions, stage)

    def require_hooks(self) -> None:
        """Raises MMTokError where nothing can be done between the decoder layers."""
        if self.attention not in ("sdpa", "eager"):
            raise MMTokError(
                f"methods inside the language model do not run under {self.attention!r} attention",
                "load the model with sdpa attention",
            )
        if self.compiled:
            raise MMTokError(
                "methods inside the language model do not run in a compiled one",
                "leave out --compile, or these methods",
            )

    def image_places(
        self, input_ids: Tensor, vision: Sequence[VisionTokens], totals: Sequence[int]
    ) -> list[tuple[int, Tensor]]:
        """The row of each image and the columns of its `totals` placeholders, [total]; -1 for the row without any."""
        rows, columns = torch.isin(on_host(input_ids), torch.tensor(self.placeholder_ids)).nonzero(as_tuple=True)
        lengths = [n + self.placeholders_behind(v) for n, v in zip(totals, vision, strict=True)]
        starts, found = accumulate(lengths, initial=0), rows.tolist()
        return [
            (found[start] if n else -1, columns[start : start + n]) for start, n in zip(starts, totals, strict=False)
        ]

    def image_starts(
        self, input_ids: Tensor, vision: Sequence[VisionTokens], totals: Sequence[int]
    ) -> list[tuple[int, int]]:
        """(row, column) of each image's first placeholder; each image has `totals` adjacent ones.

        (-1, -1) for an image without any.
        """
        places = self.image_places(input_ids, vision, totals)
        return [(row, int(columns[0]) if len(columns) else -1) for row, columns in places]


def counted(mask: Tensor) -> Tensor:
    """Numbers of the tokens of each row, from zero on, and zero for padding. mask: [batch, length], of the tokens."""
    return (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)


def _sources(
    columns: Tensor,
    starts: Sequence[int],
    begin: Sequence[tuple[int, int]],
    selections: Sequence[Selection],
    device: torch.device,
) -> Tensor:
    """The columns [batch, length] that the tokens of a shorter prompt come from, on a device.

    columns: the same where the first placeholders of each image stay. starts: the first column of each image in the
    unreduced prompt. begin: its row and column in the shorter one.
    """
    there = to_device(columns, device)
    if not any(selection.kept for selection in selections):
        return there
    places = [
        torch.arange(s.kept) + row * columns.shape[1] + at for (row, at), s in zip(begin, selections, strict=True)
    ]
    offsets = [torch.full((s.kept,), start) for start, s in zip(starts, selections, strict=True)]
    kept = torch.cat([selection.indices for selection in selections]).clamp(min=0)
    kept = kept + to_device(torch.cat(offsets), device)
    return there.flatten().index_copy(0, to_device(torch.cat(places), device), kept).view(columns.shape)


def _require_positions(vision: Sequence[VisionTokens], selections: Sequence[Selection]) -> None:
    """Refuse tokens without a position in the unreduced prompt, which only crops have."""
    for tokens, selection in zip(vision, selections, strict=True):
        if tokens.crops is not None:
            error = MMTokError(
                f"padding of {tokens.image_id} was kept, which has no position in the unreduced prompt",
                "use --track harmonised, which keeps no padding, or --positions renumber",
            )
            require((selection.indices != PADDING).all(), error)


def _message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """A message of a chat template, its images before its text."""
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def without_values(eligible: Tensor, grid: Grid, crops: Crops | None = None) -> VisionTokens:
    """Vision tokens of which only the number and the layout are known. eligible: [tokens]."""
    nothing = torch.empty(len(eligible), 0)
    return VisionTokens(nothing, nothing, grid, eligible, "", lambda features: features, crops=crops)


def frames_of_slice(video: Video, slices: int) -> int:
    """Frames of each of a video's slices in time; the last slice may have fewer."""
    return -(-len(video) // slices)


def slice_panels(video: Video, slices: int, grid: Grid) -> list[Panel]:
    """A panel for each slice in time, with its time, over its first frame. grid: of each slice."""
    pace, count, boxes = frames_of_slice(video, slices), grid[0] * grid[1], cells(grid, (0, 0, *video.size))
    return [
        Panel(video.frames.title(i * pace), grid, tuple(range(i * count, (i + 1) * count)), boxes, i * pace)
        for i in range(slices)
    ]


def unmet_by_slices(slices: int) -> UnmetBudgetError:
    """The error for a smaller video of fewer tokens than slices in time."""
    return UnmetBudgetError(
        f"a video of {slices} slices in time cannot be made smaller than a token for each",
        f"choose {slices} tokens or more, or sample fewer --frames",
        nearest=slices,
    )


def cells(grid: Grid, area: Box) -> tuple[Box, ...]:
    """The boxes of a grid's cells, row by row, that share an area evenly."""
    left, top, right, bottom = area
    height, width = (bottom - top) / grid[0], (right - left) / grid[1]
    return tuple(
        (left + c * width, top + r * height, left + (c + 1) * width, top + (r + 1) * height)
        for r in range(grid[0])
        for c in range(grid[1])
    )
