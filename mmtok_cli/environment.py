"""What a result was measured on."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok_cli import __version__

if TYPE_CHECKING:
    from mmtok_cli.models.base import VisionLanguageModel
    from mmtok_cli.results.schema import Environment


DIGESTED = 16  # values of each weight, about


def environment_of(model: VisionLanguageModel) -> Environment:
    """Versions, device, driver, attention kernel, threads, git commit (of a source checkout) and command line."""
    import torch

    from mmtok_cli.models import hf
    from mmtok_cli.results.schema import Environment
    from mmtok_cli.timing.gpu import open_gpus

    on_gpu = model.device.type == "cuda"
    gpu = open_gpus(model.devices)
    return Environment(
        **_versions(),
        torch=torch.__version__,
        transformers=hf.VERSION,
        processor=torch.cuda.get_device_name(model.device) if on_gpu else _processor(),
        device=", ".join(map(str, model.devices)),
        weights=model.weights,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=model.attention,
        encoder_attention=None if model.encoder_attention == model.attention else model.encoder_attention,
        threads=torch.get_num_threads(),
        driver=gpu.driver() if gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        weights_digest=weights_digest(model.model),
        quantization=model.quantization,
        compiled=model.compiled,
        pixels=model.resolution,
        layers=(model.loaded_layers, model.layer_count) if model.loaded_layers < model.layer_count else None,
        linear_layers=len(model.linear_layers),
        linear_reference=bool(model.linear_layers) and not hf.has_linear_attention_kernels(),
    )


def environment_of_engine(
    *, device: str, device_name: str | None, dtype: str, weights: str, layers: tuple[int, int] | None
) -> Environment:
    """The same for a model that a serving engine runs. device_name: of a GPU. layers: as in an Environment."""
    import torch

    from mmtok_cli.models import hf
    from mmtok_cli.results.schema import Environment

    return Environment(
        **_versions(),
        torch=torch.__version__,
        transformers=hf.VERSION,
        processor=device_name or _processor(),
        device=device,
        weights=weights,
        dtype=dtype,
        attention="the engine's",
        threads=available_cpus(),
        cuda=torch.version.cuda if device == "cuda" else None,
        layers=layers,
    )


def _versions() -> dict[str, Any]:
    """What does not depend on the model."""
    commit = _git("rev-parse", "HEAD")
    return {
        "mmtok": __version__,
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": [_decoded(each) for each in (Path(sys.argv[0]).name, *sys.argv[1:])],
    }


def available_cpus() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def weights_digest(model: Any) -> str:
    """A digest of names, shapes and a few values of each weight: other weights of the same architecture differ."""
    import torch

    from mmtok_cli.models.quantization import stored_tensors

    found = hashlib.sha256()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            found.update(f"{name} {tuple(weight.shape)}".encode())
            for tensor in stored_tensors(weight):
                values = tensor.flatten()[:: max(1, tensor.numel() // DIGESTED)]
                found.update(values.to("cpu", torch.float32).numpy().tobytes())
    return found.hexdigest()[:16]


def _decoded(argument: str) -> str:
    """An argument of the command line with undecodable bytes escaped, which JSON cannot hold."""
    return argument.encode("utf-8", "backslashreplace").decode("utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
