"""A real vLLM server on the CPU with a toy model, in a process group of its own.

Needs a folder with vLLM's packages, named by POWERFLOW_VLLM. Only the server sees that folder: its
packages are not those that the trainer was tested with.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests

from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(os.environ.get("POWERFLOW_VLLM", "none")).resolve()
START_SECONDS = 180.0  # a start takes 20 on two quiet cores
# The smallest head that vLLM's attention takes on a CPU has 32 dimensions.
SIZE = dict(hidden_size=64, intermediate_size=128, max_position_embeddings=256)
LENGTH = ("--max-model-len", "256")
LORA = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2")
PROCESSED = ("--logprobs-mode", "processed_logprobs")
RIGHT = (*LENGTH, *LORA, *PROCESSED)
UPDATING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
ENVIRONMENT = {
    "PYTHONPATH": str(PACKAGES),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
needs_vllm = pytest.mark.skipif(
    not (PACKAGES / "vllm").is_dir(), reason="POWERFLOW_VLLM names no folder with vLLM in it"
)


def toy_model(**options):
    return tiny.model(**SIZE | {"initializer_range": 0.22} | options)


def save_toy(folder: Path, scale: float = 1.0) -> str:
    """A model's folder; with another scale of the head it is another base."""
    model = toy_model()
    model.lm_head.weight.data.mul_(scale)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


class Server:
    """One process group; `start` may be called again, on the same port, once it has ended."""

    def __init__(self, model: str, log: Path, *flags: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.log, self.flags, self.environment = model, log, flags, environment
        self.process: subprocess.Popen | None = None

    def start(self) -> Server:
        place = ("--host", "127.0.0.1", "--port", str(self.port))
        kind = ("--dtype", "float32", "--block-size", "32")
        module = ("-m", "vllm.entrypoints.openai.api_server", "--model", self.model)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *module, *place, *kind, *self.flags],
                cwd=self.log.parent,
                env=os.environ | ENVIRONMENT | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def wait(self) -> Server:
        """Until it answers; AssertionError with the end of its log where it does not."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if self.is_healthy():
                return self
            time.sleep(0.2)
        self.kill()
        raise AssertionError(self.log.read_text()[-4000:])

    def is_healthy(self) -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def send(self, number: signal.Signals) -> None:
        """A signal to every process of the group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    def adapters(self) -> list[str]:
        """Names of those that are loaded."""
        headers = {"Authorization": "Bearer secret"}
        models = requests.get(f"{self.url}/v1/models", timeout=30, headers=headers).json()["data"]
        return [model["id"] for model in models if model.get("parent")]


@contextmanager
def serving(*servers: Server) -> Iterator[None]:
    """All of them up, for the time inside; they start side by side."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            if server.process is not None:
                server.kill()
