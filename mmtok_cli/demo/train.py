"""Trains the embedded model: `python -m mmtok_cli.demo.train --output DIR`. Some hours on two CPU cores.

`--from DIR --first STAGE` runs the last stages only, from the weights in DIR.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration

from mmtok_cli.demo import losses
from mmtok_cli.demo.architecture import GRID, PATCH_SIZE, WIDTH, build_model, build_processor, hub_layout, vocabulary
from mmtok_cli.demo.batches import ALL_KINDS, Batch, make_batch
from mmtok_cli.demo.dense import Layout
from mmtok_cli.demo.evaluate import load
from mmtok_cli.demo.forward import Outputs, forward
from mmtok_cli.demo.labels import GROUPS
from mmtok_cli.demo.scenes import Density

log = logging.getLogger("mmtok.demo.train")


@dataclass(frozen=True)
class Stage:
    """One picture size. The learning rate falls from `peak` to `final` (both relative) along a cosine."""

    name: str
    grid: int  # patches per side
    steps: int
    batch: int
    questions: int  # per picture; 0: the language model does not take part
    peak: float
    final: float
    pictures: tuple[Density | Layout, ...] = ("sparse",)
    rows: int = 0  # pages are cut to so many rows of patches; 0: as many as columns
    dropping: float = 0.0  # share of steps in which the language model is shown only some of the vision tokens


_READING: tuple[Density | Layout, ...] = ("page", "page", "page", "sparse")
_MIXED: tuple[Density | Layout, ...] = ("sparse", "page", "chart", "dots", "dense", "page", "chart", "dots")
_MORE: tuple[Density | Layout, ...] = ("dense", "page", "sparse", "chart", "dense", "page", "sparse", "dots")
_LAST: tuple[Density | Layout, ...] = ("dense", "page", "dense", "sparse", "dense", "chart", "sparse", "dots")
_POLISH: tuple[Density | Layout, ...] = (
    "dense",
    "page",
    "dense",
    "page",
    "sparse",
    "page",
    "dense",
    "chart",
    "sparse",
    "dots",
)


@dataclass(frozen=True)
class Settings:
    """The one configuration that the shipped weights were trained with."""

    stages: tuple[Stage, ...] = (
        Stage("small", grid=8, steps=1100, batch=32, questions=10, peak=1.0, final=0.3),
        Stage("medium", grid=12, steps=350, batch=24, questions=14, peak=0.7, final=0.45),
        Stage("full", GRID, steps=2300, batch=8, questions=24, peak=0.6, final=0.02, pictures=("sparse", "dense")),
        Stage(
            "reduced",
            GRID,
            steps=600,
            batch=8,
            questions=24,
            peak=0.25,
            final=0.01,
            pictures=("sparse", "dense"),
            dropping=0.6,
        ),
        Stage("reading", 12, 1800, batch=8, questions=0, peak=0.6, final=0.3, pictures=_READING),
        Stage("lookup", 12, 800, batch=8, questions=10, peak=0.5, final=0.3, pictures=_READING),
        Stage("mixed", GRID, steps=400, batch=8, questions=20, peak=0.5, final=0.4, pictures=_MIXED),
        Stage("lines", GRID, steps=250, batch=8, questions=12, peak=0.4, final=0.2, pictures=("page",), rows=10),
        Stage("again", GRID, steps=440, batch=8, questions=20, peak=0.4, final=0.01, pictures=_MIXED, dropping=0.3),
        Stage("scenes", GRID, steps=350, batch=8, questions=20, peak=0.35, final=0.005, pictures=_MORE, dropping=0.15),
        Stage("last", GRID, steps=480, batch=8, questions=20, peak=0.3, final=0.002, pictures=_LAST, dropping=0.1),
        Stage("polish", GRID, 800, batch=10, questions=20, peak=0.35, final=0.001, pictures=_POLISH, dropping=0.1),
    )
    seed: int = 0
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    warmup: float = 0.03  # share of a stage
    log_every: int = 25
    save_every: int = 200


SETTINGS = Settings()
LOSS_WEIGHTS = {
    "answer": 1.0,
    "colour": 0.5,
    "shape": 2.0,
    "digit": 1.5,
    "words": 0.2,
    "page": 1.5,
    "place": 0.5,
    "scene": 1.0,
    "location": 0.3,
}


class Trainee(nn.Module):
    """The model and the heads that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model("plain")
        self.heads = losses.Heads()

    @torch.no_grad()
    def initialise(self) -> None:
        """Gives the patches, their positions and the words a better start than random numbers."""
        vision = self.model.model.vision_tower.embeddings
        vision.patch_embedding.weight.copy_(_principal_patches().reshape(vision.patch_embedding.weight.shape))
        vision.position_embedding.weight.copy_(0.5 * _sine_positions())
        self.model.get_input_embeddings().weight.normal_(0, 0.3)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Takes the weights of a saved model. It may lack the last words of the vocabulary, which start at random.

        Raises ValueError for a model with other words.
        """
        model, processor = load(directory)
        words = sorted(processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if tuple(word for word, _ in words) != vocabulary()[: len(words)]:
            raise ValueError(f"the words of {directory} are not the first ones of the vocabulary")
        self.model.get_input_embeddings().weight.normal_(0, 0.3)
        mine = self.model.state_dict()
        for name, tensor in model.state_dict().items():
            mine[name][: len(tensor)].copy_(tensor)


def _principal_patches(pictures: int = 48) -> torch.Tensor:
    """The main components of picture patches [WIDTH, 3 * patch * patch], half whitened."""
    pixels = make_batch(10_000_000, pictures, GRID, ("sparse", "dense"), per_image=1).pixels
    patches = nn.functional.unfold(pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh((patches - patches.mean(0)).T.cov())
    values, vectors = values.flip(0)[:WIDTH], vectors.flip(1)[:, :WIDTH]
    gain = (values + 1e-3 * values[0]).rsqrt().sqrt()
    return (vectors * gain / (values.sqrt() * gain**2).mean().sqrt()).T


def _sine_positions() -> torch.Tensor:
    """Sines and cosines of column and row, [1 + GRID * GRID, WIDTH]; the class token has none."""
    waves = 10.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4) * 2)
    angles = torch.arange(GRID)[:, None] * waves * 2
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line.repeat_interleave(GRID, 0), line.repeat(GRID, 1)
    return torch.cat([torch.zeros(1, WIDTH), torch.cat([rows, columns], dim=1)])


def shown_tokens(stage: Stage, batch: Batch, generator: torch.Generator) -> torch.Tensor | None:
    """In some steps the language model is shown a random part of each picture's tokens, [batch, m]; None is all.

    The probability that a token stays is drawn for the background, for every object and for what lies on their edges,
    so that all compositions occur. A model trained only on whole pictures counts by the area that objects cover, and
    fails when nine of ten tokens show objects, as after most reduction methods.
    """
    if _uniform(0, 1, generator) >= stage.dropping:
        return None
    pictures, total = batch.groups.shape
    weight = _uniform(-1.5, 1.5, generator, pictures, GROUPS + 1)
    weight[:, 0] = _uniform(-5, 0, generator, pictures)
    luck = -_uniform(1e-9, 1, generator, pictures, total).log().neg().log()  # Gumbel: draws without replacement
    count = round(math.exp(float(_uniform(math.log(0.07), math.log(0.9), generator))) * total)
    return (weight.gather(1, batch.groups) + luck).topk(count, dim=1).indices.sort(1).values


def _uniform(low: float, high: float, generator: torch.Generator, *shape: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


class Optimisers:
    """Float32 masters behind a bfloat16 copy. Muon for the hidden matrices, AdamW for all else.

    On a CPU the bfloat16 copy trains about twice as fast as float32, and autocast would lose that again.
    """

    def __init__(self, master: Trainee, settings: Settings) -> None:
        self.master, self.settings = master, settings
        self.working = copy.deepcopy(master)
        for parameter in self.working.parameters():  # buffers (rotary frequencies) stay float32
            parameter.data = parameter.data.bfloat16()
        named = dict(master.named_parameters())
        hidden = [p for name, p in named.items() if p.ndim == 2 and (".layers." in name or "projector" in name)]
        chosen = {id(p) for p in hidden}
        rest = [p for p in named.values() if id(p) not in chosen]
        self.muon = torch.optim.Muon(hidden, weight_decay=0.02, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, rate: float) -> None:
        """Applies the gradients of the working copy, with learning rates scaled by `rate`."""
        masters: list[torch.Tensor] = list(self.master.parameters())
        copies: list[torch.Tensor] = list(self.working.parameters())
        for parameter, worker in zip(masters, copies, strict=True):
            parameter.grad = None if worker.grad is None else worker.grad.float()
            worker.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        for optimiser, base in ((self.muon, self.settings.muon_rate), (self.adam, self.settings.adam_rate)):
            optimiser.param_groups[0]["lr"] = base * rate
            optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, masters)


def schedule(stage: Stage, step: int, warmup: float) -> float:
    """Relative learning rate at a step: linear warm-up, then a cosine."""
    first = max(1, round(stage.steps * warmup))
    if step < first:
        return stage.peak * (step + 1) / first
    progress = (step - first) / max(1, stage.steps - first)
    return stage.final + (stage.peak - stage.final) * 0.5 * (1 + math.cos(math.pi * progress))


def total_loss(outputs: Outputs, trainee: Trainee, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and its parts by name."""
    words = trainee.model.get_input_embeddings().weight
    answers = {} if outputs.logits is None else {"answer": losses.answer_loss(outputs.logits, batch)}
    parts = {
        **answers,
        **losses.alignment_losses(outputs.projected, words, trainee.heads, batch),
        "scene": losses.scene_loss(outputs.features, outputs.last, trainee.heads, batch),
        "location": losses.location_loss(outputs.features[:, 1:], trainee.heads, batch),
    }
    return torch.stack([LOSS_WEIGHTS[name] * part for name, part in parts.items()]).sum(), parts


class Progress:
    """Running means of the losses and of the accuracy by kind, written to the log every few steps."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.since, self.pictures, self.steps = time.perf_counter(), 0, 0
        self.losses: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    @torch.no_grad()
    def add(self, parts: dict[str, torch.Tensor], logits: torch.Tensor | None, batch: Batch) -> None:
        self.steps, self.pictures = self.steps + 1, self.pictures + len(batch.pixels)
        self.losses.update({name: part.item() for name, part in parts.items()})
        if logits is None:
            return
        right = logits[:, :, 0].argmax(-1) == batch.text.gather(1, batch.answer_at + 1)
        for i, kind in enumerate(ALL_KINDS):
            self.asked[kind] += int((batch.kinds == i).sum())
            self.right[kind] += int((right & (batch.kinds == i)).sum())

    def report(self, stage: Stage, step: int) -> None:
        now = time.perf_counter()
        parts = " ".join(f"{name} {value / self.steps:.3f}" for name, value in self.losses.items())
        accuracy = " ".join(
            f"{kind} {self.right[kind] / self.asked[kind]:.3f}" for kind in ALL_KINDS if self.asked[kind]
        )
        rate = self.pictures / (now - self.since)
        minutes = (now - self.started) / 60
        where = f"{stage.name} {step}/{stage.steps} {minutes:.1f} min {rate:.1f} img/s"
        log.info("%s | %s | %s", where, parts, accuracy)
        self.reset()


def train(output: Path, settings: Settings = SETTINGS, start: Path | None = None, first: str | None = None) -> None:
    """Runs the stages from the one named `first` on, with the weights of the directory `start` if there is one.

    `output` holds a usable model every few steps and at the end. A stage has the same pictures whatever ran before it.
    """
    torch.manual_seed(settings.seed)
    log.info("settings %s loss weights %s", asdict(settings), LOSS_WEIGHTS)
    master = Trainee()
    if start is None:
        master.initialise()
    else:
        master.load(start)
    optimisers, progress = Optimisers(master, settings), Progress()
    skipped = [stage.name for stage in settings.stages].index(first) if first else 0
    seed = sum(stage.steps * stage.batch for stage in settings.stages[:skipped])
    for stage in settings.stages[skipped:]:
        generator = torch.Generator().manual_seed(seed)
        for step in range(stage.steps):
            batch = make_batch(seed, stage.batch, stage.grid, stage.pictures, stage.questions, stage.rows)
            seed += stage.batch
            outputs = forward(optimisers.working.model, batch, shown_tokens(stage, batch, generator))
            loss, parts = total_loss(outputs, optimisers.working, batch)
            loss.backward()
            optimisers.step(schedule(stage, step, settings.warmup))
            progress.add(parts, outputs.logits, batch)
            if (step + 1) % settings.log_every == 0:
                progress.report(stage, step + 1)
            if (step + 1) % settings.save_every == 0:
                save(master.model, output)
        save(master.model, output)
        log.info("%s finished, saved to %s", stage.name, output)


def save(model: LlavaForConditionalGeneration, output: Path) -> None:
    """Writes a directory that `from_pretrained` loads: float16 weights in the hub's layout, configs, tokenizer and
    processor."""
    half = build_model()
    half.load_state_dict(model.state_dict())
    half.half()
    text = half.config.text_config
    half.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    # A model that was built, not loaded, would be saved under names that the hub's checkpoints do not have.
    half.save_pretrained(output, state_dict=hub_layout(half.state_dict()), save_original_format=False)
    build_processor().save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--from", dest="start", type=Path, help="directory of a saved model to continue from")
    parser.add_argument("--first", choices=[stage.name for stage in SETTINGS.stages], help="the stage to begin with")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    train(arguments.output, SETTINGS, arguments.start, arguments.first)


if __name__ == "__main__":
    main()
