"""A vLLM engine as this package's commands use it: started, sent requests to, timed and stopped.

The engine runs in processes of its own; its front end, which processes images, runs in this one. Nothing of vLLM is
imported before the engine starts, since importing it takes many seconds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from PIL.Image import Image

from mmtok_cli.errors import MMTokError, first_line
from mmtok_cli.integrations.vllm import MODELS
from mmtok_cli.results.engine import EngineInfo, LoadRun, ServedRequest
from mmtok_cli.timing.load import Encoding, Step, busy_seconds, closed_loop

RECORD = "MMTOK_RECORD"  # see `reducing`
PLUGIN = "mmtok"  # its name among vLLM's plug-ins
MODALITY = "image"
LOG = "vllm.log"
CACHES = (
    "the caches of prefixes and of processed images are off, and every request has image keys of its own, so that the "
    "encoder cache answers none either: every image is processed, encoded and prefilled"
)
# The last line of a traceback, behind what vLLM's logger puts in front of it.
ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): (.+)$")
UNSPECIFIC = ("See root cause above", "Engine core initialization failed", "Worker failed with error")


Result = TypeVar("Result")


class RefusedRequestError(MMTokError):
    """A request that an engine does not answer. It goes on with others."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is started.

    model: a directory or hub id. random: with random weights; the directory needs no others. device: the kind that
    vLLM must have been built for, or `auto`. dtype: `auto` is float32 on a CPU. sequences: the most requests at a time.
    images: the most of a request. kv_cache: GiB of the KV cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE says it.
    """

    model: str
    random: bool
    device: str
    dtype: str
    sequences: int
    images: int
    kv_cache: int


@dataclass(frozen=True)
class EngineRequest:
    """A question about images.

    sample: its number. prompt: token ids, with one placeholder for each image. reduction: `mm_processor_kwargs` of the
    plug-in. vision: vision tokens of the unreduced images. exact: the answer has `max_new_tokens` tokens, not at most.
    """

    sample: int
    prompt: tuple[int, ...]
    images: tuple[Image, ...]
    reduction: Mapping[str, Any]
    vision: int
    max_new_tokens: int
    exact: bool = False


class VllmEngine:
    """An engine, which `start` starts and `close` ends. image_token: id of the placeholder.

    Raises MMTokError for an architecture that the plug-in does not know.
    """

    def __init__(self, options: EngineOptions, architecture: str, image_token: int) -> None:
        if architecture not in MODELS:
            raise MMTokError(
                f"vLLM does not reduce the vision tokens of {architecture}", f"it does those of {', '.join(MODELS)}"
            )
        self._options, self._image_token = options, image_token
        self._folder = Path(tempfile.mkdtemp(prefix="mmtok-vllm-"))
        self._record, self._read = self._folder / "record.jsonl", 0
        self._numbers = count()
        self._steps: list[Step] = []
        self._settings: dict[str, Any] = {}
        self._llm: Any = None
        self._loop = asyncio.new_event_loop()
        self._failed = False

    def start(self) -> None:
        """Raises MMTokError, with vLLM's own reason, where it does not start."""
        try:
            with self._output_in_log():
                self._loop.run_until_complete(self._start())
        except Exception as error:
            raise self._failure("vLLM did not start", error) from error
        logging.getLogger("vllm").setLevel(logging.CRITICAL)

    def close(self) -> None:
        """End the engine's processes. The log of one that failed is left for the user."""
        with self._output_in_log():
            if self._llm is not None:
                with suppress(Exception):
                    self._llm.shutdown()
            with suppress(Exception):
                self._loop.run_until_complete(_cancel_all())
            self._loop.close()
            self._llm = None
            gc.collect()  # its end writes to the terminal
        if not self._failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def info(self) -> EngineInfo:
        cache = self._llm.vllm_config.cache_config
        return EngineInfo(
            name="vllm",
            version=_version(),
            kv_cache_tokens=cache.num_gpu_blocks * cache.block_size,
            settings=self._settings,
            caches=CACHES,
        )

    @property
    def device(self) -> str:
        """cpu, cuda, …"""
        from vllm.platforms import current_platform

        return str(current_platform.device_type)

    @property
    def device_name(self) -> str | None:
        """Of a GPU; None for a CPU."""
        from vllm.platforms import current_platform

        return None if self.device == "cpu" else str(current_platform.get_device_name())

    @property
    def dtype(self) -> str:
        return str(self._llm.model_config.dtype).removeprefix("torch.")

    def run(
        self, requests: Sequence[EngineRequest], concurrency: int, *, case: int = 0, number: int | None = None
    ) -> LoadRun:
        """Send requests with `concurrency` of them in flight. case, number: of the case and the round in the record.

        Raises MMTokError for a request that the engine refuses, and where it fails.
        """
        self._steps.clear()
        start = time.monotonic()
        served = self._until_served(partial(closed_loop, self._serve, requests, concurrency))
        duration = time.monotonic() - start
        encodings = self._encodings()
        return LoadRun(
            case=case,
            concurrency=concurrency,
            round=number,
            seconds=duration,
            requests=served,
            busy=busy_seconds(duration, self._steps, encodings),
            images=sum(each.images for each in encodings),
            encodings=len(encodings),
            steps=len(self._steps),
            kv_cache=max((step.kv_cache for step in self._steps), default=0.0),
        )

    def answers(self, requests: Sequence[EngineRequest], concurrency: int) -> list[ServedRequest | MMTokError]:
        """The answers, or why the engine refuses a request. Raises MMTokError where it fails."""
        return self._until_served(partial(closed_loop, self._serve_or_refuse, requests, concurrency))

    def _until_served(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        try:
            return self._loop.run_until_complete(work())
        except RefusedRequestError:
            raise
        except Exception as error:
            raise self._failure("vLLM failed", error) from error

    async def _start(self) -> None:
        options = self._options
        _require_plugin()
        os.environ[RECORD] = str(self._record)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(options.kv_cache))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        found = str(current_platform.device_type)
        if options.device != "auto" and options.device.split(":")[0] != found:
            raise MMTokError(f"vLLM runs on {found} here, not on {options.device}", "omit --device")
        on_cpu = found == "cpu"
        self._settings = {
            "dtype": "float32" if options.dtype == "auto" and on_cpu else options.dtype,
            "load_format": "dummy" if options.random else "auto",
            "max_num_seqs": options.sequences,
            "limit_mm_per_prompt": {MODALITY: options.images},
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "enforce_eager": on_cpu,
            # The worker has a process of its own, so that the engine core sees how long its steps take.
            "distributed_executor_backend": "mp",
        }
        arguments = AsyncEngineArgs(
            options.model, disable_log_stats=True, enable_logging_iteration_details=True, **self._settings
        )
        self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[_step_logger(self._steps)])

    async def _serve(self, request: EngineRequest) -> ServedRequest:
        """Send one request and wait for its answer. Raises RefusedRequestError for one that the engine refuses."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        llm, start = self._llm, time.monotonic()
        prompt = {
            "prompt_token_ids": list(request.prompt),
            "multi_modal_data": {MODALITY: list(request.images)},
            "mm_processor_kwargs": dict(request.reduction),
        }
        sampling = SamplingParams(temperature=0, max_tokens=request.max_new_tokens, ignore_eos=request.exact)
        try:
            parsed = parse_model_prompt(llm.model_config, prompt)
            (rendered,) = await llm.renderer.render_cmpl_async([parsed], llm.renderer.default_cmpl_tok_params)
            processed = time.monotonic()
            outputs = llm.generate(rendered, sampling, f"mmtok-{next(self._numbers)}")
            output = await anext(outputs)
            first, together = time.monotonic(), len(output.outputs[0].token_ids) > 1
            async for later in outputs:
                output = later
        except VLLMValidationError as error:
            raise RefusedRequestError(f"vLLM refuses a request: {_without_parameter(str(error))}") from error
        end, found = time.monotonic(), output.metrics
        if together:  # this process was late, and later tokens came with the first
            first = found.first_token_ts
        ttft, preprocess = first - start, processed - start
        queue = max(found.scheduled_ts - processed, 0.0)
        (answer,) = output.outputs
        return ServedRequest(
            sample=request.sample,
            seconds={
                "preprocess": preprocess,
                "queue": queue,
                "first_step": max(ttft - preprocess - queue, 0.0),
                "decode": end - first,
                "ttft": ttft,
                "total": end - start,
            },
            vision=request.vision,
            kept=output.prompt_token_ids.count(self._image_token),
            prompt=len(output.prompt_token_ids),
            new=len(answer.token_ids),
            answer=answer.text.strip(),
            preempted=found.num_preemptions,
        )

    async def _serve_or_refuse(self, request: EngineRequest) -> ServedRequest | MMTokError:
        try:
            return await self._serve(request)
        except RefusedRequestError as error:
            return error

    def _encodings(self) -> list[Encoding]:
        """What the plug-in has recorded since the last call."""
        if not self._record.exists():
            return []
        with self._record.open(encoding="utf-8") as record:
            record.seek(self._read)
            lines = record.readlines()
            self._read = record.tell()
        found = []
        for line in map(json.loads, lines):
            seconds = line["seconds"]
            found.append(Encoding(seconds.get("encode", 0.0), seconds.get("select", 0.0), len(line["images"])))
        return found

    @contextmanager
    def _output_in_log(self) -> Iterator[None]:
        """What this process, the processes that it starts and vLLM's loggers write goes to a file meanwhile."""
        saved = {}
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            with suppress(OSError, AttributeError):
                stream.flush()
                saved[number] = os.dup(number)
        try:
            with (self._folder / LOG).open("ab") as log:
                for number in saved:
                    os.dup2(log.fileno(), number)
            yield
        finally:
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                with suppress(OSError, AttributeError):
                    stream.flush()
                if number in saved:
                    os.dup2(saved[number], number)
                    os.close(saved[number])

    def _failure(self, what: str, error: Exception) -> MMTokError:
        """An error in one line: what the engine's processes said last, or what reached this one."""
        if isinstance(error, MMTokError):
            return error
        self._failed, log = True, self._folder / LOG
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return MMTokError(f"{what}: {reason(text) or first_line(error.__cause__ or error)}", f"its log is {log}")


def reason(log: str) -> str | None:
    """The error that made an engine fail, from its log: the last one that says more than that it failed."""
    found = [match for line in log.splitlines() if (match := ERROR.search(line))]
    specific = [match for match in found if not any(each in match[2] for each in UNSPECIFIC)]
    return " ".join(specific[-1][2].split()) if specific else None


def _require_plugin() -> None:
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        raise MMTokError(
            f"VLLM_PLUGINS={chosen} switches off the plug-in that reduces vision tokens", f"add {PLUGIN}, or unset it"
        )


def _step_logger(steps: list[Step]) -> Any:
    """A class of statistics loggers that add each step of the engine to a list."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            details = getattr(scheduler_stats, "iteration_details", None)
            if details is not None and not details.is_dummy:
                steps.append(
                    Step(
                        details.elapsed_ms / 1000,
                        details.num_ctx_tokens,
                        details.num_generation_tokens,
                        scheduler_stats.kv_cache_usage,
                    )
                )

        def log_engine_initialized(self) -> None:
            pass

    return StepLogger


async def _cancel_all() -> None:
    """End what is still running in the loop."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _without_parameter(message: str) -> str:
    """vLLM's message without the name of the parameter that it adds to it."""
    return re.sub(r" \(parameter=[^)]*\)$", "", first_line(Exception(message)))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    return "unknown"
