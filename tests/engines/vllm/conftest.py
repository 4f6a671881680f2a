"""An engine in this process, and what it did with each image."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Read when vLLM is imported.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from mmtok_cli.data.samples import Sample  # noqa: E402
from mmtok_cli.models.base import VisionLanguageModel  # noqa: E402


@dataclass(frozen=True)
class Told:
    """An answer of the engine: its token ids, the length of the prompt, the log-probability of the first token."""

    token_ids: list[int]
    prompt_length: int
    likelihood: float = field(compare=False)


class Engine:
    """vLLM with the same greedy decoding, prompts and names of images as in mmtok's own pipeline.

    model: the same model in transformers, which renders prompts.
    """

    def __init__(self, directory: Path, model: VisionLanguageModel, record: Path, **options: Any) -> None:
        from vllm import LLM

        os.environ["MMTOK_RECORD"] = str(record)
        self.record, self.model = record, model
        self.llm = LLM(
            str(directory), enforce_eager=True, dtype="float32", max_num_seqs=8, disable_log_stats=True, **options
        )

    def forget(self) -> None:
        """Empty all caches."""
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.reset_prefix_cache()
        self.record.unlink(missing_ok=True)

    def prompt(self, sample: Sample, **asked: Any) -> dict[str, Any]:
        prompt = {
            "prompt": self.model.chat(sample.question, len(sample.images)),
            "multi_modal_data": {"image": list(sample.images)},
        }
        return prompt | ({"mm_processor_kwargs": asked} if asked else {})

    def ask(
        self, prompts: Sequence[dict[str, Any]], max_new_tokens: int = 8, *, ignore_eos: bool = False
    ) -> list[Told]:
        """The answers to prompts that are sent at once."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_new_tokens, ignore_eos=ignore_eos, logprobs=1)
        answers = self.llm.generate(list(prompts), params, use_tqdm=False)
        return [
            Told(list(answer.token_ids), len(whole.prompt_token_ids), answer.logprobs[0][answer.token_ids[0]].logprob)
            for whole in answers
            for answer in whole.outputs
        ]

    def recorded(self) -> list[dict[str, Any]]:
        """Each image that was encoded, in order: its name, the method, and the indices that were kept."""
        lines = self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []
        return [image for line in lines for image in json.loads(line)["images"]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Starts an engine; it is stopped after the tests of the module."""
    engines: list[Engine] = []

    def started(directory: Path, model: VisionLanguageModel, **options: Any) -> Engine:
        engines.append(Engine(directory, model, tmp_path_factory.mktemp("record") / "record.jsonl", **options))
        return engines[-1]

    yield started
    from vllm.distributed import cleanup_dist_env_and_memory

    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()
