"""The settings of a command: one description for the command line, the plan of a run, `--resume` and Python.

The options of the commands are generated from these models (see cli/options.py). Nothing here imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mmtok_cli.budget import Budget
from mmtok_cli.errors import MMTokError
from mmtok_cli.option_values import (
    LARGEST_BATCH,
    BatchSizes,
    Budgets,
    ColumnNames,
    Concurrencies,
    Draft,
    Grouping,
    ImageSize,
    Methods,
    OneBudget,
    OneTurnPolicy,
    Pixels,
    Retained,
    Scale,
    Scales,
    Tasks,
    TurnPolicies,
    budgets_of,
    methods_of,
)
from mmtok_cli.protocols import protocol_of
from mmtok_cli.rules import (
    NATIVE,
    BudgetArea,
    BudgetMeaning,
    ImageScale,
    Positions,
    Rules,
    Track,
    require_scale,
)
from mmtok_cli.video import MOST_FRAMES, USUAL_FRAMES, Sampling

MODEL = "Model"
REDUCTION = "Reduction"
DATA = "Data"
MEASUREMENT = "Measurement"
PANELS = (MODEL, REDUCTION, DATA, MEASUREMENT)  # in the order in which help shows them

# What is beyond these is a slip of the keyboard: it would run for years or fill the memory with its schedule.
MOST_ROUNDS = 100_000
MOST_RUNS = 1000  # repetitions within a round, and untimed runs
MOST_SAMPLES = 10_000_000
MOST_NEW_TOKENS = 1_000_000
MOST_PROMPT_TOKENS = 1_000_000
MOST_REQUESTS = 100_000  # of a case in a round
LONGEST = 7 * 24 * 3600  # seconds
LARGEST_SEED = 2**63 - 1  # that of torch's generators
FULL_SIZE = ("1",)  # the image scales, where none are named

# Of `mmtok profile`, where nothing else is asked for.
PROFILE_ROUNDS = 20
PROFILE_WARMUP = 3
ENGINE_ROUNDS = 8
ENGINE_WARMUP = 1
ENGINE_REQUESTS = 8
USUAL_IMAGE = "1024x768"  # that people give to a model with crops or with images of any size

USUAL_LIMIT = 80  # samples of a comparison
ENGINE_METHODS = ("mmtok", "random", "uniform")  # of a comparison through an engine, where none are named
SEARCH_LIMIT = 2000  # and of a search for budgets, which stops as soon as it can


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line, beside its type, default, limits and description.

    names: spellings; the field's name with dashes unless given. panel: heading in `--help`. env: environment variable
    with the default. complete: what shell completion offers.
    """

    names: tuple[str, ...] = ()
    panel: str = ""
    env: str | None = None
    metavar: str | None = None
    complete: Literal["models", "methods", "parameters"] | None = None


_SCALE = (
    "Encode smaller images. 0.5: half the width and height, a quarter of the patches. auto: each image decides by how "
    "much detail it shows (PACE), in a stage of its own."
)


class Settings(BaseModel):
    """What all settings have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The settings with these values and the defaults of the others. Raises MMTokError for what is not valid."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0]) if first["loc"] else ""
            name = option_name(cls, where) if where in cls.model_fields else where or "settings"
            message = first["msg"][:1].lower() + first["msg"][1:]
            raise MMTokError(f"{name}: {message}, not {first['input']!r}", "`--help` explains every option") from error


class ModelSettings(Settings):
    """Which model runs where."""

    model: Annotated[str, Option(("--model", "-m"), MODEL, env="MMTOK_MODEL", complete="models")] = Field(
        "demo", description="Model: a name (see `mmtok models`), a hub id or a directory."
    )
    device: Annotated[str, Option(panel=MODEL, env="MMTOK_DEVICE", metavar="auto|cpu|cuda|mps")] = Field(
        "auto", description="Device. auto: a GPU if there is one."
    )
    dtype: Annotated[str, Option(panel=MODEL, env="MMTOK_DTYPE", metavar="auto|float32|bfloat16|float16")] = Field(
        "auto", description="Data type. auto: float32 on a CPU, otherwise that of the stored weights."
    )
    weights: Annotated[str, Option(panel=MODEL, metavar="pretrained|random")] = Field(
        "pretrained",
        description="random: the real architecture with random weights; only time and memory are meaningful.",
    )
    attention: Annotated[str, Option(panel=MODEL, metavar="sdpa|eager|flash_attention_2")] = Field(
        "sdpa", description="Attention kernel."
    )
    encoder_attention: Annotated[str | None, Option(panel=MODEL, metavar="sdpa|eager|flash_attention_2")] = Field(
        None, description="Attention kernel of the vision encoder. Default: that of --attention."
    )
    device_map: Annotated[str | None, Option(panel=MODEL, metavar="auto")] = Field(
        None, description="auto: spread the model over all GPUs (needs accelerate)."
    )
    quantization: Annotated[str | None, Option(panel=MODEL, metavar="int8|int4|bnb-8bit|bnb-4bit")] = Field(
        None, description="Quantize the weights of linear layers, by torchao or bitsandbytes."
    )
    pixels: Annotated[Pixels, Option(panel=MODEL, metavar="native|fixed:TOKENS")] = Field(
        NATIVE,
        description="Resolution of images, for models that see them at their own. fixed:2048: every image is scaled to "
        "about 2048 vision tokens, as in papers.",
    )


class EngineSettings(Settings):
    """Which engine answers."""

    engine: Annotated[str, Option(panel=MODEL, metavar="transformers|vllm")] = Field(
        "transformers",
        description="What runs the model. vllm: a vLLM engine in processes of its own (pip install 'mmtok\\[vllm]').",
    )


class PartSettings(Settings):
    """Whether only a part of the model is run."""

    layers: Annotated[int | None, Option(panel=MODEL)] = Field(
        None, ge=1, description="Run only the first N decoder layers and estimate the times of the whole model."
    )


class ReductionSettings(Settings):
    """The rules under which methods run."""

    track: Annotated[str, Option(panel=REDUCTION, metavar="released|harmonised")] = Field(
        "released",
        description="released: every method as its authors released it. harmonised: identical rules for every method.",
    )
    positions: Annotated[str | None, Option(panel=REDUCTION, metavar="keep|renumber")] = Field(
        None, description="Position ids of kept tokens. Default: set by --track."
    )
    budget_means: Annotated[str, Option(panel=REDUCTION, metavar="final|layer-average")] = Field(
        "final",
        description="What a budget counts: tokens at the last layer, or the mean over all decoder layers.",
    )
    budget_per: Annotated[str, Option(panel=REDUCTION, metavar="image|frame")] = Field(
        "image",
        description="frame: the budget of a video is spread evenly over its frames, and each is reduced by itself (two "
        "frames together, where the model merges them).",
    )
    parameters: Annotated[
        tuple[str, ...], Option(("--set",), REDUCTION, metavar="METHOD.PARAM=VALUE", complete="parameters")
    ] = Field((), description="Parameter of a method, as in fastv.layer=3 (see `mmtok methods NAME`). Repeatable.")
    seed: Annotated[int, Option(panel=REDUCTION)] = Field(
        0, ge=0, le=LARGEST_SEED, description="Seed of methods that draw at random, and of the order of cases."
    )

    draft: Annotated[Draft, Option(panel=REDUCTION, metavar="self|MODEL|text:TEXT")] = Field(
        None,
        description="First answer whose words a method covers beside those of the question: the model's own with "
        "the same method and budget, that of another model, or a text. Its time is a stage of its own.",
    )
    draft_tokens: Annotated[int, Option(panel=REDUCTION)] = Field(
        16, ge=1, le=MOST_NEW_TOKENS, description="Maximum number of tokens of a draft."
    )

    @model_validator(mode="after")
    def _has_draft(self) -> Self:
        """Raises MMTokError for the length of a draft that is not asked for."""
        if self.draft is None and self.draft_tokens != type(self).model_fields["draft_tokens"].default:
            raise MMTokError("--draft-tokens requires --draft", "add --draft, as in --draft self")
        return self

    @property
    def rules(self) -> Rules:
        """Raises MMTokError for a track or a policy that does not exist."""
        return Rules(
            cast(Track, self.track),
            cast(Positions | None, self.positions),
            cast(BudgetMeaning, self.budget_means),
            cast(BudgetArea, self.budget_per),
        )


class MethodSettings(Settings):
    """One method at one budget."""

    method: Annotated[str, Option(("--method",), REDUCTION, complete="methods")] = Field(
        "mmtok", description="Reduction method (see `mmtok methods`)."
    )
    budget: Annotated[OneBudget, Option(("--budget", "-b"), REDUCTION)] = Field(
        "64", description="Vision tokens kept per image: 64, or 10% of them."
    )
    image_scale: Annotated[Scale, Option(panel=REDUCTION, metavar="SCALE|auto")] = Field(
        "1",
        description=f"{_SCALE} The method selects from what is left, and a --budget of 10% is one of the tokens at 1.",
    )

    @property
    def budgets(self) -> list[Budget]:
        return [Budget.parse(self.budget)]

    @property
    def image_scales(self) -> list[ImageScale]:
        return [require_scale(self.image_scale)]


class OneCaseSettings(ReductionSettings, MethodSettings, ModelSettings):
    """One case, and the model that it runs on. (Fields of the last base come first in the help.)"""


class ReplaySettings(Settings):
    """A selection that was made elsewhere."""

    kept: Annotated[Path | None, Option(("--kept",), REDUCTION, metavar="FILE")] = Field(
        None,
        description="Keep the vision tokens that a file names (.json or .safetensors, see `mmtok prune --export`), in "
        "place of --method and --budget.",
    )


class VideoSettings(Settings):
    """Which frames of a video the model sees."""

    frames: Annotated[int | None, Option(panel=DATA)] = Field(
        None, ge=1, le=MOST_FRAMES, description=f"Frames sampled of a video, evenly spaced. Default: {USUAL_FRAMES}."
    )
    fps: Annotated[float | None, Option(panel=DATA)] = Field(
        None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Frames sampled per second of video, in place of --frames.",
    )
    folder_fps: Annotated[float, Option(panel=DATA)] = Field(
        24.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Frames per second of a video that is a folder of images.",
    )

    @property
    def sampling(self) -> Sampling:
        """How frames are sampled of videos. Raises MMTokError where both ways are given."""
        if self.frames is not None and self.fps is not None:
            raise MMTokError("--frames and --fps contradict each other", "omit one of them")
        return Sampling(self.frames or USUAL_FRAMES, self.fps, self.folder_fps)


class InferSettings(ReplaySettings, OneCaseSettings, VideoSettings, EngineSettings):
    """What `mmtok infer` does."""

    max_new_tokens: Annotated[int, Option(panel=MEASUREMENT)] = Field(
        64, ge=1, le=MOST_NEW_TOKENS, description="Maximum number of new tokens."
    )
    turns: Annotated[OneTurnPolicy, Option(panel=REDUCTION, metavar="reuse|reselect|union")] = Field(
        "reuse",
        description="Vision tokens at each --turn. reuse: those selected for the first question, in the KV cache. "
        "reselect: selected again. union: the newly selected ones join those kept before.",
    )
    encode_again: Annotated[bool, Option(("--encode-again",), REDUCTION)] = Field(
        False, description="Encode images again for each selection at a --turn, in place of keeping encoder outputs."
    )


class PruneSettings(ReplaySettings, PartSettings, OneCaseSettings, VideoSettings):
    """What `mmtok prune` does."""

    data: Annotated[str | None, Option(panel=DATA)] = Field(
        None,
        description="With --export, in place of IMAGE and QUESTION: a dataset (see `mmtok compare --help`), of whose "
        "images the selections are written.",
    )
    image_root: Annotated[Path | None, Option(panel=DATA)] = Field(
        None, description="Directory of the image files. Default: that of the data file."
    )
    limit: Annotated[int, Option(panel=DATA)] = Field(
        USUAL_LIMIT, ge=1, le=MOST_SAMPLES, description="Maximum number of samples of --data."
    )


class LmmsSettings(PartSettings, OneCaseSettings):
    """What `--model_args` of lmms-eval can say of the model `mmtok`."""

    batch_size: Annotated[int, Option(panel=MEASUREMENT)] = Field(
        1, ge=1, le=LARGEST_BATCH, description="Batch size: that of lmms-eval's --batch_size."
    )
    cost_path: Annotated[Path | None, Option(panel=MEASUREMENT)] = Field(
        None, description="File of the cost records (.jsonl). Default: beside the results in lmms-eval's --output_path."
    )


class MethodsSettings(Settings):
    """Several methods at several budgets."""

    methods: Annotated[Methods, Option(("--methods", "--method"), REDUCTION, complete="methods")] = Field(
        ("mmtok",),
        description="Methods (see `mmtok methods`), separated by commas. mmtok@96 has a budget of its own.",
    )
    budget: Annotated[Budgets | None, Option(("--budget", "-b"), REDUCTION)] = Field(
        None, description="Budgets, separated by commas: 64,16 or 10%,5%. Default: those of the model's profile."
    )
    image_scale: Annotated[Scales, Option(panel=REDUCTION, metavar="SCALE,…|auto")] = Field(
        FULL_SIZE,
        description=f"{_SCALE} Several: 1,0.75,0.5. Every method selects from what is left, and a --budget of 10% is "
        "one of the tokens at 1.",
    )

    @property
    def image_scales(self) -> list[ImageScale]:
        return [require_scale(scale) for scale in self.image_scale]

    @property
    def named_methods(self) -> list[tuple[str, Budget | None]]:
        """Each method with its own budget, None where it has those of --budget."""
        parts = [text.partition("@") for text in self.methods]
        return [(name, Budget.parse(budget) if budget else None) for name, _, budget in parts]

    @property
    def budgets(self) -> list[Budget] | None:
        """None for those of the model's profile."""
        return None if self.budget is None else [Budget.parse(text) for text in self.budget]

    @property
    def repeats(self) -> Mapping[str, int]:
        """How often methods that draw at random run, by their name; once unless named."""
        return {}


class AnswerLength(TypedDict):
    """Arguments of everything that decodes. ignore_eos: exactly `max_new_tokens` tokens, not at most."""

    max_new_tokens: int
    ignore_eos: bool


class CasesSettings(ReductionSettings, MethodsSettings, PartSettings, VideoSettings, ModelSettings):
    """Several methods at several budgets and batch sizes, and how they are timed."""

    batch_size: Annotated[BatchSizes, Option(panel=MEASUREMENT)] = Field(
        (1,), description="Batch size, or several: 1,8."
    )
    runs: Annotated[int, Option(panel=MEASUREMENT)] = Field(
        1, ge=1, le=MOST_RUNS, description="Repetitions of each case within a round; their median is used."
    )
    max_new_tokens: Annotated[int, Option(panel=MEASUREMENT)] = Field(
        16, ge=1, le=MOST_NEW_TOKENS, description="Maximum number of new tokens."
    )
    new_tokens: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=1,
        le=MOST_NEW_TOKENS,
        description="Exact number of new tokens of timed runs: the end token is ignored. Replaces --max-new-tokens; "
        "answers that are evaluated keep their length.",
    )
    prompt_tokens: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=1,
        le=MOST_PROMPT_TOKENS,
        description="Exact number of text tokens of each prompt in timed runs, chat template included: questions are "
        "padded with neutral words. Prompts that are evaluated are not padded.",
    )

    compile_model: Annotated[bool, Option(("--compile",), MODEL)] = Field(
        False,
        description="Compile the language model with torch.compile. Takes minutes before the first round, and excludes "
        "--layers and methods inside the language model.",
    )
    find_batch: Annotated[bool, Option(("--find-batch",), MEASUREMENT)] = Field(
        False,
        description="Also find the largest batch of each case that fits into memory: computed on a CPU, run on a GPU.",
    )

    @property
    def has_exact_lengths(self) -> bool:
        """Whether timed prompts or answers differ in length from those that are evaluated."""
        return self.new_tokens is not None or self.prompt_tokens is not None

    @property
    def timed_length(self) -> AnswerLength:
        """How many tokens a timed run decodes."""
        exact = self.new_tokens is not None
        return AnswerLength(max_new_tokens=self.new_tokens or self.max_new_tokens, ignore_eos=exact)


class ProfileSettings(CasesSettings, EngineSettings):
    """What `mmtok profile` measures."""

    budget: Annotated[Budgets | None, Option(("--budget", "-b"), REDUCTION)] = Field(
        ("64",), description="Budgets, separated by commas: 64,16 or 10%,5%."
    )
    weights: Annotated[str, Option(panel=MODEL, metavar="auto|pretrained|random")] = Field(
        "auto",
        description="random: the real architecture with random weights; only time and memory are meaningful. auto: "
        "random if there are no weights here.",
    )
    strict: Annotated[bool, Option(("--strict",), MODEL)] = Field(
        False,
        description="Refuse a model without weights, or one that does not fit. Otherwise random weights, bfloat16 or "
        "fewer layers are measured, which the results say.",
    )
    max_time: Annotated[float, Option(panel=MEASUREMENT, metavar="SECONDS")] = Field(
        300.0,
        ge=1,
        le=LONGEST,
        allow_inf_nan=False,
        description="If the model cannot be measured as it is: as many layers and rounds as fit into about this time.",
    )
    rounds: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=1,
        le=MOST_ROUNDS,
        description="Timed rounds; each runs all cases once, in random order. Default: "
        f"{PROFILE_ROUNDS}, fewer where --max-time applies.",
    )
    warmup: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=0,
        le=MOST_RUNS,
        description=f"Untimed runs of each case. Default: {PROFILE_WARMUP}, 1 where --max-time applies.",
    )
    image_size: Annotated[ImageSize, Option(panel=DATA, metavar="WIDTHxHEIGHT")] = Field(
        None,
        description="Size in pixels that the image is resized to. Default: a file keeps its own; the drawn scene is "
        f"{USUAL_IMAGE}, with the demo model that of its training.",
    )
    concurrency: Annotated[Concurrencies, Option(panel=MEASUREMENT)] = Field(
        (1, 4, 16), description="With --engine vllm: requests in flight, or several numbers of them: 1,4,16."
    )
    requests: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=1,
        le=MOST_REQUESTS,
        description="With --engine vllm: requests of each case in a round, at each concurrency. Default: "
        f"{ENGINE_REQUESTS}, at least twice the concurrency.",
    )
    data: Annotated[str | None, Option(panel=DATA)] = Field(
        None,
        description="With --engine vllm: dataset whose questions are sent (see `mmtok compare --help`). Default: the "
        "held-out questions of the demo about drawn scenes.",
    )

    def requests_at(self, concurrency: int) -> int:
        """Requests of each case in a round."""
        return self.requests or max(ENGINE_REQUESTS, 2 * concurrency)


class CompareSettings(CasesSettings, EngineSettings):
    """What `mmtok compare` measures. The plan of a run keeps it."""

    methods: Annotated[Methods, Option(("--methods", "--method"), REDUCTION, complete="methods")] = Field(
        ("mmtok", "random", "uniform", "resize", "none"),
        description="Methods (see `mmtok methods`), separated by commas. The baseline `full` always runs; list it to "
        "measure it a second time as a check of the noise. mmtok@96 has a budget of its own. With --engine vllm, the "
        f"default is {','.join(ENGINE_METHODS)}.",
    )
    retain: Annotated[Retained, Option(panel=REDUCTION, metavar="PERCENT")] = Field(
        None,
        description="Find the smallest budget of each method that keeps this share of the score, as in 98%, with 95 % "
        "confidence. Without reference answers: of the agreement with the unreduced model. --budget names the only "
        "budgets to try.",
    )
    kept: Annotated[tuple[Path, ...], Option(("--kept",), REDUCTION, metavar="FILE")] = Field(
        (),
        description="Also compare the selection in a file (.json or .safetensors, see `mmtok prune --export`). "
        "Repeatable.",
    )
    protocol: Annotated[str | None, Option(panel=REDUCTION, metavar="vtc|unipruneb")] = Field(
        None,
        description="Budgets and controls of a published protocol. vtc (VTC-Bench): five shares from 25% to 1% beside "
        "resize, whose errors split the samples into two groups. unipruneb (UniPruneBench): a third, two ninths and a "
        "ninth of the tokens, beside random methods drawn three times.",
    )
    by: Annotated[Grouping, Option(panel=REDUCTION, metavar="kind")] = Field(
        None, description="kind: find the budget of --retain for each kind of question."
    )
    warmup: Annotated[int, Option(panel=MEASUREMENT)] = Field(
        1, ge=0, le=MOST_RUNS, description="Untimed runs of each case."
    )
    limit: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=1,
        le=MOST_SAMPLES,
        description=f"Maximum number of samples. Default: {USUAL_LIMIT}, with --retain {SEARCH_LIMIT}.",
    )
    rounds: Annotated[int | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=1,
        le=MOST_ROUNDS,
        description="Timed rounds over all cases, each on the next batch of samples. Default: all batches, at most 30.",
    )
    min_time: Annotated[float | None, Option(panel=MEASUREMENT)] = Field(
        None,
        ge=0,
        le=LONGEST,
        allow_inf_nan=False,
        description="Keep running rounds for at least this many seconds.",
    )
    no_quality: Annotated[bool, Option(("--no-quality",), MEASUREMENT)] = Field(
        False, description="Measure only time and memory; do not evaluate answers."
    )
    turns: Annotated[TurnPolicies | None, Option(panel=MEASUREMENT, metavar="reuse,reselect,union")] = Field(
        None,
        description="Also evaluate all questions of each conversation, for data with several questions per image. "
        "reuse: later questions are appended to the KV cache. reselect: vision tokens are selected again for each "
        "question, and the conversation is prefilled again. union: the newly selected tokens join those kept before.",
    )
    encode_again: Annotated[bool, Option(("--encode-again",), MEASUREMENT)] = Field(
        False, description="With --turns, encode images again for each selection, in place of keeping encoder outputs."
    )
    data: Annotated[str, Option(panel=DATA)] = Field(
        "demo",
        description="Dataset: demo, demo:dense, demo:conversations, a .jsonl, .json, .csv or .tsv file, pope:FILE, "
        "vqav2:QUESTIONS,ANNOTATIONS, a folder of images, hub:NAME or hub:NAME:SPLIT.",
    )
    image_root: Annotated[Path | None, Option(panel=DATA)] = Field(
        None, description="Directory of the image files. Default: that of the data file."
    )
    question: Annotated[str | None, Option(panel=DATA)] = Field(
        None, description="Question for images without one, or a template with {question}."
    )
    metric: Annotated[str | None, Option(panel=DATA, metavar="NAME")] = Field(
        None,
        description="Metric that judges the answers: exact, yes-no (POPE), mme, vqav2, textvqa, anls (DocVQA), choice, "
        "relaxed (ChartQA) or task (that of --tasks). Default: that of the dataset.",
    )
    columns: Annotated[ColumnNames, Option(panel=DATA, metavar="FIELD=NAME,…")] = Field(
        None,
        description="Names that the data uses for image, question, questions, answer, answers, choices, id and kind.",
    )

    tasks: Annotated[Tasks | None, Option(panel=DATA, metavar="NAME,…")] = Field(
        None,
        description="Evaluate on tasks of lmms-eval, in place of --data: prompts, lengths of answers and scores are "
        "those of each task. --limit counts for each task. Needs mmtok[lmms].",
    )
    include_path: Annotated[Path | None, Option(panel=DATA)] = Field(
        None, description="Folder with further tasks for --tasks, as for lmms-eval."
    )

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The settings with these values; --protocol sets the budgets, and the methods unless they are given.

        Raises MMTokError for what is not valid.
        """
        if values.get("protocol") is None:
            return super().of(**values)
        protocol = protocol_of(values["protocol"])
        methods = methods_of(values["methods"]) if "methods" in values else protocol.methods
        if values.get("budget") is not None and budgets_of(values["budget"]) != protocol.budgets:
            raise MMTokError(
                f"--protocol {values['protocol']} has budgets of its own: {', '.join(protocol.budgets)}",
                "omit --budget, or --protocol",
            )
        return super().of(**{**values, "budget": protocol.budgets, "methods": protocol.completed(methods)})

    @property
    def repeats(self) -> Mapping[str, int]:
        return protocol_of(self.protocol).repeats if self.protocol else {}

    @property
    def retained(self) -> float:
        """The share of --retain: 0.98 for 98%."""
        return float((self.retain or "100%").rstrip("%")) / 100

    def command_line(self) -> str:
        """The `mmtok compare` that has these settings, without those that are defaults."""
        words = ["mmtok", "compare"]
        for name, field in type(self).model_fields.items():
            value, option = getattr(self, name), option_name(type(self), name)
            if value == field.get_default(call_default_factory=True):
                continue
            if name in ("parameters", "kept"):
                words += [word for one in value for word in (option, str(one))]
            elif value is True:
                words.append(option)
            else:
                words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raises MMTokError for options that exclude each other."""
        self._require_tasks_alone()
        if self.kept and self.retain:
            raise MMTokError("--kept has no budget that --retain could find", "omit one of them")
        for option, one in (("--protocol", self.protocol), ("--kept", self.kept)):
            if one and self.engine != "transformers":
                raise MMTokError(
                    f"{option} is measured with transformers, not with --engine {self.engine}", "omit one of them"
                )
        if self.protocol and self.retain:
            raise MMTokError("--protocol has budgets of its own, and --retain finds them", "omit one of them")
        if self.protocol and not self.measures_quality:
            option = "--no-quality" if self.no_quality else "--layers"
            raise MMTokError(f"--protocol needs the answers, which {option} does not evaluate", f"omit {option}")
        if self.by and not self.retain:
            raise MMTokError("--by requires --retain", "add --retain, as in --retain 98%")
        if self.retain and not self.measures_quality:
            option = "--no-quality" if self.no_quality else "--layers"
            raise MMTokError(f"--retain needs the answers, which {option} does not evaluate", f"omit {option}")
        if self.retain and len(self.batch_size) > 1:
            raise MMTokError("--retain takes one batch size", "answers do not depend on it; give one")
        if self.retain and self.turns:
            raise MMTokError("--retain searches with single questions, not with --turns", "omit one of them")
        if self.retain and self.image_scale != FULL_SIZE:
            raise MMTokError("--retain searches at images' own size, not with --image-scale", "omit one of them")
        for option, value in (("--retain", self.retain), ("--turns", self.turns)):
            if self.draft and value:
                raise MMTokError(f"--draft is measured with single questions, not with {option}", "omit one of them")
        if self.turns and not self.measures_quality:
            option = "--no-quality" if self.no_quality else "--layers"
            raise MMTokError(f"--turns needs the answers, which {option} does not evaluate", f"omit {option}")
        if self.turns and self.has_exact_lengths:
            option = "--new-tokens" if self.new_tokens is not None else "--prompt-tokens"
            raise MMTokError(f"{option} sets the length of single questions, not that of --turns", f"omit {option}")
        if self.encode_again and not self.turns:
            raise MMTokError("--encode-again requires --turns", "add --turns, as in --turns reselect")
        if self.encode_again:
            require_selections(self.turns or ())
        return self

    def _require_tasks_alone(self) -> None:
        """Raises MMTokError for options about other data than the tasks."""
        if self.tasks is None:
            if self.include_path is not None:
                raise MMTokError("--include-path requires --tasks", "add --tasks, as in --tasks pope")
            return
        for name in ("data", "image_root", "question", "metric", "columns", "retain", "turns"):
            if getattr(self, name) != type(self).model_fields[name].default:
                option = option_name(type(self), name)
                raise MMTokError(f"--tasks and {option} contradict each other", f"omit {option}, or --tasks")

    @property
    def sample_limit(self) -> int:
        """Maximum number of samples; with --tasks, of each task."""
        return self.limit or (USUAL_LIMIT if self.retain is None else SEARCH_LIMIT)

    @property
    def measures_quality(self) -> bool:
        """Whether answers are evaluated; those of a part of a model mean nothing."""
        return not self.no_quality and self.layers is None


def require_selections(policies: Collection[str]) -> None:
    """Refuse --encode-again where no policy selects again. Raises MMTokError."""
    if set(policies) == {"reuse"}:
        raise MMTokError(
            "--encode-again has no effect with --turns reuse, which selects only once", "use --turns reselect or union"
        )


def require_replay_alone(settings: ReplaySettings, given: Collection[str]) -> None:
    """Refuse options beside --kept that say what to keep. given: those that were spelled out. Raises MMTokError."""
    if settings.kept is None:
        return
    for name in ("method", "budget", "parameters", "seed", "draft", "engine", "budget_means", "budget_per"):
        if name in given:
            option = option_name(type(settings), name)
            raise MMTokError(
                f"--kept says which tokens are kept, so {option} has no effect", f"omit {option}, or --kept"
            )


def require_consistent(settings: CompareSettings | ProfileSettings, given: Collection[str]) -> None:
    """Refuse settings that exclude each other. given: names of those that were spelled out. Raises MMTokError."""
    for option, value in (("--compile", settings.compile_model), ("--device-map", settings.device_map)):
        if value and settings.layers is not None:
            raise MMTokError(f"{option} runs whole models only", f"leave out {option} or --layers")
    if settings.compile_model and settings.warmup == 0:
        raise MMTokError("--compile needs a warm-up: the first runs compile", "use --warmup 1 or more")
    if isinstance(settings, CompareSettings) and settings.tasks is not None and "data" in given:
        raise MMTokError("--tasks and --data contradict each other", "omit --data, or --tasks")
    own = [name for name, budget in settings.named_methods if budget]
    if "budget" in given and own and {*own, "full", "none"} >= {name for name, _ in settings.named_methods}:
        raise MMTokError(
            "every method has a budget of its own, so that --budget has no effect",
            "omit --budget, or the @ of a method",
        )
    if {"new_tokens", "max_new_tokens"} <= set(given):
        raise MMTokError(
            "--new-tokens and --max-new-tokens contradict each other",
            "use --new-tokens for an exact number of new tokens, or --max-new-tokens for a maximum",
        )
    if isinstance(settings, ProfileSettings) and settings.requests is not None:
        most = max(settings.concurrency)
        if settings.requests < most:
            raise MMTokError(
                f"--requests {settings.requests} never has {most} requests in flight",
                f"use --requests {2 * most} or more, or lower --concurrency",
            )


def option_name(settings: type[Settings], field: str) -> str:
    """The option of a field on the command line: `--set` for `parameters`."""
    names = option_of(settings.model_fields[field]).names
    return names[0] if names else f"--{field.replace('_', '-')}"


def option_of(field: FieldInfo) -> Option:
    """How a field appears on the command line."""
    return next((each for each in field.metadata if isinstance(each, Option)), Option())
