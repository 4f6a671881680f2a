"""The server of vLLM with the plug-in: its defaults, options of a request, errors.

The command `vllm serve` does the same; the wheel for CPUs lacks it, as it looks for a distribution called `vllm`.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import mmtok_cli
from mmtok_cli.data.samples import Sample, demo_samples

DEMO = Path(mmtok_cli.__file__).parent / "demo" / "weights"
START = 300  # seconds that a server may take
DEFAULTS = {"method": "mmtok", "budget": 32}


class Server:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def post(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ask(self, sample: Sample, **asked: Any) -> tuple[str, int]:
        """The answer, and the number of tokens of the prompt."""
        status, found = self.post(chat(sample, **asked))
        assert status == 200, found
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]


def chat(sample: Sample, **asked: Any) -> dict[str, Any]:
    file = BytesIO()
    sample.images[0].save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return body | ({"mm_processor_kwargs": asked} if asked else {})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO)),
        *("--served-model-name", "demo"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *(
            "--max-model-len",
            "1024",
            "--max-num-seqs",
            "8",
            "--trust-request-mm-kwargs",
            "--mm-processor-kwargs",
            json.dumps(DEFAULTS),
        ),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            end = time.monotonic() + START
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                    time.sleep(1)
            yield Server(port)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_defaults_of_the_server_and_options_of_a_request(server: Server) -> None:
    sample = demo_samples(1)[0]
    lengths = {
        name: server.ask(sample, **asked)[1]
        for name, asked in {
            "default": {},
            "budget": {"budget": 8},
            "method": {"method": "random"},
            "full": {"method": "full"},
        }.items()
    }
    text = lengths["full"] - 576
    assert lengths == {"default": text + 32, "budget": text + 8, "method": text + 32, "full": text + 576}


def test_eight_clients_at_once_are_answered_as_if_alone(server: Server) -> None:
    """Two methods, three budgets and unreduced requests, with two questions about each image."""
    by_scene: dict[str, list[Sample]] = {}
    for sample in demo_samples(60):
        by_scene.setdefault(sample.image_ids[0], []).append(sample)
    scenes = [samples[:2] for samples in by_scene.values() if len(samples) > 1][:2]
    options: list[dict[str, Any]] = [{"method": "full"}]
    options += [{"method": name, "budget": budget} for name in ("mmtok", "divprune") for budget in (8, 16, "20%")]
    requests = [(sample, asked) for scene in scenes for sample in scene for asked in options]
    alone = [server.ask(sample, **asked) for sample, asked in requests]
    with ThreadPoolExecutor(8) as clients:
        for order in (1, -1):
            together = list(clients.map(lambda request: server.ask(request[0], **request[1]), requests[::order]))
            assert together == alone[::order]


def test_an_impossible_request_is_refused_and_the_server_goes_on(server: Server) -> None:
    sample = demo_samples(1)[0]
    for asked, said in (
        ({"method": "fastv"}, "fastv drops tokens inside the language model"),
        ({"method": "mmtokk"}, "did you mean mmtok"),
        ({"budget": "many"}, "many"),
    ):
        status, found = server.post(chat(sample, **asked))
        assert status == 400 and said in found["error"]["message"]
    assert server.ask(sample)[0]
